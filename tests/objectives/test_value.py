"""The critic's loss: that of TRL, verl and OpenRLHF; values stand at the tokens they are of; who is trained."""

import functools

import goldens
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from research import objectives, params, train
from research.errors import InputError
from research.models.config import ModelConfig
from research.models.transformer import make_model
from research.objectives.terms import Inputs, row_numbers
from research.objectives.types import Forward
from research.objectives.value import critic_values, value_losses
from research.sources import fields

CASES = goldens.load("ppo")
B, T, V = 4, 12, 32
SIZE = {"vocab_size": V, "num_layers": 1, "d_model": 16, "num_heads": 2, "num_kv_heads": 2, "d_ff": 16}


def embeddings_alone(**options):
    """A model whose last hidden states are its embeddings, which compiles in no time."""
    model = make_model(ModelConfig(**SIZE, max_length=T, **options))
    specs = {name: spec for name, spec in model.specs.items() if name in ("embed", "head")}
    return model._replace(specs=specs, hidden=lambda params, batch: params["embed"][batch["tokens"]])


POLICY, CRITIC = embeddings_alone(), embeddings_alone(num_labels=1)
KEYS = jax.random.split(jax.random.PRNGKey(0))


def mean_loss(values, old, returns, mask, clip):
    losses, held = value_losses(values, old, returns, clip)
    weight = jnp.sum(mask)
    return jnp.sum(losses * mask) / weight, jnp.sum(held * mask) / weight


gradient = jax.jit(jax.value_and_grad(mean_loss, has_aux=True), static_argnames="clip")


def test_losses_of_verl_openrlhf_and_trl():
    count = 0
    for name, case in CASES.items():
        x, h, out = case.inputs, case.hparams, case.outputs
        if name.startswith(("verl_value", "openrlhf_value")):
            arrays = [x[k] for k in ("vpreds", "old_values", "returns", "mask")]
            clip, loss, grad = h.get("clip_eps", h.get("cliprange_value")), out["loss"], out["grad_vpreds"]
        elif name.startswith("trl_ppo_loss"):
            arrays = [x["vpred"], x["old_values"], x["returns"], 1 - x["padding_mask_p1"].astype(float)]
            clip, loss, grad = h["cliprange_value"], out["vf_loss"], out["grad_vpred"] / h["vf_coef"]
        else:
            continue
        (ours, held), ours_grad = gradient(*(jnp.asarray(a, jnp.float32) for a in arrays), clip=clip)
        np.testing.assert_allclose(ours, loss, rtol=1e-5)
        np.testing.assert_allclose(ours_grad, grad, rtol=1e-4, atol=1e-6)
        if "clipfrac" in out:
            np.testing.assert_allclose(held, out["clipfrac"], rtol=1e-5)
        count += 1
    assert count == 24


def batch():
    """Rows with one answer each; the last has none. What stands elsewhere in the critic's fields isn't read."""
    rng = np.random.default_rng(0)
    row = fields.fake(fields.spec(fields.group("text"), B, {"time": T}), V, packed=False)
    row["segment_ids"][1, 9:] = 0
    row["loss_mask"][1, 9:] = 0
    row["loss_mask"][3] = 0
    drawn = rng.standard_normal((2, B, T)).astype(np.float32)
    return row | dict(zip(("value", "returns"), drawn, strict=True))


@functools.cache
def results(owner, trunk, microbatches):
    """The gradient and the LossOut of a critic that is a head on `owner`'s trunk, or with "" a model of its own."""
    models = {"policy": POLICY, "critic": CRITIC._replace(of=owner)}
    own = {"head": CRITIC.specs["head"]} if owner else CRITIC.specs
    values = params.init({"policy": POLICY.specs, "critic": own}, KEYS[0])
    terms = objectives.load({"terms": {"value": {"clip": 0.5, "trunk": trunk}}})
    step = train.TrainStep(terms, models, optax.sgd(0.1), lambda t: t, microbatches)
    inputs = Inputs(KEYS[1], jnp.zeros((), jnp.int32), row_numbers(batch()), {})

    @jax.jit
    def compute(values, data):
        return *step.gradients(values, {}, data, inputs), critic_values(Forward(models, values, data))

    grads, outs, numbers = compute(values, batch())
    return grads, outs["value"], np.asarray(numbers)


def norm(tree):
    return float(optax.tree.norm(tree))


def test_the_loss_and_the_explained_variance():
    data, (_, out, values) = batch(), results("", True, 1)
    here = data["loss_mask"][:, 1:] * (data["segment_ids"][:, 1:] > 0) > 0
    v, old, returns = (x[:, :-1][here] for x in (values, data["value"], data["returns"]))
    error = np.maximum((v - returns) ** 2, (np.clip(v, old - 0.5, old + 0.5) - returns) ** 2) / 2
    np.testing.assert_allclose(out.loss_sum / out.weight, error.mean(), rtol=1e-5)
    explained, spread = out.metrics["explained_variance"]
    np.testing.assert_allclose(explained / spread, 1 - np.mean((v - returns) ** 2) / returns.var(), rtol=1e-4)
    assert float(out.weight) == here.sum()


def test_who_is_moved():
    grads, *_ = results("", True, 1)
    assert norm(grads["policy"]) == 0
    assert norm(grads["critic"]["embed"]) > 0
    grads, *_ = results("policy", True, 1)
    assert norm(grads["policy"]["embed"]) > 0
    assert norm(grads["critic"]) > 0
    grads, *_ = results("policy", False, 2)
    assert norm(grads["policy"]) == 0
    assert norm(grads["critic"]) > 0


def test_microbatches_change_nothing():
    (whole, out, _), (parts, same, _) = results("policy", True, 1), results("policy", False, 2)
    pairs = (whole["critic"], out), (parts["critic"], same)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-4, atol=1e-6), *pairs)


def test_refused():
    with pytest.raises(InputError, match=r"objective.terms.value.clip = 0: must be above 0"):
        objectives.load({"terms": {"value": {"clip": 0}}})
    values = params.init({"policy": POLICY.specs}, KEYS[0])
    with pytest.raises(InputError, match=r"roles.critic.num_labels = 0: a value is one number"):
        critic_values(Forward({"policy": POLICY, "critic": POLICY}, values, batch()))
