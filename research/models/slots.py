"""The steps of decoding: rows of a queue go into slots, get one token after the other, and give their slot to the next.

Rows are padded on the left, so that all of them write to the cache at the same index. Axes: B rows, P padded length of
the prompts, N new tokens, A slots (rows decoded at once), R rows put into slots together, S entries of the cache,
D model.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Key

from research.devices import sharding
from research.errors import InputError
from research.models import virtual
from research.models.decoding import TIMES, Cache
from research.models.sampling import SamplingConfig, choose_tokens, longest_prompt, next_logits, uniforms
from research.models.transformer import Model

Params = Any

_GROUPS = 8  # this part of the slots is refilled at once
_PIECE = 64  # tokens of a prompt that are read at once where slots are refilled
_SLACK = 32  # the least number of tokens between two shifts of the cache


class Generated(NamedTuple):
    """What a batch of prompts was continued with.

    Attributes:
      tokens: int32; 0 after the end of a row.
      lengths: int32, tokens of each row up to and including its stop token.
      logprobs: float32, log-probability of each token under the model's softmax over the ids that may be chosen,
        before temperature and filters; with Decoder.of_draws under the distribution that it was drawn from, after
        both. 0 after the end of a row. A subclass of Decoder may keep more: a tree of arrays [B, N, ...].
    """

    tokens: Int[Array, "B N"]
    lengths: Int[Array, " B"]
    logprobs: Float[Array, "B N"]


class Queue(NamedTuple):
    """The rows to continue.

    Attributes:
      prompts: int32, padded on the left; virtual tokens (models.virtual) come first in each.
      lengths: int32, tokens of each prompt; a row of length 0 gets nothing.
      limits: int32, the most new tokens of each row.
      uniforms: float32, the random numbers of each row's draws; see sampling.uniforms.
    """

    prompts: Int[Array, "B P"]
    lengths: Int[Array, " B"]
    limits: Int[Array, " B"]
    uniforms: Float[Array, "B N 2"]


class Slots(NamedTuple):
    """The state between two tokens. Each of A slots holds one row of the queue.

    Attributes:
      index: of the cache entry that all slots write next.
      row: which row of the queue each slot holds.
      first: where in the cache the row begins.
      count: new tokens of the row.
      last: the latest of them, which isn't in the cache yet.
      done: the row has ended, or the slot holds none.
      cache: keys and values of every slot.
      out: what all rows of the queue have got.
    """

    index: Int[Array, ""]
    row: Int[Array, " A"]
    first: Int[Array, " A"]
    count: Int[Array, " A"]
    last: Int[Array, " A"]
    done: Bool[Array, " A"]
    cache: Cache
    out: Generated


@dataclasses.dataclass(frozen=True, eq=False)
class Decoder:
    """The steps of decoding. Their `params` are what model.unstack returns.

    Attributes:
      model: to decode with.
      config: how to choose tokens.
      vocab_size: ids from here on are never chosen.
      of_draws: which log-probabilities are wanted: see Generated.

    Raises:
      InputError: `vocab_size` or a stop token is beyond the vocabulary, or there is no room for a prompt.
    """

    model: Model
    config: SamplingConfig
    vocab_size: int
    of_draws: bool = False

    def __post_init__(self) -> None:
        c = self.model.config
        if not 0 < self.vocab_size <= c.vocab_size:
            raise InputError(
                f"vocab_size = {self.vocab_size}: the model has {c.vocab_size} ids. Use the tokenizer that it was "
                "trained with."
            )
        for token in self.config.stop_tokens:
            if token >= self.vocab_size:
                raise InputError(
                    f"sampling.stop_tokens: {token} is not below vocab_size = {self.vocab_size}. Leave it out."
                )
        if longest_prompt(self.model, self.config) < 1:
            raise InputError(
                f"sampling.max_new_tokens = {self.config.max_new_tokens}: leaves no room for a prompt in "
                f"model.max_length = {self.model.max_length}. Lower it."
            )

    def generate(
        self,
        params: Params,
        prompts: Int[Array, "B P"],
        lengths: Int[Array, " B"],
        key: Key[Array, ""],
        rows: Int[Array, " B"] | None = None,
        limits: Int[Array, " B"] | None = None,
        *,
        slots: int | None = None,
        each: int = 1,
    ) -> Generated:
        """See make_generate; `params` as the model takes them."""
        P, B = prompts.shape[1], len(prompts) * each
        if slots is not None and slots < 1:
            raise InputError(f"slots = {slots}: must be at least 1. None decodes all prompts at once.")
        if longest_prompt(self.model, self.config) < P:
            raise InputError(
                f"prompts padded to {P} tokens and sampling.max_new_tokens = {self.config.max_new_tokens} make more "
                f"than model.max_length = {self.model.max_length}. Lower sampling.max_new_tokens, or shorten "
                "the prompts."
            )
        rows = jnp.arange(B) if rows is None else rows
        keys = jax.vmap(jax.random.fold_in, (None, 0))(key, rows)
        N = jnp.full(B, self.config.max_new_tokens, jnp.int32)
        limits = N if limits is None else jnp.minimum(N, limits)
        whole = slots is None or slots >= B
        parts = sharding.axis_parts("batch", self.model.rules)
        if not whole or len(prompts) % parts:  # a prompt's rows begin at other times, or each device has its own rows
            prompts, lengths, each = jnp.repeat(prompts, each, axis=0), jnp.repeat(lengths, each), 1
        wanted = jnp.max(limits.reshape(-1, each), axis=1) > 0
        prompts, lengths = virtual.ahead(self.model, prompts, jnp.where(wanted, lengths, 0))
        queue = Queue(prompts, lengths, limits, uniforms(keys, self.config.max_new_tokens))
        params = self.model.unstack(params, B if whole else slots)
        if whole:
            out = self.extend(params, queue, self.begin(params, queue, each)).out
        else:
            out = Turns.plan(self, params, queue, slots).run(slots)
        return jax.tree.map(sharding.replicate, out)

    def begin(self, params: Params, queue: Queue, each: int = 1) -> Slots:
        """As many slots as there are rows, after the prompts and one new token. Of prompts that have `each` rows one
        after the other, queue.prompts and queue.lengths have one: it is read once."""
        rows, P = queue.prompts.shape
        cache = self.model.init_cache(rows, P + self.config.max_new_tokens)
        hidden, cache = self._read(params, queue.prompts, queue.lengths, cache, 0, P)
        hidden, lengths, cache = jax.tree.map(lambda x: _repeated(x, each), (hidden[:, -1], queue.lengths, cache))
        B = rows * each
        none, out = jnp.zeros(B, jnp.int32), self.empty(B)
        done = (lengths == 0) | (queue.limits == 0)
        slots = Slots(jnp.int32(P), jnp.arange(B), P - lengths, none, none, done, cache, out)
        return self._append(params, queue, slots, hidden)

    def step(self, params: Params, queue: Queue, slots: Slots) -> Slots:
        """One more token in every slot that isn't done."""
        index, first = slots.index, slots.first[:, None, None]
        s = jnp.arange(cache_size(slots.cache))[None, None, :]
        mask, positions = (first <= s) & (s <= index), index - first[:, :, 0]
        hidden, cache = self.model.decode(params, slots.last[:, None], positions, mask, slots.cache, index)
        return self._append(params, queue, slots._replace(index=index + 1, cache=cache), hidden[:, 0])

    def extend(self, params: Params, queue: Queue, slots: Slots, tokens: int | None = None) -> Slots:
        """Steps until all slots are done, or the first has `tokens` more."""
        until = None if tokens is None else slots.count[0] + tokens

        def goes_on(slots: Slots) -> Bool[Array, ""]:
            going = ~jnp.all(slots.done)
            return going if until is None else going & (slots.count[0] < until)

        return jax.lax.while_loop(goes_on, functools.partial(self.step, params, queue), slots)

    def idle(self, queue: Queue, slots: int) -> Slots:
        """Slots that hold no row; their cache has room for prompts, new tokens and some steps between two shifts."""
        P, N = queue.prompts.shape[1], self.config.max_new_tokens
        none = jnp.zeros(slots, jnp.int32)
        cache = self.model.init_cache(slots, P + N + max(_SLACK, (P + N) // 8))
        return Slots(
            jnp.int32(P), none, none + P, none, none, jnp.ones(slots, bool), cache, self.empty(len(queue.lengths))
        )

    def refill(
        self, params: Params, queue: Queue, slots: Slots, rows: Int[Array, " R"], count: Int[Array, ""]
    ) -> Slots:
        """Puts the first `count` of these rows into slots that are done, of which there are at least as many."""
        R = len(rows)
        unused = jnp.arange(R) >= count
        lengths = jnp.where(unused, 0, queue.lengths[rows])
        hidden, cache = self._read_in_pieces(params, queue.prompts[rows], lengths)
        none = jnp.zeros(R, jnp.int32)
        new = Slots(slots.index, rows, slots.index - lengths, none, none, unused, cache, slots.out)
        new = self._append(params, queue, new, hidden)
        free = jnp.argsort(~slots.done)[:R]
        into = jnp.where(unused, len(slots.row), free)  # beyond the end: written nowhere
        put = lambda old, new: old.at[into].set(new, mode="drop")  # noqa: E731
        return Slots(
            index=slots.index,
            row=put(slots.row, new.row),
            first=put(slots.first, new.first),
            count=put(slots.count, new.count),
            last=put(slots.last, new.last),
            done=put(slots.done, new.done),
            cache=_copy_rows(slots.cache, cache, free, count, slots.index - queue.prompts.shape[1]),
            out=new.out,
        )

    def shift(self, queue: Queue, slots: Slots) -> Slots:
        """Moves the whole cache to the left as far as possible."""
        by = jnp.min(jnp.where(slots.done, slots.index, slots.first))
        by = jnp.minimum(by, slots.index - queue.prompts.shape[1])
        cache = _of_entries(lambda times, x: jnp.roll(x, -by, axis=times), slots.cache)
        return slots._replace(index=slots.index - by, first=slots.first - by, cache=cache)

    def empty(self, rows: int) -> Generated:
        """What so many rows have got before their first token."""
        B, N = rows, self.config.max_new_tokens
        return Generated(jnp.zeros((B, N), jnp.int32), jnp.zeros(B, jnp.int32), jnp.zeros((B, N), jnp.float32))

    def choose(self, logits: Float[Array, "A V"], queue: Queue, slots: Slots) -> tuple[Int[Array, " A"], Any]:
        """The next token of every slot, and what Generated.logprobs keeps of it."""
        numbers = queue.uniforms.at[slots.row, slots.count].get(mode="clip")  # a row that is done counts on
        tokens, drawn = choose_tokens(logits, self.config, numbers)
        model = jnp.take_along_axis(jax.nn.log_softmax(logits, axis=1), tokens[:, None], axis=1)[:, 0]
        return tokens, drawn if self.of_draws else model

    def _append(self, params: Params, queue: Queue, slots: Slots, hidden: Float[Array, "A D"]) -> Slots:
        """Chooses the next token of every slot from its last hidden state, and writes it down unless it is done."""
        logits = next_logits(self.model.unembed(params), hidden, self.vocab_size)
        tokens, logprobs = self.choose(logits, queue, slots)
        row = jnp.where(slots.done, len(slots.out.lengths), slots.row)  # beyond the end: written nowhere
        count = slots.count + 1
        out = Generated(
            tokens=slots.out.tokens.at[row, slots.count].set(tokens, mode="drop"),
            lengths=slots.out.lengths.at[row].set(count, mode="drop"),
            logprobs=jax.tree.map(
                lambda old, new: old.at[row, slots.count].set(new, mode="drop"), slots.out.logprobs, logprobs
            ),
        )
        stops = jnp.isin(tokens, np.array(self.config.stop_tokens, np.int32))
        done = slots.done | stops | (count >= queue.limits[slots.row])
        return slots._replace(count=count, last=tokens, done=done, out=out)

    def _read(
        self,
        params: Params,
        prompts: Int[Array, "R P"],
        lengths: Int[Array, " R"],
        cache: Cache,
        index: Int[Array, ""] | int,
        size: int,
    ) -> tuple[Float[Array, "R size D"], Cache]:
        """Puts tokens index to index + size of prompts into the cache; returns their hidden states too.

        A prefix LM sees each prompt whole, which must then be one piece.
        """
        first = (prompts.shape[1] - lengths)[:, None, None]
        t, s = index + jnp.arange(size)[None, :, None], jnp.arange(cache_size(cache))[None, None, :]
        # Padding sees itself: a softmax over nothing would put NaN into the cache.
        last = jnp.where(first <= t, prompts.shape[1] - 1, t) if self.model.config.prefix else t
        mask = ((first <= s) & (s <= last)) | (s == t)
        positions = jnp.maximum(t - first, 0)[:, :, 0]
        tokens = jax.lax.dynamic_slice_in_dim(prompts, index, size, axis=1)
        return self.model.decode(params, tokens, positions, mask, cache, index)

    def _read_in_pieces(
        self, params: Params, prompts: Int[Array, "R P"], lengths: Int[Array, " R"]
    ) -> tuple[Float[Array, "R D"], Cache]:
        """The prompts' last hidden states and their cache. Pieces that are padding in all rows are left out."""
        R, P = prompts.shape
        c = self.model.config
        # A prefix LM's prompts see themselves whole, and LongRoPE has to see all of one to choose its factors.
        size = P if P % _PIECE or c.prefix or c.rope_scaling.kind == "longrope" else _PIECE
        piece = functools.partial(self._read, params, prompts, lengths, size=size)
        cache = self.model.init_cache(R, P)
        hidden = jax.eval_shape(piece, cache, 0)[0]
        hidden, cache = jax.lax.fori_loop(
            (P - jnp.max(lengths)) // size,
            P // size,
            lambda i, carry: piece(carry[1], i * size),
            (jnp.zeros(hidden.shape, hidden.dtype), cache),
        )
        return hidden[:, -1], cache


@dataclasses.dataclass(frozen=True, eq=False)
class Turns:
    """Decoding of a queue in fewer slots than it has rows.

    A row that ends gives its slot to the next (the iteration-level scheduling of Orca, OSDI 2022), the longest prompts
    first. Some are put into slots together, once as many are free. Loops stand for conditions, since XLA may copy the
    cache into a lax.cond.

    Attributes:
      decoder, params, queue: see Decoder; prompts of more than one piece are padded to whole pieces.
      order: rows in the order in which they get a slot, and some places of padding.
      total: how many rows there are to continue.
      group: R, the most rows that are put into slots together.
    """

    decoder: Decoder
    params: Params
    queue: Queue
    order: Int[Array, " B+R"]
    total: Int[Array, ""]
    group: int

    @classmethod
    def plan(cls, decoder: Decoder, params: Params, queue: Queue, slots: int) -> "Turns":
        P = queue.prompts.shape[1]
        padded = -(-P // _PIECE) * _PIECE if P > _PIECE else P
        queue = queue._replace(prompts=jnp.pad(queue.prompts, ((0, 0), (padded - P, 0))))
        parts = sharding.axis_parts("batch", decoder.model.rules)
        group = min(slots, -(-slots // (_GROUPS * parts)) * parts)
        order = jnp.pad(jnp.argsort(-queue.lengths), (0, group))
        return cls(decoder, params, queue, order, jnp.sum(queue.lengths > 0), group)

    def run(self, slots: int) -> Generated:
        """Decodes all rows, at most `slots` of them at once."""
        start = (jnp.int32(0), self.decoder.idle(self.queue, slots))
        return jax.lax.while_loop(self._goes_on, self._turn, start)[1].out

    def _goes_on(self, carry: tuple[jax.Array, Slots]) -> Bool[Array, ""]:
        begun, slots = carry
        return (begun < self.total) | ~jnp.all(slots.done)

    def _turn(self, carry: tuple[jax.Array, Slots]) -> tuple[jax.Array, Slots]:
        """Fills free slots, makes room in the cache, and steps until one or the other is needed again."""
        begun, slots = jax.lax.while_loop(self._has_room, self._refill, carry)
        slots = jax.lax.while_loop(self._is_full, functools.partial(self.decoder.shift, self.queue), slots)

        def goes_on(slots: Slots) -> Bool[Array, ""]:
            return ~jnp.all(slots.done) & ~self._is_full(slots) & ~self._has_room((begun, slots))

        step = functools.partial(self.decoder.step, self.params, self.queue)
        return begun, jax.lax.while_loop(goes_on, step, slots)

    def _has_room(self, carry: tuple[jax.Array, Slots]) -> Bool[Array, ""]:
        """Rows are left, and a group of slots, or as many as there are rows left, is free."""
        begun, slots = carry
        left = self.total - begun
        return (left > 0) & (jnp.sum(slots.done) >= jnp.minimum(self.group, left))

    def _refill(self, carry: tuple[jax.Array, Slots]) -> tuple[jax.Array, Slots]:
        begun, slots = carry
        count = jnp.minimum(self.group, self.total - begun)
        rows = jax.lax.dynamic_slice_in_dim(self.order, begun, self.group)
        return begun + count, self.decoder.refill(self.params, self.queue, slots, rows, count)

    def _is_full(self, slots: Slots) -> Bool[Array, ""]:
        return slots.index == cache_size(slots.cache)


def _repeated(x: Array, each: int) -> Array:
    """Each row of x so many times, one after the other."""
    return x if each == 1 else jnp.repeat(x, each, axis=0)


def cache_size(cache: Cache) -> int:
    """S."""
    return cache[0][0].shape[TIMES[0]]


def _of_entries(function: Callable[..., Array], *caches: Cache) -> Cache:
    """function(axis of times, array of each cache), of all keys and values."""
    return tuple(tuple(map(function, TIMES, *entries)) for entries in zip(*caches, strict=True))


def _copy_rows(cache: Cache, new: Cache, into: Int[Array, " R"], count: Int[Array, ""], index: Int[Array, ""]) -> Cache:
    """`cache` with the first `count` rows of `new` at rows `into`, from entry `index` on."""

    def copy(i: jax.Array, cache: Cache) -> Cache:
        def one(times: int, old: Array, new: Array) -> Array:
            start = [into[i], *(0,) * (old.ndim - 1)]
            start[times] = index
            return jax.lax.dynamic_update_slice(old, jax.lax.dynamic_slice_in_dim(new, i, 1), start)

        return _of_entries(one, cache, new)

    return jax.lax.fori_loop(0, count, copy, cache)
