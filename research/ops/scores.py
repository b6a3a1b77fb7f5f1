"""What the implementations of attention share: which keys a query sees, and scores under that mask.

Axes: B batch, T query time, S key time, H query heads, K key/value heads, G = H / K query heads that share a
key/value head, h head dimension, R = T G rows, P entries of a memory.
"""

import dataclasses
import functools
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Shaped

NAME = "attention"  # what rematerialisation policies know results by

# Finite, so that a row that may see nothing gets the mean of the values and not NaN.
MASKED = -0.7 * float(np.finfo(np.float32).max)

dot = functools.partial(jnp.einsum, preferred_element_type=jnp.float32)


class Memory(NamedTuple):
    """Keys and values that every query sees, of whatever document and wherever it is, such as those of prefix tuning.

    Attributes:
      keys, values: in the dtype of the queries.
    """

    keys: Float[Array, "P K h"]
    values: Float[Array, "P K h"]

    def rows(self, batch_size: int) -> tuple[Float[Array, "B K P h"], Float[Array, "B K P h"]]:
        """Keys and values for each row of a batch, heads first."""
        return tuple(jnp.broadcast_to(x.swapaxes(0, 1)[None], (batch_size, *x.swapaxes(0, 1).shape)) for x in self)


class Documents(NamedTuple):
    """Which tokens belong together.

    Attributes:
      segments: int32, the same number in all tokens of a document.
      prefix: True at the first tokens of a document that all of it may see; None for none.
    """

    segments: Int[Array, "B T"]
    prefix: Bool[Array, "B T"] | None = None

    def at(self, times: slice) -> "Documents":
        """The tokens of some times."""
        return Documents(self.segments[:, times], None if self.prefix is None else self.prefix[:, times])


@dataclasses.dataclass(frozen=True)
class Scores:
    """How queries and keys become scores; see ops.attention.self_attention for each."""

    scale: float
    causal: bool = True
    window: int = 0
    softcap: float = 0.0

    def mask(self, documents: Documents, t: slice = slice(None), s: slice = slice(None)) -> Bool[Array, "B T S"]:
        """Whether queries at the times `t` see keys at `s`."""
        index = jnp.arange(documents.segments.shape[1], dtype=jnp.int32)
        return self.seen(documents.at(t), documents.at(s), index[t], index[s])

    def seen(
        self, queries: Documents, keys: Documents, t: Int[Array, " T"], s: Int[Array, " S"]
    ) -> Bool[Array, "B T S"]:
        """The same, of the queries and keys that are at the times t and s."""
        ahead = (t[:, None] - s[None, :])[None]
        mask = queries.segments[:, :, None] == keys.segments[:, None, :]
        if self.causal:
            before = ahead >= 0
            mask &= before if keys.prefix is None else before | keys.prefix[:, None, :]
        if self.window:
            mask &= jnp.abs(ahead) < self.window
        return mask

    def all_before(self, documents: Documents) -> bool:
        """Whether no query sees a key after it."""
        return self.causal and documents.prefix is None

    def __call__(
        self, q: Float[Array, "B K R h"], k: Float[Array, "B K S h"], mask: Bool[Array, "B T S"]
    ) -> Float[Array, "B K R S"]:
        """Masked scores, float32."""
        return masked(self.unmasked(q, k), mask)

    def unmasked(self, q: Float[Array, "B K R h"], k: Float[Array, "B K S h"]) -> Float[Array, "B K R S"]:
        """The same before the mask."""
        return self.of_products(dot("bkrh,bksh->bkrs", q, k))

    def of_products(self, s: Float[Array, "B K R S"]) -> Float[Array, "B K R S"]:
        """Products of queries and keys, scaled and capped."""
        s = s * self.scale
        return self.softcap * jnp.tanh(s / self.softcap) if self.softcap else s


def masked(s: Float[Array, "B K R S"], mask: Bool[Array, "B T S"], value: float = MASKED) -> Float[Array, "B K R S"]:
    """`s` where a query sees a key, elsewhere `value`."""
    return jnp.where(mask[:, None, :, None], grouped(s, s.shape[2] // mask.shape[1]), value).reshape(s.shape)


def to_rows(x: Float[Array, "B T H h"], K: int) -> Float[Array, "B K R h"]:
    """The G heads that share keys become neighbouring rows."""
    B, T, H, h = x.shape
    return x.reshape(B, T, K, H // K, h).swapaxes(1, 2).reshape(B, K, T * (H // K), h)


def to_heads(x: Float[Array, "B K R h"], T: int) -> Float[Array, "B T H h"]:
    """The inverse of to_rows."""
    B, K, R, h = x.shape
    return x.reshape(B, K, T, R // T, h).swapaxes(1, 2).reshape(B, T, K * (R // T), h)


def grouped(x: Shaped[Array, "B K R n"], G: int) -> Shaped[Array, "B K T G n"]:
    """Rows as times and heads."""
    B, K, R, n = x.shape
    return x.reshape(B, K, R // G, G, n)
