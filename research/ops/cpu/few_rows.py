"""Products of few rows and a kernel on a CPU, such as those of decoding.

XLA's library copies its second operand into tiles at each product. Where that is the kernel, it takes as long as the
product of few rows. So the kernel stands first, turned, and the rows are what is copied.

Axes: I inputs, O outputs.
"""

import math

import jax
from jaxtyping import Array, Float

from research.devices import sharding

MOST_ROWS = 32  # of more, the copy of the kernel is small beside the product


def apply(rows: int) -> bool:
    """Whether products of so many rows are faster with turned kernels. One row's read a kernel as it lies."""
    mesh = jax.sharding.get_abstract_mesh()
    return 1 < rows <= MOST_ROWS and sharding.platform() == "cpu" and (mesh.empty or mesh.size == 1)


def turned(kernel: Float[Array, "*in_out"], contract: int = 1) -> Float[Array, "*out_in"]:
    """A kernel [*in, *out] with its inputs last; `contract` is the number of axes of *in."""
    return kernel.transpose((*range(contract, kernel.ndim), *range(contract)))


def product(
    x: Float[Array, "*rows_in"], turned: Float[Array, "*out_in"], contract: int = 1
) -> Float[Array, "*rows_out"]:
    """x [*rows, *in] times a turned kernel [*out, *in] -> [*rows, *out]. Of many rows too, then as any product."""
    inputs = math.prod(turned.shape[turned.ndim - contract :])
    rows, kernel = x.reshape(-1, inputs), turned.reshape(-1, inputs)
    over = ((1,), (1,)), ((), ())
    if len(rows) <= MOST_ROWS:
        # XLA would take the transpose of a product for the product with its operands exchanged.
        y = jax.lax.optimization_barrier(jax.lax.dot_general(kernel, rows, over)).T
    else:
        y = jax.lax.dot_general(rows, kernel, over)
    return y.reshape(*x.shape[: x.ndim - contract], *turned.shape[: turned.ndim - contract])
