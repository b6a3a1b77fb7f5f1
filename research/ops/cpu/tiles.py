"""Attention for CPUs over long rows: loops over tiles of scores that stay in the cache.

Both passes are FlashAttention's (arXiv:2205.14135, arXiv:2307.08691): running maxima and sums forward, and backward one
pass over tiles, keys outside and queries within. Memory is O(T), and the program as long at every T. Tiles that no
query sees any key of are left out, and those that all see whole have no mask.

Axes: see ops/scores.py; N tiles of T.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, PyTree

from research.devices.sharding import device_count
from research.ops.scores import MASKED, Documents, Memory, Scores, dot, grouped, masked, to_heads, to_rows

# Scores of a tile, for one head of keys: smaller products run on one core, larger ones leave the cache.
_SCORES = 2**17
_HEADS = 8  # of keys, at most, in a tile
_MULTIPLE = 16  # of a tile's times: whole vectors
_NOWHERE = -(2**31)  # the segment of what T is padded with


class Rows(NamedTuple):
    """What is read of some rows of a batch."""

    q: Float[Array, "B T H h"]
    k: Float[Array, "B T K h"]
    v: Float[Array, "B T K h"]
    documents: Documents


class Bounds(NamedTuple):
    """The tiles along one axis that a tile of the other has to do with: from `first` to before `stop`.

    Attributes:
      first, stop: of all.
      whole, partial: from `whole` to before `partial` no score is masked.
    """

    first: Int[Array, "..."]
    whole: Int[Array, "..."]
    partial: Int[Array, "..."]
    stop: Int[Array, "..."]

    def run(self, tile: Callable[[bool, Int[Array, ""], PyTree], PyTree], carry: PyTree) -> PyTree:
        """tile(has a mask, number, carry) -> carry, of all tiles in turn."""
        before = self.whole - self.first

        def with_mask(n: Int[Array, ""], carry: PyTree) -> PyTree:
            return tile(True, jnp.where(n < before, self.first + n, self.partial + n - before), carry)

        carry = jax.lax.fori_loop(self.whole, self.partial, lambda n, carry: tile(False, n, carry), carry)
        return jax.lax.fori_loop(0, before + self.stop - self.partial, with_mask, carry)


def size(T: int, group: int) -> int:
    """Times of a tile, of queries as of keys, for G heads that share keys."""
    count = -(-T // int(math.sqrt(_SCORES / group)))
    return _MULTIPLE * -(-T // (count * _MULTIPLE))


def outputs(
    scores: Scores, memory: Memory | None, rows: Rows
) -> tuple[Float[Array, "B T H h"], Float[Array, "B K R 1"]]:
    """The result, and the logarithms of the sums of exponentials.

    On several devices B and K aren't cut, and all rows run the same tiles.
    """
    T, tiles = rows.q.shape[1], _Tiles.of(scores, memory, rows)
    bounds = tiles.bounds(of_keys=False)
    out = jnp.zeros(tiles.q.shape, rows.q.dtype)
    logsumexp = jnp.zeros((*tiles.q.shape[:3], 1), jnp.float32)

    def step(n: Int[Array, ""], carry: PyTree) -> PyTree:
        b, k, i = tiles.place(n)
        q, documents = tiles.queries(tiles.q, b, k, i), tiles.documents(b, i)

        def tile(has_mask: bool, j: Int[Array, ""], carry: PyTree) -> PyTree:
            top, total, out = carry
            s = tiles.scores_of(q, tiles.keys(tiles.k, b, k, j))
            mask = tiles.mask(documents, i, tiles.documents(b, j), j) if has_mask else None
            new_top = jnp.maximum(top, _hide(s, mask).max(axis=-1, keepdims=True))
            p = _hide(tiles.exp(s, new_top * tiles.factor), mask, 0.0)
            kept = jnp.exp((top - new_top) * tiles.factor)
            v = tiles.keys(tiles.v, b, k, j)
            total = total * kept + p.sum(axis=-1, keepdims=True)
            return new_top, total, out * kept + dot("bkrs,bksh->bkrh", p.astype(v.dtype), v)

        top, total, of_tile = _at(bounds, b, i).run(tile, tiles.of_memory(q, k))
        start = (b, k, i * q.shape[2], 0)
        out, logsumexp = carry
        out = jax.lax.dynamic_update_slice(out, (of_tile / total).astype(out.dtype), start)
        return out, jax.lax.dynamic_update_slice(logsumexp, top * tiles.factor + jnp.log(total), start)

    out, logsumexp = jax.lax.fori_loop(0, tiles.count, step, (out, logsumexp))
    R = T * tiles.group
    return to_heads(out[:, :, :R], T), logsumexp[:, :, :R]


def gradients(
    scores: Scores,
    memory: Memory | None,
    rows: Rows,
    out: Float[Array, "B T H h"],
    logsumexp: Float[Array, "B K R 1"],
    d_out: Float[Array, "B T H h"],
) -> tuple[Float[Array, "B T H h"], Float[Array, "B T K h"], Float[Array, "B T K h"], Float[Array, "B 2 K h P"] | None]:
    """The gradients by q, k and v, and those by the memory of each row, None without one."""
    T, tiles = rows.q.shape[1], _Tiles.of(scores, memory, rows)
    bounds = tiles.bounds(of_keys=True)
    K = rows.k.shape[2]
    delta = dot("bthd,bthd->bth", d_out, out)[..., None]
    d_rows, delta = (tiles.padded(to_rows(x, K), tiles.group) for x in (d_out, delta))
    logsumexp = tiles.padded(logsumexp, tiles.group)
    dq, d_memory = tiles.memory_gradients(d_rows, logsumexp, delta)
    dk = dv = jnp.zeros(tiles.k.swapaxes(2, 3).shape, jnp.float32)

    def step(n: Int[Array, ""], carry: PyTree) -> PyTree:
        b, k, j = tiles.place(n)
        keys, values, documents = tiles.keys(tiles.k, b, k, j), tiles.keys(tiles.v, b, k, j), tiles.documents(b, j)

        def tile(has_mask: bool, i: Int[Array, ""], carry: PyTree) -> PyTree:
            dq, dk, dv = carry
            q, d_tile = tiles.queries(tiles.q, b, k, i), tiles.queries(d_rows, b, k, i)
            s = tiles.scores_of(q, keys)
            mask = tiles.mask(tiles.documents(b, i), i, documents, j) if has_mask else None
            p = _hide(tiles.exp(s, tiles.queries(logsumexp, b, k, i)), mask, 0.0)
            dp = dot("bkrh,bksh->bkrs", d_tile, values)
            ds = tiles.score_gradients(s, p, dp, tiles.queries(delta, b, k, i))
            p, ds = p.astype(values.dtype), ds.astype(q.dtype)
            own = tiles.queries(dq, b, k, i) + dot("bkrs,bksh->bkrh", ds, keys)
            dq = jax.lax.dynamic_update_slice(dq, own, (b, k, i * q.shape[2], 0))
            # [h, S] and not [S, h]: the operand that has to be transposed is the small one.
            return dq, dk + dot("bkrh,bkrs->bkhs", q, ds), dv + dot("bkrh,bkrs->bkhs", d_tile, p)

        dq, dk, dv = carry
        zeros = jnp.zeros(keys.swapaxes(2, 3).shape, jnp.float32)
        dq, dk_tile, dv_tile = _at(bounds, b, j).run(tile, (dq, zeros, zeros))
        start = (b, k, 0, j * tiles.size)
        return dq, *(jax.lax.dynamic_update_slice(x, y, start) for x, y in ((dk, dk_tile), (dv, dv_tile)))

    dq, dk, dv = jax.lax.fori_loop(0, tiles.count, step, (dq, dk, dv))
    dq = to_heads((dq * scores.scale).astype(rows.q.dtype)[:, :, : T * tiles.group], T)
    dk, dv = (x[..., :T].transpose(0, 3, 1, 2) for x in (dk * scores.scale, dv))
    return dq, dk.astype(rows.k.dtype), dv.astype(rows.v.dtype), d_memory


@dataclasses.dataclass(frozen=True)
class _Tiles:
    """Queries, keys and values with T padded to whole tiles, and how they are cut.

    Attributes:
      scores, memory: see ops.cpu.attention.
      q, k, v: heads first.
      all_documents: of the rows, padded likewise.
      size: times of a tile.
      shape: rows of the batch and heads of keys that a tile has.
      group: G.
    """

    scores: Scores
    memory: Memory | None
    q: Float[Array, "B K R h"]
    k: Float[Array, "B K T h"]
    v: Float[Array, "B K T h"]
    all_documents: Documents
    size: int
    shape: tuple[int, int]
    group: int

    @classmethod
    def of(cls, scores: Scores, memory: Memory | None, rows: Rows) -> "_Tiles":
        q, k, v, documents = rows
        (B, T, H, _), K = q.shape, k.shape[2]
        group = H // K
        length = size(T, group)
        behind = ((0, 0), (0, -T % length))
        segments = jnp.pad(documents.segments, behind, constant_values=_NOWHERE)
        documents = Documents(segments, None if documents.prefix is None else jnp.pad(documents.prefix, behind))
        heads = max(n for n in range(1, _HEADS + 1) if K % n == 0)
        tiles = cls(scores, memory, q, k, v, documents, length, (B, K) if device_count() > 1 else (1, heads), group)
        q, k, v = to_rows(q, K), k.swapaxes(1, 2), v.swapaxes(1, 2)
        return dataclasses.replace(tiles, q=tiles.padded(q, group), k=tiles.padded(k), v=tiles.padded(v))

    def padded(self, x: Float[Array, "B K R n"], group: int = 1) -> Float[Array, "B K R n"]:
        return jnp.pad(x, ((0, 0), (0, 0), (0, -x.shape[2] % (self.size * group)), (0, 0)))

    @property
    def number(self) -> int:
        """N."""
        return self.k.shape[2] // self.size

    @property
    def count(self) -> int:
        """Of all tiles along one axis."""
        return self.number * (self.k.shape[0] // self.shape[0]) * (self.k.shape[1] // self.shape[1])

    def place(self, n: Int[Array, ""]) -> tuple[Int[Array, ""], Int[Array, ""], Int[Array, ""]]:
        """Row of the batch, head and number of the n-th tile."""
        if self.shape == self.k.shape[:2]:  # said so, or an axis that is cut over devices would be gathered
            return (zero := jnp.int32(0)), zero, n
        heads = self.k.shape[1] // self.shape[1]
        n, i = n // self.number, n % self.number
        return n // heads * self.shape[0], n % heads * self.shape[1], i

    def queries(
        self, x: Float[Array, "B K R n"], b: Int[Array, ""], k: Int[Array, ""], i: Int[Array, ""]
    ) -> Float[Array, "b k r n"]:
        """The i-th tile of what there is for each query."""
        length = self.size * self.group
        return jax.lax.dynamic_slice(x, (b, k, i * length, 0), (*self.shape, length, x.shape[3]))

    def keys(
        self, x: Float[Array, "B K T n"], b: Int[Array, ""], k: Int[Array, ""], j: Int[Array, ""]
    ) -> Float[Array, "b k s n"]:
        return jax.lax.dynamic_slice(x, (b, k, j * self.size, 0), (*self.shape, self.size, x.shape[3]))

    def documents(self, b: Int[Array, ""], i: Int[Array, ""]) -> Documents:
        def cut(x: Array) -> Array:
            return jax.lax.dynamic_slice(x, (b, i * self.size), (self.shape[0], self.size))

        return jax.tree.map(cut, self.all_documents)

    def mask(self, queries: Documents, i: Int[Array, ""], keys: Documents, j: Int[Array, ""]) -> Bool[Array, "b t s"]:
        times = jnp.arange(self.size, dtype=jnp.int32)
        return self.scores.seen(queries, keys, i * self.size + times, j * self.size + times)

    def scores_of(self, q: Float[Array, "b k r h"], keys: Float[Array, "b k s h"]) -> Float[Array, "b k r s"]:
        """Scores before the mask, which are yet to be multiplied by `factor`."""
        s = dot("bkrh,bksh->bkrs", q, keys)
        return self.scores.of_products(s) if self.scores.softcap else s

    @property
    def factor(self) -> float:
        return 1.0 if self.scores.softcap else self.scores.scale

    def exp(self, s: Float[Array, "b k r s"], less: Float[Array, "b k r 1"]) -> Float[Array, "b k r s"]:
        """exp(s * factor - less), computed in another shape than that of products: see ops.cpu.attention."""
        return jnp.exp(grouped(s, self.group) * self.factor - grouped(less, self.group)).reshape(s.shape)

    def score_gradients(
        self,
        s: Float[Array, "b k r s"],
        p: Float[Array, "b k r s"],
        dp: Float[Array, "b k r s"],
        delta: Float[Array, "b k r 1"],
    ) -> Float[Array, "b k r s"]:
        """The gradient by the scaled products."""
        G = self.group
        ds = (grouped(p, G) * (grouped(dp, G) - grouped(delta, G))).reshape(p.shape)
        return ds * (1 - (s / self.scores.softcap) ** 2) if self.scores.softcap else ds

    def of_memory(
        self, q: Float[Array, "b k r h"], k: Int[Array, ""]
    ) -> tuple[Float[Array, "b k r 1"], Float[Array, "b k r 1"], Float[Array, "b k r h"]]:
        """What `outputs` begins with: maxima, sums of exponentials and products, of the memory if there is one."""
        if self.memory is None:
            one = (*q.shape[:3], 1)
            return jnp.full(one, MASKED), jnp.zeros(one, jnp.float32), jnp.zeros(q.shape, jnp.float32)
        keys, values = (
            jax.lax.dynamic_slice_in_dim(x, k, self.shape[1], axis=1) for x in self.memory.rows(self.shape[0])
        )
        s = self.scores_of(q, keys)
        top = s.max(axis=-1, keepdims=True)
        p = self.exp(s, top * self.factor)
        return top, p.sum(axis=-1, keepdims=True), dot("bkrs,bksh->bkrh", p.astype(values.dtype), values)

    def memory_gradients(
        self, d_rows: Float[Array, "B K R h"], logsumexp: Float[Array, "B K R 1"], delta: Float[Array, "B K R 1"]
    ) -> tuple[Float[Array, "B K R h"], Float[Array, "B 2 K h P"] | None]:
        """What the gradient by the queries begins with, before `scale`, and that by the memory: 0 and None without."""
        if self.memory is None:
            return jnp.zeros(self.q.shape, jnp.float32), None
        keys, values = self.memory.rows(self.q.shape[0])
        s = self.scores_of(self.q, keys)
        p = self.exp(s, logsumexp)
        ds = self.score_gradients(s, p, dot("bkrh,bksh->bkrs", d_rows, values), delta).astype(keys.dtype)
        by_memory = dot("bkrh,bkrs->bkhs", self.q, ds), dot("bkrh,bkrs->bkhs", d_rows, p.astype(values.dtype))
        return dot("bkrs,bksh->bkrh", ds, keys), jnp.stack(by_memory, axis=1)

    def bounds(self, *, of_keys: bool) -> Bounds:
        """For each tile of queries those of keys, [rows, N], or for each of keys those of queries."""
        seen, whole = self._relations()
        if of_keys:
            seen, whole = seen.swapaxes(1, 2), whole.swapaxes(1, 2)
        N, index = self.number, jnp.arange(self.number, dtype=jnp.int32)[None, None]
        first = jnp.where(seen, index, N).min(axis=2)
        stop = jnp.where(seen, index + 1, 0).max(axis=2)
        start = jnp.where(whole, index, stop[..., None]).min(axis=2)
        end = jnp.where(~whole & (index >= start[..., None]), index, N).min(axis=2)
        return Bounds(first, start, jnp.maximum(start, jnp.minimum(end, stop)), stop)

    def _relations(self) -> tuple[Bool[Array, "B N N"], Bool[Array, "B N N"]]:
        """Whether any query of a tile may see any key of another, and whether all see all. Of [1, N, N] for all rows
        where a tile has several."""
        N, size, scores = self.number, self.size, self.scores
        index = jnp.arange(N, dtype=jnp.int32)
        ahead = ((index[:, None] - index[None]) * size)[None]  # of a tile's first query after the first key
        least, most = ahead - (size - 1), ahead + (size - 1)
        segments, prefix = self.all_documents
        if self.shape[0] == 1:
            # Of ascending numbers, but padding's, 0, which comes last and becomes the largest.
            tiles = (segments - 1).astype(jnp.uint32).reshape(-1, N, size)
            low, high = tiles.min(axis=2), tiles.max(axis=2)
            seen = (low[:, :, None] <= high[:, None]) & (low[:, None] <= high[:, :, None])
            whole = (low[:, :, None] == high[:, None]) & (low[:, None] == high[:, :, None])
        else:
            seen, whole = jnp.ones((1, N, N), bool), jnp.zeros((1, N, N), bool)
        if scores.causal:
            before = most >= 0
            if prefix is not None:
                ahead_too = prefix.reshape(-1, N, size).any(axis=2) if self.shape[0] == 1 else jnp.ones((1, N), bool)
                before = before | ahead_too[:, None]
            seen, whole = seen & before, whole & (least >= 0)
        if scores.window:
            seen = seen & (least < scores.window) & (most > -scores.window)
            whole = whole & (most < scores.window) & (least > -scores.window)
        return seen, whole


def _hide(
    s: Float[Array, "b k r s"], mask: Bool[Array, "b t s"] | None, value: float = MASKED
) -> Float[Array, "b k r s"]:
    """`masked`, and `s` without a mask."""
    return s if mask is None else masked(s, mask, value)


def _at(bounds: Bounds, b: Int[Array, ""], i: Int[Array, ""]) -> Bounds:
    """Those of one tile."""
    row = 0 if bounds.first.shape[0] == 1 else b
    return Bounds(*(x[row, i] for x in bounds))
