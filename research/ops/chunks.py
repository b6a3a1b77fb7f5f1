"""How token-level losses cut time into chunks, so that the logits of only one are held at once."""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from research.devices import sharding

# A chunk's float32 logits on one device take at most this much. On a CPU their gradient takes as much again, and so
# does its copy where the kernel is the transpose of an embedding. Elsewhere the gradient takes half, and fewer tokens
# would leave the time to the reading and writing below.
_CHUNK_BYTES = {"cpu": 80 * 2**20, "gpu": 256 * 2**20, "tpu": 256 * 2**20}
# Tokens of a chunk on one device: enough for the matrix products to outweigh the reading and writing of the kernel's
# gradient [D, V], which each chunk adds to. On a CPU more of them only leave the cache.
_CHUNK_TOKENS = {"cpu": 512, "gpu": 2048, "tpu": 2048}


def chunk_bytes() -> int:
    """The most that a chunk's logits may take on one device of the platform, in bytes."""
    return _CHUNK_BYTES.get(sharding.platform(), _CHUNK_BYTES["gpu"])


def chunk_tokens() -> int:
    """The most tokens that a chunk has on one device of the platform, where few dimensions make them cheap."""
    return _CHUNK_TOKENS.get(sharding.platform(), _CHUNK_TOKENS["gpu"])


def chunk_size(hidden: jax.Array, logits_per_token: int, tokens: int | None = None) -> int:
    """As many positions as `chunk_tokens` and `chunk_bytes` allow on each device of the mesh in context.

    Args:
      hidden: [B, T, D].
      logits_per_token: V, of all heads that a chunk has the logits of.
      tokens: of a chunk on one device; by default `chunk_tokens`, and at least D.
    """
    B, T, D = hidden.shape
    tokens = tokens or max(D, chunk_tokens())
    rows = B / sharding.num_parts(sharding.RULES["batch"]) / _time_parts(T)
    bytes_per_token = 4 * logits_per_token / sharding.num_parts(sharding.RULES["vocab"])
    return int(max(1, min(T, min(tokens, chunk_bytes() / bytes_per_token) // rows)))


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


def whole_width(kernel: jax.Array, axes: str) -> jax.Array:
    """A head's kernel ("dv" or "vd") with all of D on each device: gathered here once, and not in every chunk."""
    return sharding.constrain(kernel, [{"d": None, "v": "vocab"}[axis] for axis in axes])


def token_shards(hidden: jax.Array) -> tuple[int, int]:
    """Into how many parts the mesh in context cuts B and T of [B, T, D]; 1 where it can't evenly."""
    B, T = hidden.shape[:2]
    parts = sharding.num_parts(sharding.RULES["batch"])
    return 1 if B % parts else parts, _time_parts(T)


def kernel_gradient(hidden: jax.Array, g: jax.Array, axes: str, shards: tuple[int, int], dtype: Any) -> jax.Array:
    """The gradient of a head's kernel, from a chunk [B, t, D] and the gradient of its logits [B, t, V].

    Returns:
      [D, V] or, for `axes` "vd", [V, D]. Where tokens are sharded (`token_shards`), [rows, times, ...]: a sum for each
      shard, which stays where it is. Chunks add up so, and devices talk once at the end (`total`).
    """
    if shards == (1, 1):
        return jnp.einsum(f"btd,btv->{axes}", hidden, g, preferred_element_type=dtype)
    rows, times = shards
    hidden, g = (x.reshape(rows, x.shape[0] // rows, times, x.shape[1] // times, x.shape[2]) for x in (hidden, g))
    return _placed(jnp.einsum(f"abctd,abctv->ac{axes}", hidden, g, preferred_element_type=dtype), axes)


def no_gradient(kernel: jax.Array, axes: str, shards: tuple[int, int], dtype: Any) -> jax.Array:
    """Zeros in the shape of `kernel_gradient`."""
    if shards == (1, 1):
        return jnp.zeros(kernel.shape, dtype)
    return _placed(jnp.zeros((*shards, *kernel.shape), dtype), axes)


def total(gradient: jax.Array) -> jax.Array:
    """The sum over shards of what `kernel_gradient` gives."""
    return jnp.sum(gradient, axis=(0, 1)) if gradient.ndim == 4 else gradient


def _placed(gradient: jax.Array, axes: str) -> jax.Array:
    return sharding.constrain(gradient, ["batch", "time", *({"d": None, "v": "vocab"}[axis] for axis in axes)])


def _time_parts(T: int) -> int:
    """Shards of the time axis; 1 where they don't divide it, and the partitioner pads."""
    parts = sharding.num_parts(sharding.RULES["time"])
    return 1 if T % parts else parts
