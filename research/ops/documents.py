"""Sums over the documents that are packed into rows.

Each token has the number of its document in the row; a number that isn't in [0, N) is of none. A sum is a comparison of
all tokens with all numbers, which XLA fuses into one loop: it is the same on every run, as scattered additions on a GPU
aren't, and time may be sharded.

Axes: B batch, T time, N documents of a row.
"""

import jax.numpy as jnp
from jaxtyping import Array, Bool, Int, Shaped


def sums(values: Shaped[Array, "B T"], number: Int[Array, "B T"], count: int) -> Shaped[Array, "B N"]:
    """The sum of each document's values; 0 of one that has no tokens. Integers wrap around."""
    return jnp.sum(jnp.where(_of(number, count), values[:, :, None], 0), axis=1, dtype=values.dtype)


def least(values: Shaped[Array, "B T"], number: Int[Array, "B T"], count: int) -> Shaped[Array, "B N"]:
    """The least of each document's values; infinity of one that has no tokens."""
    return jnp.min(jnp.where(_of(number, count), values[:, :, None], jnp.inf), axis=1)


def spread(values: Shaped[Array, "B N"], number: Int[Array, "B T"]) -> Shaped[Array, "B T"]:
    """Each document's value at all of its tokens; 0 where there is none."""
    return jnp.sum(jnp.where(_of(number, values.shape[1]), values[:, None, :], 0), axis=2, dtype=values.dtype)


def order(counted: Shaped[Array, "B T"], number: Int[Array, "B T"], count: int) -> Shaped[Array, "B T"]:
    """How many tokens of its document are counted up to each token, itself included.

    Args:
      counted: 1 at the tokens that count, else 0.
      number, count: of `sums`; a document's counted tokens have no other document's between them.
    """
    up_to = jnp.cumsum(counted, axis=1)
    first = least(up_to - counted, jnp.where(counted > 0, number, count), count)
    return up_to - spread(jnp.where(jnp.isfinite(first), first, 0), number)


def _of(number: Int[Array, "B T"], count: int) -> Bool[Array, "B T N"]:
    return number[:, :, None] == jnp.arange(count, dtype=number.dtype)[None, None, :]
