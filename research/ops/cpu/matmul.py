"""Tokens times a kernel, with a gradient that suits the platform."""

import functools
import math

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float

from research.devices import sharding


def matmul(
    x: Float[Array, "*rows_in"], kernel: Float[Array, "*in_out"], contract: int = 1
) -> Float[Array, "*rows_out"]:
    """x [*rows, *in] times kernel [*in, *out] -> [*rows, *out], in their dtype.

    Rematerialisation policies know the result by the name "linear". On a CPU the gradient is in reverse mode only.

    Args:
      x, kernel: floating, of one dtype.
      contract: the number of axes of *in.
    """
    return checkpoint_name(product(x, kernel, contract), "linear")


def product(
    x: Float[Array, "*rows_in"], kernel: Float[Array, "*in_out"], contract: int = 1
) -> Float[Array, "*rows_out"]:
    """The same for a part of a sum, which has no name."""
    return _cpu(contract, x, kernel) if sharding.platform() == "cpu" else jnp.tensordot(x, kernel, axes=contract)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _cpu(contract: int, x: Float[Array, "*rows_in"], kernel: Float[Array, "*in_out"]) -> Float[Array, "*rows_out"]:
    return jnp.tensordot(x, kernel, axes=contract)


def _cpu_forward(contract, x, kernel):
    return jnp.tensordot(x, kernel, axes=contract), (x, kernel)


def _cpu_backward(contract, residuals, dy):
    x, kernel = residuals
    rows, out = x.ndim - contract, kernel.ndim - contract
    dx = jax.lax.dot_general(dy, kernel, ((range(rows, dy.ndim), range(contract, kernel.ndim)), ((), ())))
    # XLA transposes the operand that it likes, and fuses that with what made it: an activation's gradient, read against
    # the grain. So the smaller operand is transposed here, and by itself.
    ins, outs = math.prod(kernel.shape[:contract]), math.prod(kernel.shape[contract:])
    if ins <= outs:
        dkernel = _by_tokens(x, dy, rows)
    else:
        dkernel = _by_tokens(dy, x, rows).transpose((*range(out, out + contract), *range(out)))
    return dx, dkernel


def _by_tokens(a: Float[Array, "*rows_m"], b: Float[Array, "*rows_n"], rows: int) -> Float[Array, "*m_n"]:
    """a [*rows, *m], b [*rows, *n] -> [*m, *n]; `rows` counts the axes that are summed over."""
    m = a.ndim - rows
    a = jax.lax.optimization_barrier(a.transpose((*range(rows, a.ndim), *range(rows))))
    return jax.lax.dot_general(a, b, ((range(m, a.ndim), range(rows)), ((), ())))


_cpu.defvjp(_cpu_forward, _cpu_backward)
