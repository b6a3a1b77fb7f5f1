"""Weak labels of pairs of answers: the losses of classes, and that packing and cutting a batch change nothing."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pair_rows
import pytest

from research import objectives, params
from research.devices import sharding
from research.errors import InputError
from research.models.config import ModelConfig
from research.models.transformer import make_model
from research.objectives import types, weak_to_strong
from research.objectives.terms import Inputs, losses, row_numbers
from research.ops import class_losses, rewards
from research.sources import fields

B, T, V = 8, 32, 64
SIZE = {"vocab_size": V, "num_layers": 1, "d_model": 16, "num_heads": 2, "num_kv_heads": 2, "d_ff": 16, "max_length": T}
MODEL = make_model(ModelConfig(**SIZE, num_labels=1))
VALUES = jax.tree.map(lambda x: 6.0 * x, params.init(MODEL.specs, jax.random.PRNGKey(0)))
NAMES = (*fields.group("text"), "pair", "side", "preference")
OWN = {"loss": "auxiliary_confidence", "coefficient": 0.7}
# What each loss is of the logits, labels and weights of the pairs, where it isn't the one of its name without options.
OTHERS = {
    "auxiliary_confidence": functools.partial(class_losses.auxiliary_confidence, coefficient=0.7),
    "augmented_confidence": functools.partial(class_losses.augmented_confidence, coefficient=0.5),
    "bootstrap": functools.partial(class_losses.bootstrap, coefficient=0.05),
}


def terms_of(**terms):
    of_pairs = {"objective": "weak_to_strong", "head": "pairs"}
    return objectives.load({"terms": {name: of_pairs | options for name, options in terms.items()}})


LOSSES = terms_of(**{name: OWN if name == OWN["loss"] else {"loss": name} for name in weak_to_strong.LOSSES})
CUT = terms_of(soft={}, own=OWN, adaptive={"loss": "adaptive_confidence"})


def packed():
    return pair_rows.packed(NAMES, B, T, V)


def pairs_of(batch):
    """(rewards of both answers [P, 2], how probably the first is the better one [P])."""
    read = jax.jit(lambda values: MODEL.unembed(values).logits(MODEL.hidden(values, batch))[..., 0])(VALUES)
    compared = {}
    for row in range(B):
        for t in np.flatnonzero(np.diff(np.append(batch["segment_ids"][row], 0))):
            sides = compared.setdefault((row, batch["pair"][row, t]), {"p": batch["preference"][row, t]})
            sides[batch["side"][row, t]] = read[row, t]
    return tuple(jnp.array(x) for x in zip(*(((x[0], x[1]), x["p"]) for x in compared.values()), strict=True))


@functools.cache
def whole():
    return jax.jit(functools.partial(pair_rows.gradients, MODEL, CUT))(VALUES, packed())


def close(a, b):
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-4), a, b)


def test_every_loss_is_the_one_of_classes_on_the_rewards_of_both_answers():
    batch = packed()
    scores, p = pairs_of(batch)
    labels, ones = jnp.stack([p, 1 - p], axis=1), jnp.ones(len(p))
    inputs = Inputs(jax.random.PRNGKey(0), jnp.zeros((), jnp.int32), row_numbers(batch), {})

    @jax.jit
    def both(values, scores):
        outs = losses(LOSSES, types.Forward({"policy": MODEL}, {"policy": values}, batch), inputs)
        each = {name: OTHERS.get(name, getattr(class_losses, name)) for name in weak_to_strong.LOSSES}
        turned = {name: function(scores[:, ::-1], labels[:, ::-1], ones) for name, function in each.items()}
        return outs, {name: function(scores, labels, ones) for name, function in each.items()}, turned

    outs, wanted, turned = both(VALUES, scores)
    assert len(p) > 10
    for name, out in outs.items():
        close((out.loss_sum, out.weight), (wanted[name], len(p)))
    close(turned, wanted)  # which answer stands first says nothing
    soft, difference = outs["cross_entropy"], scores[:, 0] - scores[:, 1]
    bradley_terry = p * rewards.bradley_terry(*scores.T) + (1 - p) * rewards.bradley_terry(*scores.T[::-1])
    close(soft.loss_sum, bradley_terry.sum())
    agree = np.mean((difference > 0) == (p > 0.5))
    assert 0.2 < agree < 0.8
    close(soft.metrics["agreement"][0] / soft.metrics["agreement"][1], agree)


def test_packing_changes_nothing():
    close(jax.jit(functools.partial(pair_rows.gradients, MODEL, CUT))(VALUES, pair_rows.alone(packed())), whole())


@pytest.mark.parametrize("cut", ["microbatches", pytest.param("mesh", marks=pytest.mark.slow)])
def test_cutting_a_batch_changes_nothing(cut):
    if cut == "microbatches":
        close(jax.jit(functools.partial(pair_rows.gradients, MODEL, CUT, microbatches=4))(VALUES, packed()), whole())
        return
    mesh = sharding.make_mesh({"fsdp": 2, "sequence": 2, "tensor": 2})
    with jax.set_mesh(mesh):
        values = jax.device_put(VALUES, params.shardings(MODEL.specs, mesh))
        batch = jax.device_put(packed(), sharding.named(mesh, ("batch", "time")))
        close(jax.jit(functools.partial(pair_rows.gradients, MODEL, CUT))(values, batch), whole())


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"head": "pears"}, "head = 'pears': no such head. Did you mean 'pairs'"),
        ({"words": (" a", " b")}, "words are for head = 'words'"),
        (OWN | {"own_labels": "batch"}, "own_labels = 'batch': is about how frequent classes are"),
        (OWN | {"own_labels": "running", "rate": 0.2}, "own_labels = 'running': is about how frequent"),
        (OWN | {"balance": True}, "balance = True: is about how frequent classes are"),
    ],
)
def test_options_that_pairs_have_not_are_named(options, words):
    with pytest.raises(InputError, match=words):
        terms_of(pairs=options)


@pytest.mark.parametrize(
    ("num_labels", "words"), [(0, "num_labels = 0: .* a reward is one number"), (2, "num_labels = 2: .* one reward")]
)
def test_a_head_that_does_not_fit_is_named(num_labels, words):
    model = make_model(ModelConfig(**SIZE, num_labels=num_labels))
    forward = types.Forward({"policy": model}, {"policy": params.init(model.specs, jax.random.PRNGKey(0))}, packed())
    with pytest.raises(InputError, match=words):
        jax.eval_shape(lambda: weak_to_strong.read_pairs(forward, forward.batch))
