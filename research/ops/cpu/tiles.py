"""Attention for CPUs over long rows: tiles of queries and keys in loops, with an online softmax (FlashAttention,
arXiv:2205.14135, algorithms 1 and 4), in plain jax.

What is held beside the results is of the size of one tile, and a program is as long for any T. See ops/cpu/attention.py
for the axes; both passes write each block's result over the queries that it came from.
"""

import dataclasses
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from research.devices.sharding import device_count
from research.ops.scores import MASKED, Documents, Memory, Scores, dot, grouped, masked, to_heads, to_rows

ROWS = 512  # of queries in a tile, T G: products of fewer are slower, and with more a tile leaves the cache
KEYS = 256  # of a tile


class Rows(NamedTuple):
    """What is read of some rows of a batch."""

    q: Float[Array, "B T H h"]
    k: Float[Array, "B T K h"]
    v: Float[Array, "B T K h"]
    documents: Documents


def outputs(
    scores: Scores, memory: Memory | None, rows: Rows
) -> tuple[Float[Array, "B T H h"], Float[Array, "B K R 1"]]:
    """The result, and the logarithms of the sums of exponentials."""
    T, tiles, memories = rows.q.shape[1], _Tiles.of(scores, rows), _rows(memory, rows)
    queries, keys, values = tiles.arrays(rows)

    def block(i: Int[Array, ""], carry: tuple[Array, Array]) -> tuple[Array, Array]:
        queries, logsumexps = carry
        own = tiles.own(queries, i)
        zeros = jnp.zeros((*own.shape[:3], 1), jnp.float32)
        state = zeros + MASKED, zeros, jnp.zeros(own.shape, jnp.float32)
        if memories is not None:
            state = _added(scores.unmasked(own, memories[0]), memories[1], state, tiles.group)

        def tile(j: Int[Array, ""], state: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
            raw = scores.unmasked(own, tiles.seen(keys, j))
            return _added(masked(raw, tiles.mask(i, j)), tiles.seen(values, j), state, tiles.group)

        top, total, out = jax.lax.fori_loop(*tiles.span(i), tile, state)
        out = (out / total).astype(queries.dtype)
        return tiles.put(queries, out, i), tiles.put(logsumexps, top + jnp.log(total), i)

    logsumexps = jnp.zeros((*queries.shape[:3], 1), jnp.float32)
    queries, logsumexps = jax.lax.fori_loop(0, tiles.blocks, block, (queries, logsumexps))
    return to_heads(queries, tiles.length)[:, :T], logsumexps[:, :, : T * tiles.group]


def _added(
    s: Float[Array, "B K R S"], values: Float[Array, "B K S h"], state: tuple[Array, Array, Array], G: int
) -> tuple[Float[Array, "B K R 1"], Float[Array, "B K R 1"], Float[Array, "B K R h"]]:
    """The largest score, the sum of exponentials less it, and of values weighted so, with those of more keys."""
    top, total, out = state
    higher = jnp.maximum(top, s.max(axis=-1, keepdims=True))
    p = jnp.exp(grouped(s, G) - grouped(higher, G)).reshape(s.shape)
    shrink = jnp.exp(top - higher)
    total = total * shrink + p.sum(axis=-1, keepdims=True)
    return higher, total, out * shrink + dot("bkrs,bksh->bkrh", p.astype(values.dtype), values)


def gradients(
    scores: Scores,
    memory: Memory | None,
    rows: Rows,
    out: Float[Array, "B T H h"],
    logsumexp: Float[Array, "B K R 1"],
    d_out: Float[Array, "B T H h"],
) -> tuple[Float[Array, "B T H h"], Float[Array, "B T K h"], Float[Array, "B T K h"], Float[Array, "B 2 K h P"] | None]:
    """The gradients by q, k and v, and those by the memory of each row, None without one."""
    (B, T, _, h), K = rows.q.shape, rows.k.shape[2]
    tiles, memories = _Tiles.of(scores, rows), _rows(memory, rows)
    queries, keys, values = tiles.arrays(rows)
    delta = to_rows(tiles.padded(dot("bthd,bthd->bth", d_out, out)[..., None]), K)
    d_rows = to_rows(tiles.padded(d_out), K)
    logsumexp = jnp.pad(logsumexp, ((0, 0), (0, 0), (0, queries.shape[2] - logsumexp.shape[2]), (0, 0)))
    by_keys = jnp.zeros((2, B, K, h, tiles.length), jnp.float32)
    by_memory = None if memory is None else jnp.zeros((2, B, K, h, memory.keys.shape[0]), jnp.float32)

    def block(i: Int[Array, ""], carry: tuple[Array, Array, Any]) -> tuple[Array, Array, Any]:
        queries, by_keys, by_memory = carry
        own = _Own(*(tiles.own(x, i) for x in (queries, d_rows, delta, logsumexp)))
        dq = jnp.zeros(own.queries.shape, jnp.float32)
        if memories is not None:
            dq, more = own.gradients(scores, scores.unmasked(own.queries, memories[0]), *memories, tiles.group)
            by_memory += more

        def tile(j: Int[Array, ""], state: tuple[Array, Array]) -> tuple[Array, Array]:
            dq, by_keys = state
            own_keys = tiles.seen(keys, j)
            s = scores(own.queries, own_keys, tiles.mask(i, j))
            more, own_by_keys = own.gradients(scores, s, own_keys, tiles.seen(values, j), tiles.group)
            place = (0, 0, 0, 0, j * tiles.keys)
            before = jax.lax.dynamic_slice(by_keys, place, own_by_keys.shape)
            return dq + more, jax.lax.dynamic_update_slice(by_keys, before + own_by_keys, place)

        dq, by_keys = jax.lax.fori_loop(*tiles.span(i), tile, (dq, by_keys))
        return tiles.put(queries, (dq * scores.scale).astype(queries.dtype), i), by_keys, by_memory

    queries, by_keys, by_memory = jax.lax.fori_loop(0, tiles.blocks, block, (queries, by_keys, by_memory))
    dk, dv = by_keys[..., :T].transpose(0, 1, 4, 2, 3)
    d_memory = None if by_memory is None else by_memory.swapaxes(0, 1)
    dk = (dk * scores.scale).astype(rows.k.dtype)
    return to_heads(queries, tiles.length)[:, :T], dk, dv.astype(rows.v.dtype), d_memory


class _Own(NamedTuple):
    """What the gradients of a block read of its queries."""

    queries: Float[Array, "B K R h"]
    d_rows: Float[Array, "B K R h"]
    delta: Float[Array, "B K R 1"]
    logsumexp: Float[Array, "B K R 1"]

    def gradients(
        self,
        scores: Scores,
        s: Float[Array, "B K R S"],
        keys: Float[Array, "B K S h"],
        values: Float[Array, "B K S h"],
        G: int,
    ) -> tuple[Float[Array, "B K R h"], Float[Array, "2 B K h S"]]:
        """By the queries, and by some keys and values; the first, and that by keys, aren't scaled yet."""
        p = jnp.exp(grouped(s, G) - grouped(self.logsumexp, G)).reshape(s.shape)
        dp = dot("bkrh,bksh->bkrs", self.d_rows, values)
        ds = (grouped(p, G) * (grouped(dp, G) - grouped(self.delta, G))).reshape(p.shape)
        if scores.softcap:
            # Clipped, for masked scores are far out, and 0 * inf would be NaN there.
            ds *= 1 - jnp.clip(s / scores.softcap, -1, 1) ** 2
        p, ds = p.astype(values.dtype), ds.astype(keys.dtype)
        # [h, S] and not [S, h]: the operand that has to be transposed is the small one.
        by_keys = dot("bkrh,bkrs->bkhs", self.queries, ds), dot("bkrh,bkrs->bkhs", self.d_rows, p)
        return dot("bkrs,bksh->bkrh", ds, keys), jnp.stack(by_keys)


@dataclasses.dataclass(frozen=True, eq=False)
class _Tiles:
    """How queries and keys are cut: T is filled up to a multiple of both.

    Attributes:
      scores: see ops.attention.
      documents: of all tokens; what fills up is of no document.
      length: T, filled up.
      group: G.
      times: T of the queries of a tile.
      keys: of a tile.
      nearest: of each block the first tile that holds a document of its own, and the one after the last; None where
        that isn't looked for.
    """

    scores: Scores
    documents: Documents
    length: int
    group: int
    times: int
    keys: int
    nearest: tuple[Int[Array, " blocks"], Int[Array, " blocks"]] | None

    @classmethod
    def of(cls, scores: Scores, rows: Rows) -> "_Tiles":
        """Those of some rows of a batch."""
        T, group = rows.q.shape[1], rows.q.shape[2] // rows.k.shape[2]
        times = max(ROWS // group // KEYS, 1) * KEYS
        length = math.ceil(T / times) * times
        segments, prefix = rows.documents
        fill = ((0, 0), (0, length - T))
        segments = jnp.pad(segments, fill, constant_values=-1)
        documents = Documents(segments, None if prefix is None else jnp.pad(prefix, fill))
        return cls(scores, documents, length, group, times, KEYS, _nearest(segments, times, KEYS))

    @property
    def blocks(self) -> int:
        """Of queries."""
        return self.length // self.times

    def arrays(self, rows: Rows) -> tuple[Float[Array, "B K R h"], Float[Array, "B K T h"], Float[Array, "B K T h"]]:
        """Queries, keys and values, heads first and filled up."""
        q, k, v = (self.padded(x) for x in rows[:3])
        return to_rows(q, k.shape[2]), k.swapaxes(1, 2), v.swapaxes(1, 2)

    def padded(self, x: Float[Array, "B T *n"]) -> Float[Array, "B T *n"]:
        """With zeros at the times that fill up."""
        return jnp.pad(x, ((0, 0), (0, self.length - x.shape[1]), *((0, 0),) * (x.ndim - 2)))

    def own(self, x: Float[Array, "B K R n"], i: Int[Array, ""]) -> Float[Array, "B K r n"]:
        """The queries of block i."""
        size = self.times * self.group
        return jax.lax.dynamic_slice_in_dim(x, i * size, size, axis=2)

    def put(self, x: Float[Array, "B K R n"], block: Float[Array, "B K r n"], i: Int[Array, ""]) -> Array:
        """x with block i."""
        return jax.lax.dynamic_update_slice_in_dim(x, block, i * self.times * self.group, axis=2)

    def seen(self, x: Float[Array, "B K T h"], j: Int[Array, ""]) -> Float[Array, "B K S h"]:
        """The keys or values of tile j."""
        return jax.lax.dynamic_slice_in_dim(x, j * self.keys, self.keys, axis=2)

    def mask(self, i: Int[Array, ""], j: Int[Array, ""]) -> Array:
        """Whether queries of block i see keys of tile j, bool [B, T, S]."""
        t, s = i * self.times, j * self.keys
        return self.scores.seen(
            self._at(t, self.times),
            self._at(s, self.keys),
            t + jnp.arange(self.times, dtype=jnp.int32),
            s + jnp.arange(self.keys, dtype=jnp.int32),
        )

    def _at(self, start: Int[Array, ""], size: int) -> Documents:
        cut = (None if x is None else jax.lax.dynamic_slice_in_dim(x, start, size, axis=1) for x in self.documents)
        return Documents(*cut)

    def span(self, i: Int[Array, ""]) -> tuple[Array, Array]:
        """The first tile of keys that a query of block i may see, and the one after the last."""
        first, last = i * self.times, (i + 1) * self.times  # of the keys
        window, all_before = self.scores.window, self.scores.all_before(self.documents)
        low = first - window + 1 if window else 0
        high = last if all_before else last + window - 1 if window else self.length
        low, high = jnp.maximum(low, 0) // self.keys, (jnp.minimum(high, self.length) + self.keys - 1) // self.keys
        if self.nearest is None:
            return low, high
        return jnp.maximum(low, self.nearest[0][i]), jnp.minimum(high, self.nearest[1][i])


def _rows(memory: Memory | None, rows: Rows) -> tuple[Array, Array] | None:
    return None if memory is None else memory.rows(rows.q.shape[0])


def _nearest(segments: Int[Array, "B T"], times: int, keys: int) -> tuple[Int[Array, " n"], Int[Array, " n"]] | None:
    """See _Tiles.nearest: by the lowest and highest number of a document in each. Where a row's numbers don't go up,
    some tiles are read that nobody sees."""
    if device_count() > 1:  # devices that have other rows would have to agree
        return None

    def ends(size: int) -> tuple[Int[Array, "B n"], Int[Array, "B n"]]:
        cut = segments.reshape(segments.shape[0], -1, size)
        return cut.min(axis=-1), cut.max(axis=-1)

    (low, high), (key_low, key_high) = ends(times), ends(keys)
    shared = (low[:, :, None] <= key_high[:, None]) & (key_low[:, None] <= high[:, :, None])
    shared = jnp.any(shared, axis=0)
    count = shared.shape[1]
    last = count - jnp.argmax(shared[:, ::-1], axis=1).astype(jnp.int32)
    return jnp.argmax(shared, axis=1).astype(jnp.int32), last
