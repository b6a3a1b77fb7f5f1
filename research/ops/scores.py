"""What the implementations of attention share: which keys a query sees, and scores under that mask.

Axes: B batch, T query time, S key time, H query heads, K key/value heads, G = H / K query heads that share a
key/value head, h head dimension, R = T G rows.
"""

import dataclasses
import functools

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Shaped

NAME = "attention"  # what rematerialisation policies know results by

# Finite, so that a row that may see nothing gets the mean of the values and not NaN.
MASKED = -0.7 * float(np.finfo(np.float32).max)

dot = functools.partial(jnp.einsum, preferred_element_type=jnp.float32)


@dataclasses.dataclass(frozen=True)
class Scores:
    """How queries and keys become scores; see ops.attention.self_attention for each."""

    scale: float
    causal: bool = True
    window: int = 0
    softcap: float = 0.0

    def mask(
        self, segment_ids: Int[Array, "B N"], t: slice = slice(None), s: slice = slice(None)
    ) -> Bool[Array, "B T S"]:
        """Whether queries at the times `t` see keys at `s`."""
        index = jnp.arange(segment_ids.shape[1], dtype=jnp.int32)
        return self.seen(segment_ids[:, t], segment_ids[:, s], index[t], index[s])

    def seen(
        self, queries: Int[Array, "B T"], keys: Int[Array, "B S"], t: Int[Array, " T"], s: Int[Array, " S"]
    ) -> Bool[Array, "B T S"]:
        """The same, of the segments of queries and keys that are at the times t and s."""
        ahead = (t[:, None] - s[None, :])[None]
        mask = queries[:, :, None] == keys[:, None, :]
        if self.causal:
            mask &= ahead >= 0
        if self.window:
            mask &= jnp.abs(ahead) < self.window
        return mask

    def __call__(
        self, q: Float[Array, "B K R h"], k: Float[Array, "B K S h"], mask: Bool[Array, "B T S"]
    ) -> Float[Array, "B K R S"]:
        """Masked scores, float32."""
        s = dot("bkrh,bksh->bkrs", q, k) * self.scale
        if self.softcap:
            s = self.softcap * jnp.tanh(s / self.softcap)
        return jnp.where(mask[:, None, :, None], grouped(s, q.shape[2] // mask.shape[1]), MASKED).reshape(s.shape)


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
