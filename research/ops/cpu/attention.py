"""Attention for CPUs: blocks of query rows against the keys that they can see, in plain jax.

The gradient recomputes the scores (FlashAttention's, arXiv:2205.14135), so that O(T) memory is kept for it; it is in
reverse mode only. Nothing here depends on the platform but its speed: on a CPU a block's scores stay in the cache.

Axes: see ops/scores.py.
"""

import functools

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float

from research.ops.scores import NAME, Documents, Scores, dot, grouped, to_heads, to_rows

MIN_ROWS = 64  # of a block: smaller matrix products are slow


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def attention(
    scores: Scores,
    q: Float[Array, "B T H h"],
    k: Float[Array, "B T K h"],
    v: Float[Array, "B T K h"],
    documents: Documents,
) -> Float[Array, "B T H h"]:
    """See ops.attention.self_attention."""
    return _forward(scores, q, k, v, documents)[0]


# Both passes write each block's result over the queries that it came from. Nothing else would order the blocks, and
# XLA, left free, computes the scores of all of them before it uses any: the memory of a whole [T, T] again.
#
# What is computed element by element has the shape [B, K, T, G, S], and not that of the products, [B, K, T * G, S]: XLA
# then doesn't write it over its operand, and its older emitters (devices/compilation.py) vectorise no loop that does.


def _forward(scores, q, k, v, documents):
    T, K, G = q.shape[1], k.shape[2], q.shape[2] // k.shape[2]
    queries, keys, values = to_rows(q, K), k.swapaxes(1, 2), v.swapaxes(1, 2)
    logsumexps = []
    for t, s in _blocks(T, scores, documents):
        rows = slice(t.start * G, t.stop * G)
        mask = scores.mask(documents, t, s)
        block = scores(queries[:, :, rows], keys[:, :, s], mask)
        top = block.max(axis=-1, keepdims=True)
        p = jnp.exp(grouped(block, G) - grouped(top, G)).reshape(block.shape)
        total = p.sum(axis=-1, keepdims=True)
        out = dot("bkrs,bksh->bkrh", p.astype(v.dtype), values[:, :, s]) / total
        queries = queries.at[:, :, rows].set(out.astype(q.dtype))
        logsumexps.append(top + jnp.log(total))
    out = checkpoint_name(to_heads(queries, T), NAME)
    logsumexp = checkpoint_name(jnp.concatenate(logsumexps, axis=2), NAME)
    return out, (q, k, v, documents, out, logsumexp)


def _backward(scores, residuals, d_out):
    q, k, v, documents, out, logsumexp = residuals
    T, K, G = q.shape[1], k.shape[2], q.shape[2] // k.shape[2]
    queries, keys, values, d_rows = to_rows(q, K), k.swapaxes(1, 2), v.swapaxes(1, 2), to_rows(d_out, K)
    delta = to_rows(dot("bthd,bthd->bth", d_out, out)[..., None], K)
    dk = dv = jnp.zeros(keys.swapaxes(2, 3).shape, jnp.float32)
    for t, s in _blocks(T, scores, documents):
        rows = slice(t.start * G, t.stop * G)
        mask = scores.mask(documents, t, s)
        block = scores(queries[:, :, rows], keys[:, :, s], mask)
        p = jnp.exp(grouped(block, G) - grouped(logsumexp[:, :, rows], G)).reshape(block.shape)
        dp = dot("bkrh,bksh->bkrs", d_rows[:, :, rows], values[:, :, s])
        ds = (grouped(p, G) * (grouped(dp, G) - grouped(delta[:, :, rows], G))).reshape(p.shape)
        if scores.softcap:
            # Clipped, for masked scores are far out, and 0 * inf would be NaN there.
            ds *= 1 - jnp.clip(block / scores.softcap, -1, 1) ** 2
        p, ds = p.astype(v.dtype), ds.astype(q.dtype)
        # [h, S] and not [S, h]: the operand that has to be transposed is the small one.
        dk = dk.at[..., s].add(dot("bkrh,bkrs->bkhs", queries[:, :, rows], ds))
        dv = dv.at[..., s].add(dot("bkrh,bkrs->bkhs", d_rows[:, :, rows], p))
        dq = dot("bkrs,bksh->bkrh", ds, keys[:, :, s]) * scores.scale
        queries = queries.at[:, :, rows].set(dq.astype(q.dtype))
    dk = (dk * scores.scale).transpose(0, 3, 1, 2).astype(k.dtype)
    return to_heads(queries, T), dk, dv.transpose(0, 3, 1, 2).astype(v.dtype), None


attention.defvjp(_forward, _backward)


def _blocks(T: int, scores: Scores, documents: Documents) -> list[tuple[slice, slice]]:
    """Blocks of query times, each with the key times that any of them sees.

    At most 8 blocks, for each is compiled on its own, and 8 already skip 7/16 of the work. Where a prefix
    may lie ahead, they skip nothing.
    """
    size = MIN_ROWS * -(-T // (8 * MIN_ROWS))
    blocks = []
    for start in range(0, T, size):
        stop = min(start + size, T)
        first = max(0, start - scores.window + 1) if scores.window else 0
        last = stop if scores.all_before(documents) else min(T, stop + scores.window - 1) if scores.window else T
        blocks.append((slice(start, stop), slice(first, last)))
    return blocks
