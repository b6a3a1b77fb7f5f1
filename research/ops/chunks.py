"""How token-level losses cut time into chunks, so that the logits of only one are held at once."""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp

from research import sharding

# A chunk's float32 logits on one device take at most this much; the gradient needs twice that.
CHUNK_BYTES = 256 * 2**20
# Tokens of a chunk on one device: enough for the matrix products to outweigh the reading and writing of the kernel's
# gradient [D, V], which each chunk adds to. On a CPU more of them only leave the cache.
CHUNK_TOKENS = {"cpu": 512, "gpu": 2048, "tpu": 2048}


def chunk_size(hidden: jax.Array, logits_per_token: int, tokens: int | None = None) -> int:
    """As many positions as CHUNK_TOKENS and CHUNK_BYTES allow on each device of the mesh in context.

    Args:
      hidden: [B, T, D].
      logits_per_token: V, of all heads that a chunk has the logits of.
      tokens: of a chunk on one device; by default CHUNK_TOKENS, and at least D.
    """
    B, T, D = hidden.shape
    tokens = tokens or max(D, CHUNK_TOKENS.get(sharding.platform(), 2048))
    rows = B / sharding.num_parts(sharding.RULES["batch"]) / _time_parts(T)
    bytes_per_token = 4 * logits_per_token / sharding.num_parts(sharding.RULES["vocab"])
    return int(max(1, min(T, min(tokens, CHUNK_BYTES / bytes_per_token) // rows)))


def chunks(T: int, size: int) -> tuple[Callable[[jax.Array], jax.Array], Callable[[jax.Array], jax.Array]]:
    """Returns split: [B, T, ...] -> [n, B, t, ...], padded with zeros, with t about `size`; and join, the way back.

    Where time is sharded, every chunk has a piece of each shard, so that all devices have work at each.
    """
    shards = _time_parts(T)
    n = math.ceil(T / size)
    local, piece = T // shards, math.ceil(T / shards / n)

    def split(x: jax.Array) -> jax.Array:
        x = x.reshape(x.shape[0], shards, local, *x.shape[2:])
        x = jnp.pad(x, [(0, 0), (0, 0), (0, n * piece - local)] + [(0, 0)] * (x.ndim - 3))
        x = jnp.moveaxis(x.reshape(x.shape[0], shards, n, piece, *x.shape[3:]), 2, 0)
        return x.reshape(n, x.shape[1], shards * piece, *x.shape[4:])

    def join(x: jax.Array) -> jax.Array:
        x = jnp.moveaxis(x.reshape(n, x.shape[1], shards, piece, *x.shape[3:]), 0, 2)
        x = x.reshape(x.shape[0], shards, n * piece, *x.shape[4:])[:, :, :local]
        return x.reshape(x.shape[0], T, *x.shape[3:])

    return split, join


def _time_parts(T: int) -> int:
    """Shards of the time axis; 1 where they don't divide it, and the partitioner pads."""
    parts = sharding.num_parts(sharding.RULES["time"])
    return 1 if T % parts else parts
