"""How far the hidden states and the attention of one model are from those of another: sums over tokens."""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from research.devices.sharding import Rules
from research.errors import InputError, did_you_mean
from research.ops.chunks import Chunks, time_parts
from research.ops.head import accumulator

DISTANCES = ("mse", "cosine")
Pair = tuple[Float[Array, "B T H h"], Float[Array, "B T K h"]]
_CHUNK_ELEMENTS = 2**24  # of the relations held at once, of each model


def hidden_distance(
    student: Float[Array, "B T D"], teacher: Float[Array, "B T D"], weights: Float[Array, "B T"], kind: str
) -> Float[Array, ""]:
    """Weighted sum over tokens of the distance between two states; the teacher's takes no gradient.

    A position of weight 0 is left out: nothing in it is read, NaN included. All is in float32 (float64 where the
    student's states are).

    Args:
      student, teacher: [B, T, D].
      weights: [B, T] float32.
      kind: "mse": the mean over D of the squared difference (FitNets, arXiv:1412.6550, eq. 3, with the mean for the
        sum). "cosine": 1 - their cosine (DistilBERT, arXiv:1910.01108, section 3).

    Raises:
      InputError: an unknown kind.
    """
    if kind not in DISTANCES:
        raise InputError(f"distance = {kind!r}: no such distance.{did_you_mean(kind, DISTANCES)}")
    dtype = accumulator(student)
    present = weights != 0
    a, b = (jnp.where(present[:, :, None], x, 0).astype(dtype) for x in (student, jax.lax.stop_gradient(teacher)))
    if kind == "mse":
        each = jnp.mean(jnp.square(a - b), axis=-1)
    else:
        length = lambda x: jnp.sqrt(jnp.maximum(jnp.sum(jnp.square(x), axis=-1), 1e-24))  # noqa: E731
        each = 1 - jnp.sum(a * b, axis=-1) / (length(a) * length(b))
    return jnp.sum(weights.astype(dtype) * jnp.where(present, each, 0))


def relation_divergence(
    student: Pair,
    teacher: Pair,
    segment_ids: Int[Array, "B T"],
    weights: Float[Array, "B T"],
    *,
    heads: int,
    causal: bool = True,
    prefix: Int[Array, "B T"] | None = None,
    rules: Rules | None = None,
) -> Float[Array, ""]:
    """Weighted sum over tokens of KL(teacher's || student's relation), averaged over relation heads.

    The relation of a token is the softmax over the tokens of its document (with `causal`, up to itself, and those of
    the prefix) of a b / sqrt(d): attention itself where a are the queries and b the keys (but for sliding windows,
    soft-caps and scales of their own, which are left out), and for a = b the query, key or value relations of MiniLM
    (arXiv:2002.10957, eq. 7; arXiv:2012.15828, eq. 5). For it the vectors of all heads are joined and cut anew into
    `heads`, so that models of any widths can be compared. The teacher takes no gradient.

    No array with both times is held beyond a chunk of queries, in the backward pass neither.

    Args:
      student, teacher: (a, b), each [B, T, H, h]; b may have fewer heads, which then are repeated.
      segment_ids: [B, T] int32, 0 at padding.
      weights: [B, T] float32.
      heads: relation heads; divides H h of either model.
      prefix: with `causal`, 1 at the first tokens of a document that all of it may see; None for none.
      rules: how the mesh in context cuts the tokens; None where it doesn't.

    Raises:
      InputError: it doesn't divide.
    """
    (B, T), dtype = segment_ids.shape, accumulator(student[0])
    t = max(1, min(T, _CHUNK_ELEMENTS // (B * heads * T)))
    split = Chunks(T, t, time_parts(T, rules)).split
    (a, b), (c, d) = (_rejoin(pair, heads, dtype) for pair in (student, jax.lax.stop_gradient(teacher)))
    times = jnp.arange(T, dtype=jnp.int32)[None]

    @functools.partial(jax.checkpoint, policy=jax.checkpoint_policies.nothing_saveable)
    def chunk(total: Float[Array, ""], x: tuple) -> tuple[Float[Array, ""], None]:
        a, c, segments, weights, times = x
        seen = segments[:, :, None] == segment_ids[:, None, :]
        if causal:
            before = times[:, :, None] >= jnp.arange(T, dtype=jnp.int32)[None, None, :]
            seen &= before if prefix is None else before | (prefix[:, None, :] > 0)
        log_q, log_p = (_relation(u, v, seen) for u, v in ((a, b), (c, d)))
        kl = jnp.sum(jnp.where(seen[:, None], jnp.exp(log_p) * (log_p - log_q), 0), axis=-1)
        return total + jnp.sum(weights.astype(dtype) * jnp.mean(kl, axis=1)), None

    return jax.lax.scan(chunk, jnp.zeros((), dtype), jax.tree.map(split, (a, c, segment_ids, weights, times)))[0]


def _relation(
    a: Float[Array, "B t A d"], b: Float[Array, "B T A d"], seen: Bool[Array, "B t T"]
) -> Float[Array, "B A t T"]:
    """Log-probabilities, any finite number where `seen` is False."""
    scores = jnp.einsum("btad,bsad->bats", a, b) / math.sqrt(a.shape[-1])
    scores = jnp.where(seen[:, None], scores, jnp.finfo(scores.dtype).min / 4)
    return jax.nn.log_softmax(scores)


def _rejoin(pair: Pair, heads: int, dtype: Any) -> tuple[Float[Array, "B T A d"], Float[Array, "B T A d"]]:
    """The vectors of all heads, joined and cut anew into `heads` (A)."""
    a, b = pair
    if a.shape[2] != b.shape[2]:
        b = jnp.repeat(b, a.shape[2] // b.shape[2], axis=2)
    width = a.shape[2] * a.shape[3]
    if width % heads:
        raise InputError(f"relation_heads = {heads}: doesn't divide {width}, the width of all heads together.")
    return tuple(x.astype(dtype).reshape(*x.shape[:2], heads, width // heads) for x in (a, b))
