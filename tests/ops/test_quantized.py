"""Kernels in 4 and 8 bits against formulas in numpy, and what products with them give."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats

from research import params
from research.errors import InputError
from research.ops import quantized
from research.params import ParamSpec

# bitsandbytes (commit 01327aa), bitsandbytes/functional.py, get_4bit_type("nf4").
PUBLISHED = """-1.0 -0.6961928009986877 -0.5250730514526367 -0.39491748809814453 -0.28444138169288635
-0.18477343022823334
-0.09105003625154495 0.0 0.07958029955625534 0.16093020141124725 0.24611230194568634 0.33791524171829224
0.44070982933044434 0.5626170039176941 0.7229568362236023 1.0"""

SHAPES = {
    "q": ((2, 64, 3, 64), ("layers", "embed", "heads", "head_dim")),
    "o": ((2, 3, 16, 128), ("layers", "heads", "head_dim", "embed")),
    "up": ((2, 512, 96), ("layers", "embed", "mlp")),
    "experts": ((2, 3, 40, 64), ("layers", "experts", "embed", "mlp")),
}


def kernel_of(name, kind):
    shape, axes = SHAPES[name]
    specs = quantized.specs(ParamSpec(shape, axes, jax.nn.initializers.normal(0.02), ("embed",)), kind, name)
    x = jax.random.normal(jax.random.key(1), shape) * jnp.exp(
        jax.random.normal(jax.random.key(2), shape[:2] + (1,) * (len(shape) - 2))
    )
    return x, specs


def test_the_code_book_is_the_published_one_and_that_of_the_paper():
    """QLoRA's appendix E as bitsandbytes computes it (create_normal_map): quantiles of a normal distribution, evenly
    spaced in probability, eight above 0 and seven below, scaled to [-1, 1]."""
    published = np.array([float(x) for x in PUBLISHED.split()])
    np.testing.assert_array_equal(quantized.NF4, published)
    most = 0.9677083
    above = scipy.stats.norm.ppf(np.linspace(most, 0.5, 9)[:-1])
    below = -scipy.stats.norm.ppf(np.linspace(most, 0.5, 8)[:-1])
    derived = np.sort(np.concatenate([above, [0.0], below])) / above[0]
    np.testing.assert_allclose(quantized.NF4, derived, atol=2e-7)


def expected_nf4(x, specs):
    """Every block by itself."""
    table, block = np.array(quantized.NF4, np.float32), 2 * specs["nf4"].shape[-1]
    blocks = np.asarray(x).reshape(*x.shape[:-1], -1, block)
    largest = np.abs(blocks).max(-1)
    group = np.array(specs["scale"].shape) // np.array(specs["top"].shape)
    result = np.zeros(blocks.shape, np.float32)
    for at in np.ndindex(largest.shape):
        around = tuple(slice(i // g * g, i // g * g + g) for i, g in zip(at, group, strict=True))
        top = largest[around].max()
        scale = np.float32(max(np.round(255 * (largest[at] / top)), 1)) * (top / np.float32(255))
        distance = np.abs(blocks[at][:, None] / scale - table[None])
        result[at] = table[distance.argmin(-1)] * scale
    return result.reshape(x.shape)


def quantize(x, specs):
    return jax.jit(lambda x: quantized.quantize(x, specs))(x)


@pytest.mark.parametrize("name", SHAPES)
def test_nf4_takes_the_nearest_code_of_each_block(name):
    x, specs = kernel_of(name, "nf4")
    kernel = quantize(x, specs)
    assert {k: (v.shape, v.dtype) for k, v in kernel.items()} == {k: (s.shape, s.dtype) for k, s in specs.items()}
    np.testing.assert_allclose(jax.jit(quantized.dequantize)(kernel), expected_nf4(x, specs), rtol=1e-6, atol=1e-9)
    assert 0.08 < quantized.relative_error(kernel, x) < 0.1
    of_layer = quantize(x[1], specs)
    jax.tree.map(np.testing.assert_array_equal, of_layer, jax.tree.map(lambda w: w[1], kernel))


@pytest.mark.parametrize("name", SHAPES)
def test_int8_is_within_half_a_step(name):
    x, specs = kernel_of(name, "int8")
    kernel = quantize(x, specs)
    assert {k: (v.shape, v.dtype) for k, v in kernel.items()} == {k: (s.shape, s.dtype) for k, s in specs.items()}
    blocks = np.asarray(x).reshape(kernel["int8"].shape)
    step = np.abs(blocks).max(-1, keepdims=True) / 127
    error = np.abs(np.asarray(jax.jit(quantized.dequantize)(kernel)).reshape(blocks.shape) - blocks)
    assert (error <= step * 0.5001).all()
    assert quantized.relative_error(kernel, x) < 0.01


@pytest.mark.parametrize("kind", quantized.KINDS)
def test_zeros_stay_zeros_and_what_is_not_finite_shows(kind):
    x, specs = kernel_of("up", kind)
    zeros = quantized.dequantize(quantized.quantize(0 * x, specs))
    np.testing.assert_array_equal(zeros, 0 * x)
    broken = quantized.dequantize(quantized.quantize(x.at[0, 3, 5].set(jnp.nan), specs))
    assert not np.isfinite(broken[0, 3, :48]).any()
    assert np.isfinite(broken[1]).all()


def test_bytes_of_a_parameter():
    """Of kernels as large as those of real models NF4 takes 4.127 bits a parameter (QLoRA, section 3: 0.127 for the
    scales), and int8 with scales in float32 8.5."""
    for kind, bits in (("nf4", 4.127), ("int8", 8.5)):
        spec = ParamSpec((2, 512, 256), ("layers", "embed", "mlp"), jax.nn.initializers.zeros, ("embed",))
        tree = {"up": {"kernel": quantized.specs(spec, kind, "up")}}
        arrays = params.tree_map(lambda s: jnp.zeros(s.shape, s.dtype), tree)
        held = sum(x.nbytes for x in jax.tree.leaves(arrays))
        assert 8 * held / np.prod(spec.shape) == pytest.approx(bits, abs=5e-4)
        assert quantized.bytes_per_parameter(arrays) == held / np.prod(spec.shape)
        assert params.count(tree) == params.count(quantized.float_specs(tree)) == np.prod(spec.shape)
        assert quantized.float_specs(tree) == {"up": {"kernel": spec}}


def test_an_axis_that_can_not_be_cut_is_named():
    spec = ParamSpec((2, 16, 74), ("layers", "embed", "mlp"), jax.nn.initializers.zeros, ("embed",))
    with pytest.raises(InputError, match=r"frozen_dtype = 'nf4': the last axis of layers/up/kernel has 74 numbers"):
        quantized.held_in({"layers": {"up": {"kernel": spec}}}, "nf4")


@pytest.mark.parametrize("kind", quantized.KINDS)
def test_products_and_their_gradients_are_those_of_the_dequantised_kernel(kind):
    w, specs = kernel_of("o", kind)
    kernel = quantized.quantize(w[0], specs)
    x, g = (jax.random.normal(jax.random.key(i), shape) for i, shape in ((3, (2, 5, 3, 16)), (4, (2, 5, 128))))
    y, pullback = jax.vjp(lambda x: quantized.product(x, kernel, 2), x)
    expected, back = jax.vjp(lambda x: jnp.tensordot(x, quantized.dequantize(kernel), 2), x)
    np.testing.assert_allclose(y, expected, rtol=1e-5, atol=1e-4)
    np.testing.assert_allclose(pullback(g)[0], back(g)[0], rtol=1e-5, atol=1e-4)
    w, specs = kernel_of("experts", kind)
    kernel, sizes = quantized.quantize(w[1], specs), jnp.array([2, 0, 5], jnp.int32)
    whole = quantized.dequantize(quantized.with_whole_scales(kernel))
    np.testing.assert_array_equal(whole, quantized.dequantize(kernel))
    x, g = (jax.random.normal(jax.random.key(i), shape) for i, shape in ((5, (7, 40)), (6, (7, 64))))
    y, pullback = jax.vjp(lambda x: quantized.product_by_expert(x, kernel, sizes), x)
    expected, back = jax.vjp(
        lambda x: jnp.einsum("mi,mio->mo", x, jnp.repeat(whole, sizes, axis=0, total_repeat_length=7)), x
    )
    np.testing.assert_allclose(y, expected, rtol=1e-5, atol=1e-4)
    np.testing.assert_allclose(pullback(g)[0], back(g)[0], rtol=1e-5, atol=1e-4)
