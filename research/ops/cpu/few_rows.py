"""Products of few rows and a kernel on a CPU, such as those of decoding.

XLA's library copies a kernel into tiles of its own at each product, which for few rows takes as long as the product
and reads and writes memory three times. Of a kernel that lies in blocks of a few columns, each block is copied within
the cache.

Axes: n blocks, I inputs, C columns of a block.
"""

import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from research.devices import sharding

COLUMNS = 32  # C
MOST_ROWS = 8  # of more, the copy is small beside the product
_LEAST = 2**14  # numbers in a kernel that is worth it


def blocks(kernel: Float[Array, "..."], contract: int = 1) -> Float[Array, "n I C"] | None:
    """A kernel [*in, *out] in blocks; None where it isn't of float32, has few numbers, or its columns make no whole
    blocks."""
    inputs, outputs = math.prod(kernel.shape[:contract]), math.prod(kernel.shape[contract:])
    if kernel.dtype != jnp.float32 or outputs % COLUMNS or kernel.size < _LEAST:
        return None
    return kernel.reshape(inputs, outputs // COLUMNS, COLUMNS).swapaxes(0, 1)


def apply(rows: int) -> bool:
    """Whether products of so many rows are faster with blocks. One row's read a kernel as it lies."""
    mesh = jax.sharding.get_abstract_mesh()
    return 1 < rows <= MOST_ROWS and sharding.platform() == "cpu" and (mesh.empty or mesh.size == 1)


def product(x: Float[Array, "*rows_in"], blocks: Float[Array, "n I C"], contract: int = 1) -> Float[Array, "*rows O"]:
    """x [*rows, *in] times a kernel in blocks -> [*rows, O]."""
    n, inputs, columns = blocks.shape
    rows = x.reshape(-1, inputs)
    each = jnp.broadcast_to(rows[None], (n, *rows.shape))
    y = jax.lax.dot_general(each, blocks, (((2,), (1,)), ((0,), (0,))))
    return y.swapaxes(0, 1).reshape(*x.shape[: x.ndim - contract], n * columns)
