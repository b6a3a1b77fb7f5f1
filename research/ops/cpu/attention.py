"""Attention for CPUs: blocks of query rows against the keys that they can see, in plain jax.

The gradient recomputes the scores (FlashAttention's, arXiv:2205.14135), so that O(T) memory is kept for it; it is in
reverse mode only. Nothing here depends on the platform but its speed: on a CPU a block's scores stay in the cache.

Axes: see ops/scores.py.
"""

import functools

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Bool, Float

from research.ops.scores import NAME, Documents, Memory, Scores, dot, grouped, to_heads, to_rows

MIN_ROWS = 64  # of a block: smaller matrix products are slow


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def attention(
    scores: Scores,
    q: Float[Array, "B T H h"],
    k: Float[Array, "B T K h"],
    v: Float[Array, "B T K h"],
    documents: Documents,
    memory: Memory | None = None,
) -> Float[Array, "B T H h"]:
    """See ops.attention.self_attention."""
    return _forward(scores, q, k, v, documents, memory)[0]


# Both passes write each block's result over the queries that it came from. Nothing else would order the blocks, and
# XLA, left free, computes the scores of all of them before it uses any: the memory of a whole [T, T] again.
#
# What is computed element by element has the shape [B, K, T, G, S], and not that of the products, [B, K, T * G, S]: XLA
# then doesn't write it over its operand, and its older emitters (devices/compilation.py) vectorise no loop that does.


def _forward(scores, q, k, v, documents, memory):
    B, T, K, G = *q.shape[:2], k.shape[2], q.shape[2] // k.shape[2]
    memory_keys, memory_values = (None, None) if memory is None else memory.rows(B)
    queries, keys, values = to_rows(q, K), k.swapaxes(1, 2), v.swapaxes(1, 2)
    logsumexps = []
    for t, s in _blocks(T, scores, documents):
        rows = slice(t.start * G, t.stop * G)
        mask = _behind(memory, scores.mask(documents, t, s))
        block = scores(queries[:, :, rows], _after(memory_keys, keys[:, :, s]), mask)
        top = block.max(axis=-1, keepdims=True)
        p = jnp.exp(grouped(block, G) - grouped(top, G)).reshape(block.shape)
        total = p.sum(axis=-1, keepdims=True)
        out = dot("bkrs,bksh->bkrh", p.astype(v.dtype), _after(memory_values, values[:, :, s])) / total
        queries = queries.at[:, :, rows].set(out.astype(q.dtype))
        logsumexps.append(top + jnp.log(total))
    out = checkpoint_name(to_heads(queries, T), NAME)
    logsumexp = checkpoint_name(jnp.concatenate(logsumexps, axis=2), NAME)
    return out, (q, k, v, documents, memory, out, logsumexp)


def _backward(scores, residuals, d_out):
    q, k, v, documents, memory, out, logsumexp = residuals
    B, T, K, G = *q.shape[:2], k.shape[2], q.shape[2] // k.shape[2]
    memory_keys, memory_values = (None, None) if memory is None else memory.rows(B)
    P = 0 if memory is None else memory.keys.shape[0]
    queries, keys, values, d_rows = to_rows(q, K), k.swapaxes(1, 2), v.swapaxes(1, 2), to_rows(d_out, K)
    delta = to_rows(dot("bthd,bthd->bth", d_out, out)[..., None], K)
    dk = dv = jnp.zeros(keys.swapaxes(2, 3).shape, jnp.float32)
    d_memory = jnp.zeros((2, B, K, q.shape[3], P), jnp.float32) if P else None
    for t, s in _blocks(T, scores, documents):
        rows = slice(t.start * G, t.stop * G)
        mask = _behind(memory, scores.mask(documents, t, s))
        block_keys = _after(memory_keys, keys[:, :, s])
        block = scores(queries[:, :, rows], block_keys, mask)
        p = jnp.exp(grouped(block, G) - grouped(logsumexp[:, :, rows], G)).reshape(block.shape)
        dp = dot("bkrh,bksh->bkrs", d_rows[:, :, rows], _after(memory_values, values[:, :, s]))
        ds = (grouped(p, G) * (grouped(dp, G) - grouped(delta[:, :, rows], G))).reshape(p.shape)
        if scores.softcap:
            # Clipped, for masked scores are far out, and 0 * inf would be NaN there.
            ds *= 1 - jnp.clip(block / scores.softcap, -1, 1) ** 2
        p, ds = p.astype(v.dtype), ds.astype(q.dtype)
        # [h, S] and not [S, h]: the operand that has to be transposed is the small one.
        block_dk = dot("bkrh,bkrs->bkhs", queries[:, :, rows], ds)
        block_dv = dot("bkrh,bkrs->bkhs", d_rows[:, :, rows], p)
        dk, dv = dk.at[..., s].add(block_dk[..., P:]), dv.at[..., s].add(block_dv[..., P:])
        if P:
            d_memory += jnp.stack([block_dk[..., :P], block_dv[..., :P]])
        dq = dot("bkrs,bksh->bkrh", ds, block_keys) * scores.scale
        queries = queries.at[:, :, rows].set(dq.astype(q.dtype))
    dk = (dk * scores.scale).transpose(0, 3, 1, 2).astype(k.dtype)
    if memory is not None:
        d_keys, d_values = d_memory.sum(axis=1).transpose(0, 3, 1, 2)
        d_memory = Memory((d_keys * scores.scale).astype(k.dtype), d_values.astype(v.dtype))
    return to_heads(queries, T), dk, dv.transpose(0, 3, 1, 2).astype(v.dtype), None, d_memory


attention.defvjp(_forward, _backward)


def _after(memory: Float[Array, "B K P h"] | None, x: Float[Array, "B K S h"]) -> Float[Array, "B K P+S h"]:
    """Keys or values of a block after those of the memory."""
    return x if memory is None else jnp.concatenate([memory, x], axis=2)


def _behind(memory: Memory | None, mask: Bool[Array, "B T S"]) -> Bool[Array, "B T P+S"]:
    """The mask of a block's keys after those of the memory, which are all seen."""
    return mask if memory is None else jnp.pad(mask, ((0, 0), (0, 0), (memory.keys.shape[0], 0)), constant_values=True)


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
