"""Cuts time into chunks, so that a loss holds the logits of only one at once."""

import dataclasses
import math

import jax.numpy as jnp
from jaxtyping import Array, Float, Shaped

from research.devices import sharding
from research.devices.sharding import Rules

# A chunk's float32 logits on one device take at most this much. On a CPU their gradient takes as much again, and so
# does its copy where the kernel is the transpose of an embedding. Elsewhere the gradient takes half, and fewer tokens
# would leave the time to the reading and writing below.
_CHUNK_BYTES = {"cpu": 80 * 2**20, "gpu": 256 * 2**20, "tpu": 256 * 2**20}
# Where no kernel's gradient is added to, which a frozen head has none of, chunks of fewer tokens cost a CPU nothing.
_FROZEN_BYTES = {**_CHUNK_BYTES, "cpu": 20 * 2**20}
# Tokens of a chunk on one device: enough for the matrix products to outweigh the reading and writing of the kernel's
# gradient [D, V], which each chunk adds to. On a CPU more of them only leave the cache.
_CHUNK_TOKENS = {"cpu": 512, "gpu": 2048, "tpu": 2048}


def chunk_bytes(frozen: bool = False) -> int:
    """The most that a chunk's logits may take on one device of the platform, in bytes; `frozen`: of a head that takes
    no gradient."""
    most = _FROZEN_BYTES if frozen else _CHUNK_BYTES
    return most.get(sharding.platform(), most["gpu"])


def chunk_tokens() -> int:
    """The most tokens that a chunk has on one device of the platform, where few dimensions make them cheap."""
    return _CHUNK_TOKENS.get(sharding.platform(), _CHUNK_TOKENS["gpu"])


def chunk_size(
    hidden: Float[Array, "B T D"],
    logits_per_token: int,
    rules: Rules | None,
    tokens: int | None = None,
    frozen: bool = False,
) -> int:
    """As many positions as `chunk_tokens` and `chunk_bytes` allow on each device of the mesh in context.

    Args:
      hidden: [B, T, D].
      logits_per_token: V, of all heads that a chunk has the logits of.
      rules: how the mesh cuts the tokens and the vocabulary; None where it cuts nothing.
      tokens: of a chunk on one device; by default `chunk_tokens`, and at least D.
      frozen: see `chunk_bytes`.
    """
    B, T, D = hidden.shape
    tokens = tokens or max(D, chunk_tokens())
    rows = B / sharding.axis_parts("batch", rules) / time_parts(T, rules)
    bytes_per_token = 4 * logits_per_token / sharding.axis_parts("vocab", rules)
    return int(max(1, min(T, min(tokens, chunk_bytes(frozen) / bytes_per_token) // rows)))


def time_parts(T: int, rules: Rules | None) -> int:
    """Into how many parts the mesh in context cuts T positions; 1 where it can't evenly, and the partitioner pads."""
    parts = sharding.axis_parts("time", rules)
    return 1 if T % parts else parts


@dataclasses.dataclass(frozen=True)
class Chunks:
    """A time axis that is cut into chunks.

    Where devices share in it, every chunk has a piece of each device's part, so that all have work at each.

    Attributes:
      length: T.
      size: of a chunk, about: chunks are of one size t, and the last positions of the last are padding.
      shards: into how many parts devices cut it; divides T.
    """

    length: int
    size: int
    shards: int = 1

    @property
    def count(self) -> int:
        """How many chunks there are: n."""
        return math.ceil(self.length / self.size)

    @property
    def _local(self) -> int:
        """Positions of a device's part."""
        return self.length // self.shards

    @property
    def _piece(self) -> int:
        """Positions of a device's part that go into a chunk."""
        return math.ceil(self.length / self.shards / self.count)

    def split(self, x: Shaped[Array, "B T ..."]) -> Shaped[Array, "n B t ..."]:
        """Cuts the time axis; the padding is zeros."""
        n, piece, local = self.count, self._piece, self._local
        x = x.reshape(x.shape[0], self.shards, local, *x.shape[2:])
        x = jnp.pad(x, [(0, 0), (0, 0), (0, n * piece - local)] + [(0, 0)] * (x.ndim - 3))
        x = jnp.moveaxis(x.reshape(x.shape[0], self.shards, n, piece, *x.shape[3:]), 2, 0)
        return x.reshape(n, x.shape[1], self.shards * piece, *x.shape[4:])

    def join(self, x: Shaped[Array, "n B t ..."]) -> Shaped[Array, "B T ..."]:
        """The way back, without the padding."""
        n, piece = self.count, self._piece
        x = jnp.moveaxis(x.reshape(n, x.shape[1], self.shards, piece, *x.shape[3:]), 0, 2)
        x = x.reshape(x.shape[0], self.shards, n * piece, *x.shape[4:])[:, :, : self._local]
        return x.reshape(x.shape[0], self.length, *x.shape[3:])
