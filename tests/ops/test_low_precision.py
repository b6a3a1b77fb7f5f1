"""Products in 8 bits beside numpy's with the types of ml_dtypes; what is refused."""

import dataclasses

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import optax
import pytest

from research import config, objectives, params, train
from research.devices import sharding
from research.errors import InputError
from research.models.config import ModelConfig
from research.models.transformer import make_model
from research.ops import low_precision

TYPES = {"int8": (np.int8,) * 2, "fp8": (ml_dtypes.float8_e4m3fn, ml_dtypes.float8_e5m2)}
TOPS = {np.int8: 127.0, ml_dtypes.float8_e4m3fn: 448.0, ml_dtypes.float8_e5m2: 57344.0}


@pytest.fixture(scope="module")
def arrays():
    rng = np.random.default_rng(0)
    shapes = {"x": (2, 6, 8), "kernel": (8, 2, 3), "dy": (2, 6, 2, 3)}
    return {name: rng.normal(size=shape).astype(np.float32) ** 3 for name, shape in shapes.items()}


def rounded(x, axes, dtype):
    scale = (np.max(np.abs(x), axis=axes, keepdims=True) / TOPS[dtype]).astype(np.float32)
    y = x / scale
    return (np.round(y) if dtype == np.int8 else y).astype(dtype).astype(np.float32) * scale


def value_and_gradients(kind, arrays):
    y, vjp = jax.vjp(lambda x, w: low_precision.product(kind, 1, x, w), arrays["x"], arrays["kernel"])
    return y, *vjp(jnp.asarray(arrays["dy"]))


@pytest.mark.parametrize("kind", low_precision.KINDS)
def test_products_are_those_of_rounded_operands(kind, arrays):
    forward, backward = TYPES[kind]
    x, w, dy = arrays["x"], arrays["kernel"], arrays["dy"]
    y, dx, dw = jax.jit(lambda arrays: value_and_gradients(kind, arrays))(arrays)
    np.testing.assert_allclose(
        y, np.einsum("bti,ikh->btkh", rounded(x, 2, forward), rounded(w, 0, forward)), rtol=1e-4, atol=1e-4
    )
    expected = np.einsum("btkh,ikh->bti", rounded(dy, (2, 3), backward), rounded(w, (1, 2), forward))
    np.testing.assert_allclose(dx, expected, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(dw, np.einsum("bti,btkh->ikh", x, dy), rtol=1e-4, atol=1e-4)
    whole = np.einsum("bti,ikh->btkh", x, w)
    assert 1e-4 < np.linalg.norm(y - whole) / np.linalg.norm(whole) < (0.02 if kind == "int8" else 0.05)


def counts(x, axes, dtype):
    codes = np.abs((rounded(x, axes, dtype) / np.max(np.abs(x), axis=axes, keepdims=True)).astype(np.float32))
    return [np.sum((x != 0) & (codes == 0)), np.sum(np.isclose(codes, 1, rtol=1e-5)), np.sum(x != 0)]


@pytest.mark.parametrize("kind", low_precision.KINDS)
def test_a_probe_counts_what_is_lost_where_it_is_1(kind, arrays):
    x, dy = (arrays[name] ** 3 for name in ("x", "dy"))  # of many magnitudes
    x[0, 0, 0] = 0
    forward, backward = TYPES[kind]
    f = jax.jit(
        jax.grad(lambda probe: jnp.vdot(low_precision.product(kind, 1, x, arrays["kernel"], probe), jnp.asarray(dy)))
    )
    expected = counts(x, 2, forward) + counts(dy, (2, 3), backward)
    np.testing.assert_array_equal(f(jnp.ones(low_precision.COUNTS)), expected)
    assert expected[0] > 0 or kind == "fp8"
    np.testing.assert_array_equal(f(jnp.zeros(low_precision.COUNTS)), 0)


@pytest.mark.slow
def test_a_step_measures_what_is_lost_where_a_line_of_the_log_is_due():
    c = ModelConfig(vocab_size=64, num_layers=2, d_model=16, num_heads=2, num_kv_heads=1, d_ff=32, precision="int8")
    model, optimizer = make_model(c), optax.sgd(0.1)
    initial = jax.jit(lambda key: params.init(model.specs, key))(jax.random.PRNGKey(0))
    tokens = jnp.asarray(np.random.default_rng(0).integers(0, 64, (4, 12)), jnp.int32)
    positions = jnp.tile(jnp.arange(12, dtype=jnp.int32)[None], (4, 1))
    batch = {"tokens": tokens, "segment_ids": jnp.ones_like(tokens), "positions": positions}
    terms = objectives.load({"terms": {"next_token": 1.0}})
    step = jax.jit(train.TrainStep(terms, {"policy": model}, optimizer, lambda t: jnp.ones(()), log_every=2))
    state = train.init_state({"policy": initial}, optimizer, jax.random.PRNGKey(1))
    state, first = step(state, {}, batch)
    _, second = step(state, {}, batch)
    whole = train.means([second])
    assert first["underflow/inputs"][1] == 0
    tokens = 2 * 4 * 12  # of two layers; and widths of q, k, v, o, up, gate and down
    assert second["saturated/inputs"][1] == (6 * 16 + 32) * tokens
    assert 0 < second["saturated/gradients"][1] <= (16 + 8 + 8 + 16 + 32 + 32 + 16) * tokens
    for name in ("inputs", "gradients"):
        assert 0 < whole[f"underflow/{name}"] < 0.2
        assert 1 / 32 < whole[f"saturated/{name}"] < 0.2  # the largest of each token, of at most 32 numbers


def test_zeros_stay_zero_and_what_is_not_finite_is_seen(arrays):
    x = arrays["x"].copy()
    x[0, 0], x[1, 1, 2], x[1, 2, 3] = 0, np.nan, np.inf
    for kind in low_precision.KINDS:
        y = low_precision.product(kind, 1, jnp.asarray(x), jnp.asarray(arrays["kernel"]))
        assert not np.any(y[0, 0])
        assert np.all(np.isnan(y[1, 1:3]))
        assert np.all(np.isfinite(y[0]))


def test_over_devices_a_product_is_the_same(arrays):
    mesh = sharding.make_mesh({"data": 2, "tensor": 2}, jax.devices()[:4])
    place = lambda x, *axes: jax.device_put(x, jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(*axes)))  # noqa: E731
    cut = {
        "x": place(arrays["x"], "data", None, "tensor"),
        "kernel": place(arrays["kernel"], "tensor", "data"),
        "dy": place(arrays["dy"], "data", None, "tensor"),
    }
    f = jax.jit(lambda arrays: value_and_gradients("fp8", arrays))
    with jax.set_mesh(mesh):
        outs = f(cut)
    for ours, whole in zip(outs, f(arrays), strict=True):
        np.testing.assert_allclose(ours, whole, rtol=1e-5, atol=1e-5)


def test_a_model_rounds_the_maps_of_its_layers_and_no_others():
    """Of 8-bit values of tokens and kernels there are two for each map; the head is none of them."""
    c = ModelConfig(vocab_size=64, num_layers=1, d_model=16, num_heads=2, num_kv_heads=1, d_ff=24, precision="fp8")
    model = make_model(c)
    batch = {name: jax.ShapeDtypeStruct((2, 8), jnp.int32) for name in ("tokens", "segment_ids", "positions")}
    shapes = jax.tree.map(
        lambda s: jax.ShapeDtypeStruct(s.shape, jnp.float32), model.specs, is_leaf=lambda s: hasattr(s, "contracts")
    )
    text = str(jax.make_jaxpr(lambda p, b: model.unembed(p).logits(model.hidden(p, b)))(shapes, batch))
    assert text.count("new_dtype=float8_e4m3fn") == 2 * 7  # q, k, v, o, up, gate, down
    plain = make_model(dataclasses.replace(c, precision="dtype"))
    assert "float8" not in str(jax.make_jaxpr(plain.hidden)(shapes, batch))


def test_what_does_not_go_together_is_refused():
    with pytest.raises(InputError, match=r"model.precision = 'int8': experts multiply in model.dtype alone"):
        ModelConfig(vocab_size=64, num_experts=2, precision="int8")
    with pytest.raises(InputError, match=r"model.precision = 'fp16': no such choice"):
        ModelConfig(vocab_size=64, precision="fp16")
    held = config.parse({**config.defaults(), "frozen_dtype": "nf4", "model": {"precision": "fp8"}})
    with pytest.raises(InputError, match=r"model.precision = 'fp8': rounds kernels to 8 bits for each product"):
        config.check(held, num_devices=1)
