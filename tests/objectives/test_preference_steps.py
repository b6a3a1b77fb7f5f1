"""Steps of preference optimisation: a whole training of TRL's, and the same update however a batch is cut."""

import math
from pathlib import Path

import goldens
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from test_train import SMALL

from research import loading, objectives, optim, params, step_signals, train
from research.devices import sharding
from research.models.transformer import make_model
from research.objectives.terms import Inputs, init_carry, row_numbers

CASES = goldens.load("dpo_trajectories")
FOLDER = Path(goldens.__file__).parent / "golden/hf_tiny"
KINDS = {"sigmoid": {"kind": "sigmoid"}, "ipo": {"kind": "ipo_mean"}}


def rows_of(ids, attention, completion):
    """[2 n, T] of n chosen and n rejected answers -> a batch of n rows with a pair in each."""
    beside = lambda x: np.concatenate(np.split(np.asarray(x), 2), axis=1)  # noqa: E731
    n, length = len(ids) // 2, ids.shape[1]
    side = np.repeat([[0, 1]], length, axis=1) * np.ones((n, 1), np.int64)
    real = beside(attention)
    batch = {
        "tokens": beside(ids),
        "segment_ids": (side + 1) * real,
        "positions": np.tile(np.arange(length), (n, 2)) * real,
        "pair": real,
        "side": np.where(real > 0, side, -1),
    }
    batch = {name: jnp.asarray(x, jnp.int32) for name, x in batch.items()}
    return batch | {"loss_mask": jnp.asarray(beside(completion), jnp.float32)}


@pytest.mark.slow
@pytest.mark.parametrize("name", ["dpo_sigmoid_llama", "dpo_ipo_llama"])
def test_a_training_of_trl(name):
    case, h = CASES[name], CASES[name].hparams
    mesh = sharding.make_mesh({}, jax.devices()[:1])
    found = loading.find(str(FOLDER / "llama"))
    model = make_model(found.config)
    values = found.read(model.specs, params.shardings(model.specs, mesh))
    terms = objectives.load({"terms": {"preference": {**KINDS[h["loss_type"]], "beta": h["beta"]}}})
    spec = optim.OptimizerSpec(learning_rate=h["lr"], warmup_steps=2, weight_decay=h["weight_decay"], b2=0.999)
    optimizer = optim.make_optimizer(spec, h["steps"], jax.tree.map(lambda x: True, {"policy": values}))
    schedule = optim.make_schedule(spec, h["steps"])
    step = jax.jit(train.TrainStep(terms, {"policy": model, "reference": model}, optimizer, schedule))
    batches = [
        rows_of(*(case.inputs[name][i] for name in ("input_ids", "attention_mask", "completion_mask")))
        for i in range(h["steps"])
    ]
    carry = init_carry(terms, batches[0])
    state = train.init_state({"policy": values}, optimizer, jax.random.PRNGKey(0), carry=carry)
    close = lambda a, b, **kw: np.testing.assert_allclose(a, b, **{"rtol": 2e-4, **kw})  # noqa: E731
    out = []
    for batch in batches:
        state, metrics = step(state, {"reference": values}, batch)
        out.append(train.means([metrics]))
    close([m["learning_rate"] for m in out], case.outputs["lr"], rtol=1e-5, atol=1e-9)
    close([m["loss"] for m in out], case.outputs["loss"])
    close([m["grad_norm"] for m in out], case.outputs["grad_norm"])
    close([m["log_prob_chosen"] for m in out], case.outputs["logps_chosen"])
    close([m["margin"] for m in out], case.outputs["reward_margin"], atol=1e-4, rtol=1e-3)
    assert out[0]["loss"] == pytest.approx(out[0]["start_loss"], rel=1e-6)
    assert out[0]["change_chosen"] == 0
    probe = jnp.asarray(case.inputs["probe_ids"], jnp.int32)
    seen = {"tokens": probe, "segment_ids": jnp.ones_like(probe)}
    seen["positions"] = jnp.broadcast_to(jnp.arange(probe.shape[1]), probe.shape)
    final = state.params["policy"]
    logits = model.unembed(final).logits(model.hidden(final, seen))
    close(logits, case.outputs["final_probe_logits"], atol=2e-3)


# Every way in which a term reads a batch, in one compilation: sums and means, ranks over the batch, a KL over the
# batch, divisors of its tokens, weights of tokens and pairs.
TERMS = {
    "dpo": {"kind": "cdpo", "label_smoothing": 0.1, "sft": 0.5},
    "mean": {"kind": "sigmoid", "length_normalized": True, "wpo": True},
    "ld": {"kind": "ipo", "ld_alpha": 0.3, "beta": 0.5},
    "aot": {"kind": "aot", "beta": 1.0},
    "unpaired": {"kind": "aot_unpaired", "beta": 1.0},
    "bco": {"kind": "bco"},
    "orpo": {"kind": "orpo"},
    "kto": {"kind": "kto", "undesirable_weight": 0.5},
}
LENGTH, ROWS = 48, 8


class Document:
    """A prompt and an answer, of tokens drawn at random, and what the batch is to say of it."""

    def __init__(self, rng, prompt, answer, **said):
        self.tokens = rng.integers(1, SMALL.config.vocab_size, prompt + answer)
        self.mask = np.arange(prompt + answer) >= prompt
        self.said = {"pair": 0, "side": -1, "desirable": -1, "mismatched": 0, **said}


def make_units(seed=0):
    """Pairs of very different lengths, and answers with a verdict beside mismatched ones."""
    rng, units = np.random.default_rng(seed), []
    for longer in (2, 25, 6, 14, 3, 19, 9):
        lengths = (longer, 2) if rng.random() < 0.5 else (1, longer)
        prompt = int(rng.integers(1, 5))
        units.append([Document(rng, prompt, n, pair=1, side=side) for side, n in enumerate(lengths)])
    for i, length in enumerate((3, 12, 7, 5, 9)):
        judged = Document(rng, 2, length, desirable=i % 2)
        units.append([judged, Document(rng, 2, int(rng.integers(1, 8)), mismatched=1)])
    return units


def make_batch(units, rows, packed):
    """Lays units into rows; the last rows may stay empty."""
    shape = rows, LENGTH
    ints = ("tokens", "segment_ids", "positions", "pair", "mismatched")
    batch = {name: np.zeros(shape, np.int32) for name in ints} | {"loss_mask": np.zeros(shape, np.float32)}
    batch |= {name: np.full(shape, -1, np.int32) for name in ("side", "desirable")}
    ends, segments, pairs = np.zeros(rows, int), np.zeros(rows, int), np.zeros(rows, int)
    for i, unit in enumerate(units):
        size = sum(len(document.tokens) for document in unit)
        row = int(np.flatnonzero(ends + size <= LENGTH)[-1 if i % 2 else 0]) if packed else i
        pairs[row] += unit[0].said["pair"]
        for document in unit:
            place = slice(ends[row], ends[row] + len(document.tokens))
            segments[row] += 1
            values = {**document.said, "tokens": document.tokens, "segment_ids": segments[row]}
            values |= {"positions": np.arange(len(document.tokens)), "loss_mask": document.mask}
            if values["mismatched"]:
                values |= {"mismatched": document.mask, "loss_mask": 0}
            values["pair"] *= pairs[row]
            for name, value in values.items():
                batch[name][row, place] = value
            ends[row] = place.stop
    return {name: jnp.asarray(x) for name, x in batch.items()}


@pytest.fixture(scope="module")
def policies():
    """Policy and reference, a little apart."""
    model = SMALL
    first, second = (params.init(model.specs, jax.random.PRNGKey(seed)) for seed in (0, 3))
    return model, first, jax.tree.map(lambda x, y: 0.5 * x + 0.5 * y, first, second)


def gradients(policies, batch, microbatches=1, mesh=None):
    """The gradient of the policy and every term's sums, without what is measured of a sample of each row."""
    model, policy, reference = policies
    spec = {"terms": {name: {"objective": "preference", "weight": 0.5, **x} for name, x in TERMS.items()}}
    terms = objectives.load(spec)
    step = train.TrainStep(
        terms, {"policy": model, "reference": model}, optax.sgd(1.0), lambda t: jnp.ones(()), microbatches
    )
    carry = init_carry(terms, batch)
    carry = {**carry, "bco": {**carry["bco"], "shift": jnp.float32(0.1)}}
    inputs = Inputs(jax.random.PRNGKey(0), jnp.zeros((), jnp.int32), row_numbers(batch), carry)
    if mesh is not None:
        batch = jax.device_put(batch, sharding.named(mesh, ("batch", "time")))
        place = params.shardings({"policy": model.specs}, mesh)["policy"]
        policy, reference = (jax.device_put(x, place) for x in (policy, reference))
    grads, outs = jax.jit(step.gradients)({"policy": policy}, {"reference": reference}, batch, inputs)
    return grads, step_signals.detach(outs)[0]


@pytest.fixture(scope="module")
def unpacked(policies):
    units = make_units()
    return gradients(policies, make_batch(units, 16, packed=False))


def assert_same(one, two):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-3, atol=2e-5), one[0], two[0])
    for name in TERMS:
        a, b = one[1][name], two[1][name]
        np.testing.assert_allclose([a.loss_sum, a.weight], [b.loss_sum, b.weight], rtol=1e-4, err_msg=name)
        assert a.metrics.keys() == b.metrics.keys()
        for metric in a.metrics:
            sums = a.metrics[metric], b.metrics[metric]
            np.testing.assert_allclose(*sums, rtol=1e-3, atol=1e-4, err_msg=f"{name}/{metric}")


def test_every_term_has_something_to_learn_from(unpacked):
    assert all(float(out.weight) == (5 if name == "kto" else 7) for name, out in unpacked[1].items())
    metrics = unpacked[1]["kto"].metrics
    assert float(metrics["kl"][0]) > 0
    assert all(math.isfinite(float(out.loss_sum)) for out in unpacked[1].values())


def test_packed_pairs_learn_as_unpacked_ones(policies, unpacked):
    """Also with rows of padding alone, and in microbatches of which some have no pair, or no verdict."""
    packed = make_batch(make_units(), ROWS, packed=True)
    assert np.max(packed["pair"]) > 1
    assert_same(gradients(policies, packed, microbatches=4), unpacked)


@pytest.mark.slow
def test_sharded_pairs_learn_as_those_of_one_device(policies, unpacked):
    mesh = sharding.make_mesh({"data": 2, "sequence": 2}, jax.devices()[:4])
    with jax.set_mesh(mesh):
        cut = gradients(policies, make_batch(make_units(), ROWS, packed=True), microbatches=2, mesh=mesh)
    assert_same(cut, unpacked)


@pytest.mark.slow
def test_a_reference_that_follows_moves_every_so_many_steps(policies):
    """And is no part of the gradient: what it follows with is state."""
    model, policy, _ = policies
    terms = objectives.load({"terms": {"preference": {"beta": 1.0}}})
    models = {"policy": model, "reference": model._replace(of="policy", synced=True)}
    syncs = {"reference": train.Sync("policy", 2, 0.25)}
    optimizer = optax.sgd(0.1)
    step = jax.jit(train.TrainStep(terms, models, optimizer, lambda t: jnp.ones(()), syncs=syncs))
    batch = make_batch(make_units(), ROWS, packed=True)
    carry = init_carry(terms, batch)
    state = train.init_state({"policy": policy}, optimizer, jax.random.PRNGKey(0), carry=carry, syncs=syncs)
    losses, references = [], [policy]
    for _ in range(3):
        state, metrics = step(state, {}, batch)
        losses.append(train.means([metrics])["loss"])
        references.append(state.synced["reference"])
        if len(references) == 3:
            moved = jax.tree.map(lambda new, old: 0.25 * new + 0.75 * old, state.params["policy"], policy)
    assert losses[0] == pytest.approx(math.log(2), rel=1e-5)
    assert losses[1] < 0.99 * losses[0]
    jax.tree.map(np.testing.assert_array_equal, references[1], policy)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-7), references[2], moved)
    jax.tree.map(np.testing.assert_array_equal, references[3], references[2])
    assert train.means([metrics])["change_chosen"] != 0
