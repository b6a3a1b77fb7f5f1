"""Products of linear maps in 8 bits, with a gradient.

Of the three products of a map, its output x W and the gradient of x are sums of products of 8-bit numbers; the gradient
of W, a sum over all tokens, stays in the dtype of x, as in SwitchBack (arXiv:2304.13013, section 2). So no token has a
part in how another is rounded: microbatched = full batch. Each operand is scaled so that the largest magnitude among
the numbers that are summed up together is the largest of its 8-bit type, and so nothing saturates: a scale for each
token and for each column of the kernel, and for the gradient of x for each token and each row.

On a CPU this is an emulation: operands are rounded to 8 bits, and multiplied in float32, which takes longer.

How much is lost is counted in the backward pass, where inputs and gradients are both at hand, and comes out as the
gradient of a probe: an operand that no result depends on.
"""

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Float32

from research.devices import sharding
from research.ops.cpu import matmul

# Of ModelConfig.precision: the types of inputs and kernels, and of gradients (arXiv:2209.05433, section 3).
KINDS = {"int8": (jnp.int8, jnp.int8), "fp8": (jnp.float8_e4m3fn, jnp.float8_e5m2)}
# The gradient of a probe counts, of a product's inputs and then of the gradients of its outputs, the numbers that are
# rounded to 0, those that get the largest code, and all that aren't 0.
COUNTS = 6


def quantize(x: Float[Array, "..."], axes: Sequence[int], dtype: Any) -> tuple[Array, Float[Array, "..."]]:
    """Numbers in 8 bits, and the scale that they are multiples of.

    Args:
      x: floating.
      axes: over these the largest magnitude is taken, which becomes the largest number of the type.
      dtype: an 8-bit type.

    Returns:
      values: in `dtype`.
      scale: float32, of the shape of x, with 1 in `axes`. NaN or infinite where not all of x is finite.
    """
    axes, x = tuple(axes), x.astype(jnp.float32)
    whole, top = jnp.issubdtype(dtype, jnp.integer), _top(dtype)
    # XLA's maximum may pass over NaN.
    largest = jnp.where(
        jnp.all(jnp.isfinite(x), axis=axes, keepdims=True), jnp.max(jnp.abs(x), axis=axes, keepdims=True), jnp.nan
    )
    scale = largest / top
    y = jnp.clip(x / jnp.where(scale == 0, 1, scale), -top, top)
    return (jnp.round(y) if whole else y).astype(dtype), scale


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def product(
    kind: str,
    contract: int,
    x: Float[Array, "*rows_in"],
    kernel: Float[Array, "*in_out"],
    probe: Float32[Array, " 6"] | None = None,
) -> Float[Array, "*rows_out"]:
    """x [*rows, *in] times kernel [*in, *out] -> [*rows, *out], in the dtype of x. The gradient is that of the product
    without rounding, by the products above.

    Args:
      kind: of KINDS.
      contract: the number of axes of *in.
      x, kernel: floating.
      probe: gets the counts as its gradient, see COUNTS: where its numbers are 1; where they are 0 nothing is counted.
    """
    rows, dtype = x.ndim - contract, KINDS[kind][0]
    return _dot(
        quantize(x, range(rows, x.ndim), dtype),
        quantize(kernel, range(contract), dtype),
        (range(rows, x.ndim), range(contract)),
    ).astype(x.dtype)


def _forward(kind, contract, x, kernel, probe):
    return product(kind, contract, x, kernel), (x, kernel, probe)


def _backward(kind, contract, residuals, dy):
    x, kernel, probe = residuals
    rows = x.ndim - contract
    over = range(rows, dy.ndim), range(contract, kernel.ndim)
    dtype, of_gradients = KINDS[kind]
    dx = _dot(quantize(dy, over[0], of_gradients), quantize(kernel, over[1], dtype), over)
    dkernel = jax.vjp(lambda w: matmul.product(x, w.astype(x.dtype), contract), kernel)[1](dy)[0]
    if probe is None:
        return dx.astype(x.dtype), dkernel, None

    def count() -> Float32[Array, " 6"]:
        inputs = _counts(x, quantize(x, range(rows, x.ndim), dtype)[0])
        return jnp.stack(inputs + _counts(dy, quantize(dy, over[0], of_gradients)[0]))

    return dx.astype(x.dtype), dkernel, jax.lax.cond(probe[0] > 0, count, lambda: jnp.zeros_like(probe))


def _counts(x: Float[Array, "..."], codes: Array) -> list[Float32[Array, ""]]:
    """Half of COUNTS, of numbers and their codes."""
    there, magnitudes = x != 0, jnp.abs(codes.astype(jnp.float32))
    return [jnp.sum(y, dtype=jnp.float32) for y in (there & (magnitudes == 0), magnitudes == _top(codes.dtype), there)]


def _top(dtype: Any) -> float:
    """The largest number of an 8-bit type."""
    return float(jnp.iinfo(dtype).max if jnp.issubdtype(dtype, jnp.integer) else jnp.finfo(dtype).max)


product.defvjp(_forward, _backward)


def _dot(
    a: tuple[Array, Array], b: tuple[Array, Array], over: tuple[Sequence[int], Sequence[int]]
) -> Float[Array, "..."]:
    """The product of two operands of `quantize`, summed over these axes of each, in float32."""
    (a, scale_a), (b, scale_b) = a, b
    dims = (tuple(map(tuple, over)), ((), ()))
    if sharding.platform() == "cpu":
        y = jax.lax.dot_general(a.astype(jnp.float32), b.astype(jnp.float32), dims)
    else:
        whole = jnp.issubdtype(a.dtype, jnp.integer)
        y = jax.lax.dot_general(a, b, dims, preferred_element_type=jnp.int32 if whole else jnp.float32)
    left, right = a.ndim - len(over[0]), b.ndim - len(over[1])
    scale_a = jnp.squeeze(scale_a, tuple(over[0])).reshape(*y.shape[:left], *(1,) * right)
    scale_b = jnp.squeeze(scale_b, tuple(over[1])).reshape(*(1,) * left, *y.shape[left:])
    return y.astype(jnp.float32) * scale_a * scale_b
