"""Attention for CPUs: blocks of query rows against the keys that they can see, in plain jax; of long rows by tiles.

The gradient recomputes the scores (FlashAttention's, arXiv:2205.14135), so that O(T) memory is kept for it; it is in
reverse mode only. Nothing here depends on the platform but its speed: on a CPU a block's scores stay in the cache.

Axes: see ops/scores.py.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Bool, Float, PyTree

from research.devices.sharding import device_count
from research.ops.cpu import tiles
from research.ops.cpu.tiles import Rows
from research.ops.scores import NAME, Documents, Memory, Scores, dot, grouped, masked, to_heads, to_rows

MIN_ROWS = 64  # of a block: smaller matrix products are slow
_LEAST_SPLIT = 2**20  # scores of a batch that is cut in two; below, compiling costs more than it saves
LEAST_TILED = 512  # T from which rows are cut into tiles of queries and keys


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
    rows = Rows(q, k, v, documents)
    if q.shape[1] < LEAST_TILED:
        out, logsumexp = _in_halves(functools.partial(_outputs, scores, memory), rows)
    else:
        out, logsumexp = tiles.outputs(scores, memory, rows)
    out, logsumexp = checkpoint_name(out, NAME), checkpoint_name(logsumexp, NAME)
    return out, (q, k, v, documents, memory, out, logsumexp)


def _backward(scores, residuals, d_out):
    q, k, v, documents, memory, out, logsumexp = residuals
    rows = Rows(q, k, v, documents)
    if q.shape[1] < LEAST_TILED:
        gradients = functools.partial(_gradients, scores, memory)
        dq, dk, dv, d_memory = _in_halves(gradients, rows, out, logsumexp, d_out)
    else:
        dq, dk, dv, d_memory = tiles.gradients(scores, memory, rows, out, logsumexp, d_out)
    if memory is not None:
        d_keys, d_values = d_memory.sum(axis=0).transpose(0, 3, 1, 2)
        d_memory = Memory((d_keys * scores.scale).astype(k.dtype), d_values.astype(v.dtype))
    return dq, dk, dv, None, d_memory


def _in_halves(function: Callable[..., Any], rows: Rows, *others: PyTree) -> PyTree:
    """function(rows, *others) of half of a batch and of the other half, joined: XLA runs at the same time what doesn't
    depend on each other, and most steps of a block are too small for all cores."""
    (B, T, H, _), arrays = rows.q.shape, (rows, *others)
    if B % 2 or B * H * T * T < _LEAST_SPLIT or device_count() > 1:
        return function(*arrays)
    halves = (jax.tree.map(lambda x, half=half: x[half], arrays) for half in (slice(B // 2), slice(B // 2, B)))
    return jax.tree.map(lambda *parts: jnp.concatenate(parts), *(function(*half) for half in halves))


def _outputs(
    scores: Scores, memory: Memory | None, rows: Rows
) -> tuple[Float[Array, "B T H h"], Float[Array, "B K R 1"]]:
    """The result, and the logarithms of the sums of exponentials."""
    q, k, v, documents = rows
    T, K = q.shape[1], k.shape[2]
    queries, keys, values = to_rows(q, K), k.swapaxes(1, 2), v.swapaxes(1, 2)
    logsumexps = []
    for t, s in _blocks(T, scores, documents):
        block = _Block(scores, documents, memory, t, s, q.shape[2] // K)
        out, logsumexp = block.outputs(queries[:, :, block.rows], keys, values)
        queries = queries.at[:, :, block.rows].set(out.astype(q.dtype))
        logsumexps.append(logsumexp)
    return to_heads(queries, T), jnp.concatenate(logsumexps, axis=2)


def _gradients(
    scores: Scores,
    memory: Memory | None,
    rows: Rows,
    out: Float[Array, "B T H h"],
    logsumexp: Float[Array, "B K R 1"],
    d_out: Float[Array, "B T H h"],
) -> tuple[Float[Array, "B T H h"], Float[Array, "B T K h"], Float[Array, "B T K h"], Float[Array, "B 2 K h P"] | None]:
    """The gradients by q, k and v, and those by the memory of each row, None without one."""
    q, k, v, documents = rows
    B, T, K = *q.shape[:2], k.shape[2]
    P = 0 if memory is None else memory.keys.shape[0]
    queries, keys, values, d_rows = to_rows(q, K), k.swapaxes(1, 2), v.swapaxes(1, 2), to_rows(d_out, K)
    delta = to_rows(dot("bthd,bthd->bth", d_out, out)[..., None], K)
    dk = dv = jnp.zeros(keys.swapaxes(2, 3).shape, jnp.float32)
    d_memory = jnp.zeros((2, B, K, q.shape[3], P), jnp.float32) if P else None
    for t, s in _blocks(T, scores, documents):
        block = _Block(scores, documents, memory, t, s, q.shape[2] // K)
        own = (x[:, :, block.rows] for x in (queries, d_rows, delta, logsumexp))
        dq, block_dk, block_dv, block_memory = block.gradients(*own, keys, values)
        dk, dv = dk.at[..., s].add(block_dk), dv.at[..., s].add(block_dv)
        if P:
            d_memory += block_memory
        queries = queries.at[:, :, block.rows].set(dq.astype(q.dtype))
    dk = (dk * scores.scale).transpose(0, 3, 1, 2).astype(k.dtype)
    d_memory = None if memory is None else d_memory.swapaxes(0, 1)
    return to_heads(queries, T), dk, dv.transpose(0, 3, 1, 2).astype(v.dtype), d_memory


@dataclasses.dataclass(frozen=True)
class _Block:
    """Queries of some times, and the keys that they may see.

    Attributes:
      scores, documents, memory: see `attention`.
      t, s: times of the queries and of the keys.
      group: G.
    """

    scores: Scores
    documents: Documents
    memory: Memory | None
    t: slice
    s: slice
    group: int

    @property
    def rows(self) -> slice:
        """Of the rows of queries."""
        return slice(self.t.start * self.group, self.t.stop * self.group)

    def outputs(
        self, queries: Float[Array, "B K R h"], keys: Float[Array, "B K T h"], values: Float[Array, "B K T h"]
    ) -> tuple[Float[Array, "B K R h"], Float[Array, "B K R 1"]]:
        """What the queries get of the keys, and the logarithms of the sums of exponentials."""
        G, (memory_keys, memory_values) = self.group, self._memory(queries)
        mask = _behind(self.memory, self.scores.mask(self.documents, self.t, self.s))
        raw = self.scores.unmasked(queries, _after(memory_keys, keys[:, :, self.s]))
        block = masked(raw, mask)
        top = block.max(axis=-1, keepdims=True)
        if queries.shape[0] == 1:  # what is masked would have p's shape, see above: XLA leaves such an axis out
            p = masked(jnp.exp(grouped(raw, G) - grouped(top, G)).reshape(raw.shape), mask, 0.0)
        else:
            p = jnp.exp(grouped(block, G) - grouped(top, G)).reshape(block.shape)
        total = p.sum(axis=-1, keepdims=True)
        out = dot("bkrs,bksh->bkrh", p.astype(values.dtype), _after(memory_values, values[:, :, self.s])) / total
        return out, top + jnp.log(total)

    def gradients(
        self,
        queries: Float[Array, "B K R h"],
        d_rows: Float[Array, "B K R h"],
        delta: Float[Array, "B K R 1"],
        logsumexp: Float[Array, "B K R 1"],
        keys: Float[Array, "B K T h"],
        values: Float[Array, "B K T h"],
    ) -> tuple[Float[Array, "B K R h"], Float[Array, "B K h S"], Float[Array, "B K h S"], Array | None]:
        """The gradients by the queries, by keys and values at the block's times, [B, K, h, S], and by both of the
        memory, [2, B, K, h, P], None without one. The first four arrays are of the queries."""
        G, P = self.group, 0 if self.memory is None else self.memory.keys.shape[0]
        memory_keys, memory_values = self._memory(queries)
        mask = _behind(self.memory, self.scores.mask(self.documents, self.t, self.s))
        block_keys = _after(memory_keys, keys[:, :, self.s])
        block = self.scores(queries, block_keys, mask)
        p = jnp.exp(grouped(block, G) - grouped(logsumexp, G)).reshape(block.shape)
        dp = dot("bkrh,bksh->bkrs", d_rows, _after(memory_values, values[:, :, self.s]))
        ds = (grouped(p, G) * (grouped(dp, G) - grouped(delta, G))).reshape(p.shape)
        if self.scores.softcap:
            # Clipped, for masked scores are far out, and 0 * inf would be NaN there.
            ds *= 1 - jnp.clip(block / self.scores.softcap, -1, 1) ** 2
        p, ds = p.astype(values.dtype), ds.astype(queries.dtype)
        # [h, S] and not [S, h]: the operand that has to be transposed is the small one.
        dk, dv = dot("bkrh,bkrs->bkhs", queries, ds), dot("bkrh,bkrs->bkhs", d_rows, p)
        dq = dot("bkrs,bksh->bkrh", ds, block_keys) * self.scores.scale
        d_memory = jnp.stack([dk[..., :P], dv[..., :P]]) if P else None
        return dq, dk[..., P:], dv[..., P:], d_memory

    def _memory(self, queries: Float[Array, "B K R h"]) -> tuple[Array | None, Array | None]:
        return (None, None) if self.memory is None else self.memory.rows(queries.shape[0])


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
