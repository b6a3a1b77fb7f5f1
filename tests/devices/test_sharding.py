"""Rules that an experiment overrides reach every constraint: models, losses and decoding lay out as they say."""

import functools
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from research import params
from research.devices import sharding
from research.errors import InputError
from research.evals import scoring
from research.models.config import ModelConfig
from research.models.transformer import make_model
from research.ops import divergences, losses, matching

B, T, V = 8, 10, 176
CONFIG = ModelConfig(
    vocab_size=V, num_layers=1, d_model=16, num_heads=4, num_kv_heads=2, d_ff=48, max_length=T, tie_embeddings=False
)
MESH = {"data": 2, "fsdp": 2, "tensor": 2}
# Overrides of RULES, and what then lies on a device: rows of the batch, tokens of the vocabulary, and MLP units.
ROWS_ALONE = {"batch": ("data", "fsdp", "expert", "tensor"), "vocab": None, "mlp": None, "heads": None}
ROWS_ALONE |= {"kv_heads": None}
WIDE = {"batch": ["data"], "vocab": ("fsdp", "tensor"), "embed": None, "mlp": ("fsdp", "tensor")}
LAYOUTS = {"default": ({}, (2, 88, 24)), "rows alone": (ROWS_ALONE, (1, 176, 48)), "wide": (WIDE, (4, 44, 12))}


@pytest.fixture(scope="module")
def batch():
    rng = np.random.default_rng(0)
    tokens = jnp.asarray(rng.integers(0, V, (B, T)), jnp.int32)
    positions = jnp.broadcast_to(jnp.arange(T, dtype=jnp.int32), (B, T))
    weights = jnp.asarray(rng.random((B, T)) < 0.7, jnp.float32)
    return {"tokens": tokens, "segment_ids": jnp.ones_like(tokens), "positions": positions, "weights": weights}


def total_loss(model, values, batch):
    """Losses of every kind that ops lays out, together."""
    hidden, head, weights = model.hidden(values, batch), model.unembed(values), batch["weights"]
    teacher = jax.lax.stop_gradient(hidden[..., ::-1])
    log_probs = losses.log_probs(hidden, head, batch["tokens"])
    heads = tuple(hidden.reshape(B, T, 4, 4) for _ in range(2))
    relation = matching.relation_divergence(
        heads, (heads[0][..., ::-1],) * 2, batch["segment_ids"], weights, heads=4, rules=model.rules
    )
    return (
        losses.cross_entropy(hidden, head, batch["tokens"], weights).loss_sum
        + divergences.divergence(hidden, head, teacher, head, weights, kind="jsd").divergence_sum
        + jnp.sum(weights * (log_probs.target**2 + log_probs.entropy))
        + relation
    )


@functools.cache
def single():
    model = make_model(CONFIG)
    return params.init(model.specs, jax.random.key(0))


def local_shapes(text):
    """Shapes of all float32 arrays in a compiled program, as they lie on one device."""
    return {tuple(map(int, dims.split(","))) for dims in re.findall(r"\bf32\[([\d,]+)\]", text)}


@pytest.mark.slow
@pytest.mark.parametrize("name", LAYOUTS)
def test_losses_and_gradients_are_those_of_one_device_and_lie_as_the_rules_say(batch, name):
    overrides, (rows, tokens, units) = LAYOUTS[name]
    rules = sharding.make_rules(overrides)
    model, values = make_model(CONFIG, rules), single()
    f = jax.value_and_grad(functools.partial(total_loss, model))
    expected = jax.jit(jax.value_and_grad(functools.partial(total_loss, make_model(CONFIG))))(values, batch)
    mesh = sharding.make_mesh(MESH)
    with jax.set_mesh(mesh):
        placed = jax.device_put(values, params.shardings(model.specs, mesh, rules))
        rows_placed = jax.device_put(batch, sharding.named(mesh, ("batch", "time"), rules))
        compiled = jax.jit(f).lower(placed, rows_placed).compile()
        total, gradients = compiled(placed, rows_placed)
    np.testing.assert_allclose(total, expected[0], rtol=1e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=2e-5), gradients, expected[1])

    shapes = local_shapes(compiled.as_text())
    logits = {s for s in shapes if s[-1] in (V, V // 2, V // 4) and math.prod(s[:-1]) % (rows * T) == 0}
    assert {s[-1] for s in logits} == {tokens}, shapes
    mlp = {s for s in shapes if s[-1] in (48, 24, 12) and math.prod(s[:-1]) == rows * T}
    assert {s[-1] for s in mlp} == {units}, shapes


def test_scoring_lays_out_batches_by_the_rules_of_its_model(batch):
    model = make_model(CONFIG, ROWS_ALONE)
    batch = {**batch, "targets": batch["tokens"]}
    mesh = sharding.make_mesh(MESH)
    expected = jax.jit(functools.partial(scoring.token_logprobs, make_model(CONFIG)))(single(), batch)
    with jax.set_mesh(mesh):
        placed = jax.device_put(single(), params.shardings(model.specs, mesh, model.rules))
        compiled = jax.jit(functools.partial(scoring.token_logprobs, model)).lower(placed, batch).compile()
        np.testing.assert_allclose(compiled(placed, batch), expected, rtol=1e-5, atol=1e-5)
    shapes = local_shapes(compiled.as_text())
    assert any(math.prod(s) == T * V and s[-1] == V for s in shapes), shapes
    assert not any(s[-1] == V // 2 for s in shapes)


def test_rules_are_those_of_the_table_but_for_the_overrides():
    rules = sharding.make_rules({"batch": ["data", "tensor"]})  # JSON's lists
    assert rules["batch"] == ("data", "tensor")
    assert {**rules, "batch": None} == {**sharding.RULES, "batch": None}
    assert sharding.make_rules(rules) == rules
    assert hash(sharding.make_rules({})) == hash(sharding.RULES)
    with pytest.raises(
        InputError, match=r"rules\.time = 'sequence': .* axes batch, time, and 'batch' .* mesh\.sequence"
    ):
        sharding.partition(("batch", "time", None), sharding.make_rules({"batch": ["data", "sequence"]}))
    with pytest.raises(InputError, match="'embed' has size 3"):
        sharding.named(sharding.make_mesh(MESH), ("embed",), rules, shape=(3,))
