"""The part of a batch with the highest values: which tokens or documents of it are worth learning from."""

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float


def top_share(values: Float[Array, "B X"], counted: Bool[Array, "B X"], share: float) -> Bool[Array, "B X"]:
    """The counted places with the highest values: round(share n) of the n that count, at least one.

    Of equal values the first in order comes first, so that the number is exact. NaN comes last.
    """
    order = jnp.argsort(jnp.where(counted, -values, jnp.inf).reshape(-1), stable=True)
    ranks = jnp.zeros(order.shape, jnp.int32).at[order].set(jnp.arange(order.size, dtype=jnp.int32))
    total = jnp.sum(counted)
    count = jnp.maximum(jnp.floor(share * total.astype(jnp.float32) + 0.5).astype(jnp.int32), 1)
    return counted & (ranks.reshape(values.shape) < count)
