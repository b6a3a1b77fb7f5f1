"""Decoding with a cache of keys and values: one pass over the prompts, then one token of every row at a time.

Rows are padded on the left, so that all of them write to the cache at the same index. Axes: B batch, P padded
length of the prompts, N new tokens, S = P + N entries of the cache, D model, V vocabulary, C candidates.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from research.devices import sharding
from research.errors import InputError
from research.models.transformer import Cache, Model
from research.ops.losses import Head

Params = Any
Generate = Callable[..., "Generated"]
Stream = Callable[[Params, Sequence[int], jax.Array], Iterator[list[int]]]

BATCHES_AT_ONCE = 8  # so many times batch_size prompts, a power of two, are the most in one call
_GROUPS = 8  # this part of the slots is refilled at once
_PIECE = 64  # tokens of a prompt that are read at once where slots are refilled
_SLACK = 32  # the least number of tokens between two shifts of the cache


@dataclasses.dataclass(frozen=True)
class SamplingConfig:
    """How the next token is chosen.

    The filters act in the order temperature, top_k, top_p, min_p (that of `generate` in transformers), each
    on what the one before it left, renormalised. All keep the likeliest token, so that they change nothing at
    temperature 0.

    Attributes:
      max_new_tokens: N, the most tokens that a row gets.
      temperature: logits are divided by it; 0 takes the likeliest token (of equals, the one of least id).
      top_k: keep this many of the likeliest tokens; 0 keeps all.
      top_p: keep the fewest of the likeliest tokens whose probabilities add up to this (arXiv:1904.09751). It sorts
        the vocabulary at every token; after a top_k it sorts only those.
      min_p: keep tokens at least this times as probable as the likeliest (arXiv:2407.01082).
      stop_tokens: ids that end a row.
    """

    max_new_tokens: int = 64
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    stop_tokens: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        def check(field: str, ok: bool, allowed: str) -> None:
            if not ok:
                raise InputError(f"sampling.{field} = {getattr(self, field)}: must be {allowed}.")

        check("max_new_tokens", self.max_new_tokens >= 1, "at least 1")
        check("temperature", 0 <= self.temperature < math.inf, "a number >= 0; 0 is greedy")
        check("top_k", self.top_k >= 0, "at least 0; 0 keeps all tokens")
        check("top_p", 0 < self.top_p <= 1, "in (0, 1]; 1 keeps all tokens")
        check("min_p", 0 <= self.min_p <= 1, "in [0, 1]; 0 keeps all tokens")
        check("stop_tokens", all(token >= 0 for token in self.stop_tokens), "token ids, which are >= 0")


class Generated(NamedTuple):
    """What a batch of prompts was continued with.

    Attributes:
      tokens: [B, N] int32; 0 after the end of a row.
      lengths: [B] int32, tokens of each row up to and including its stop token.
      logprobs: [B, N] float32, log-probability of each token under the model's softmax over the ids that may
        be chosen, before temperature and filters; 0 after the end of a row.
    """

    tokens: jax.Array
    lengths: jax.Array
    logprobs: jax.Array


class Completion(NamedTuple):
    """One row of Generated without what comes after its end."""

    tokens: list[int]
    logprobs: list[float]


class _Queue(NamedTuple):
    """What is to be continued: prompts [B, P], their lengths [B], the most new tokens of each [B], random keys [B]."""

    prompts: jax.Array
    lengths: jax.Array
    limits: jax.Array
    keys: jax.Array


class _State(NamedTuple):
    """Between two tokens of A slots, each of which holds one row of the queue."""

    index: jax.Array  # of the cache entry that all slots write next
    row: jax.Array  # [A] int32
    first: jax.Array  # [A] int32, where in the cache the row begins
    made: jax.Array  # [A] int32, new tokens of the row
    last: jax.Array  # [A] int32, the latest of them, which is not yet in the cache
    done: jax.Array  # [A] bool: the row has ended, or there is none
    cache: Cache
    out: Generated  # of the whole queue


def make_generate(model: Model, config: SamplingConfig, vocab_size: int | None = None) -> Generate:
    """Returns generate(params, prompts, lengths, key, rows=None, limits=None, *, slots=None) -> Generated, jitted.

    It takes
      params: of `model`, sharded as you like under the mesh of jax.set_mesh. The result is on every device.
      prompts: [B, P] int32, padded on the left (see `pad_prompts`); every new shape compiles.
      lengths: [B] int32, tokens of each prompt. A row of length 0 only fills the batch and gets nothing.
      key: random key.
      rows: [B] int32, by default 0 to B - 1. A row's token n is drawn with a key made of (key, its number
        here, n), so that it depends on no other row.
      limits: [B] int32, the most tokens of each row, where that is below N.
      slots: A, an int: the most rows that are decoded at once; None: all. Of more, the next takes the place of one that
        has ended (the iteration-level scheduling of Orca, OSDI 2022), the longest prompts first. Every row gets the
        same tokens, and the cache has room for A rows.

    Args:
      model: to decode with.
      config: how to choose tokens.
      vocab_size: ids from here on, which pad the model's vocabulary, are never chosen; None: there are none.

    Raises:
      InputError: `vocab_size` or a stop token is beyond the vocabulary, or there is no room for a prompt; when
        called, P + N > model.config.max_length, or `slots` is below 1.
    """
    steps = _make_steps(model, config, vocab_size)

    @functools.partial(jax.jit, static_argnames="slots")
    def generate(
        params: Params,
        prompts: jax.Array,
        lengths: jax.Array,
        key: jax.Array,
        rows: jax.Array | None = None,
        limits: jax.Array | None = None,
        *,
        slots: int | None = None,
    ) -> Generated:
        B, P = prompts.shape
        if slots is not None and slots < 1:
            raise InputError(f"slots = {slots}: must be at least 1. None decodes all prompts at once.")
        if longest_prompt(model, config) < P:
            raise InputError(
                f"prompts padded to {P} tokens and sampling.max_new_tokens = {config.max_new_tokens} make more than "
                f"model.max_length = {model.config.max_length}. Lower sampling.max_new_tokens, or shorten the prompts."
            )
        rows = jnp.arange(B) if rows is None else rows
        keys = jax.vmap(jax.random.fold_in, (None, 0))(key, rows)
        N = jnp.full(B, config.max_new_tokens, jnp.int32)
        limits = N if limits is None else jnp.minimum(N, limits)
        queue = _Queue(prompts, jnp.where(limits > 0, lengths, 0), limits, keys)
        params = model.unstack(params)
        out = _decode(steps, params, queue) if slots is None or slots >= B else _take_turns(steps, params, queue, slots)
        return jax.tree.map(lambda x: sharding.constrain(x, (None,) * x.ndim), out)

    return generate


def make_stream(
    model: Model, config: SamplingConfig, vocab_size: int | None = None, *, chunk: int = 8, bucket: int = 32
) -> Stream:
    """Returns stream(params, prompt ids, key): an iterator over the new tokens, at most `chunk` at a time.

    They are the tokens that `make_generate` gives in row 0. `params` are what model.unstack returns under jit,
    once for many prompts. Raises InputError as `make_generate` does and, when iterated over, as `pad_prompts`.
    """
    steps = _make_steps(model, config, vocab_size)
    limit = np.array([config.max_new_tokens], np.int32)

    @jax.jit
    def start(params: Params, queue: _Queue) -> _State:
        return steps.begin(params, queue)

    @functools.partial(jax.jit, donate_argnums=2)
    def more(params: Params, queue: _Queue, state: _State) -> _State:
        until = state.made[0] + chunk
        going = lambda state: ~state.done[0] & (state.made[0] < until)  # noqa: E731
        return jax.lax.while_loop(going, lambda state: steps.step(params, queue, state), state)

    def stream(params: Params, prompt: Sequence[int], key: jax.Array) -> Iterator[list[int]]:
        prompts, lengths = pad_prompts([prompt], bucket=bucket, longest=longest_prompt(model, config))
        queue = _Queue(prompts, lengths, limit, jax.random.fold_in(key, 0)[None])
        state = start(params, queue)
        given = 0
        while True:
            tokens, made, done = jax.device_get((state.out.tokens[0], state.made[0], state.done[0]))
            yield tokens[given:made].tolist()
            given = made
            if done:
                return
            state = more(params, queue, state)

    return stream


def longest_prompt(model: Model, config: SamplingConfig) -> int:
    """The most tokens that a prompt may have."""
    return model.config.max_length - config.max_new_tokens


def pad_prompts(
    prompts: Sequence[Sequence[int]], *, bucket: int = 32, longest: int | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Pads prompts on the left to `bucket` times a power of two, so that few shapes are compiled.

    Args:
      prompts: B lists of ids.
      bucket: the least P.
      longest: the most P, as `longest_prompt`; None is no bound.

    Returns:
      (prompts [B, P] int32, lengths [B] int32), for `make_generate`.

    Raises:
      InputError: a prompt is empty, or longer than `longest`.
    """
    _check_lengths(prompts, longest)
    lengths = np.array([len(prompt) for prompt in prompts], np.int32)
    size = bucket
    while size < lengths.max():
        size *= 2
    size = size if longest is None else min(size, longest)
    padded = np.zeros((len(prompts), size), np.int32)
    for row, prompt in zip(padded, prompts, strict=True):
        row[size - len(prompt) :] = prompt
    return padded, lengths


def generate_batches(
    generate: Generate,
    params: Params,
    prompts: Sequence[Sequence[int]],
    key: jax.Array,
    *,
    batch_size: int,
    bucket: int = 32,
    longest: int | None = None,
    first_row: int = 0,
    progress: Callable[[int], None] = lambda done: None,
) -> list[Completion]:
    """Continues any number of prompts, those of similar length together; returns their completions in order.

    Prompt i is row first_row + i of `generate` whatever call it falls into. A call takes batch_size prompts, or 2, 4 or
    8 times as many, which take turns; empty rows fill it up, so that there are at most four compilations for each
    padded length. All processes of a run call this together, with the same prompts.

    Args:
      generate: of `make_generate`.
      params: its parameters.
      prompts: lists of ids.
      key: random key.
      batch_size: prompts decoded at once; a multiple of the mesh's data and fsdp axes wastes nothing.
      bucket, longest: see `pad_prompts`.
      first_row: number of the first prompt, where these are a part of more.
      progress: called with the number of prompts done, after each call.

    Raises:
      InputError: see `pad_prompts`.
    """
    _check_lengths(prompts, longest)
    completions: dict[int, Completion] = {}
    by_length = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    for first in range(0, len(prompts), BATCHES_AT_ONCE * batch_size):
        rows = by_length[first : first + BATCHES_AT_ONCE * batch_size]
        padded, lengths = pad_prompts([prompts[i] for i in rows], bucket=bucket, longest=longest)
        size = batch_size
        while size < len(rows):
            size *= 2
        empty = size - len(rows)
        out = generate(
            params,
            np.pad(padded, ((0, empty), (0, 0))),
            np.pad(lengths, (0, empty)),
            key,
            np.pad(np.array(rows, np.int32) + np.int32(first_row), (0, empty)),
            slots=batch_size,
        )
        tokens, lengths, logprobs = jax.device_get(out)
        for row, i in enumerate(rows):
            completions[i] = Completion(tokens[row, : lengths[row]].tolist(), logprobs[row, : lengths[row]].tolist())
        progress(len(completions))
    return [completions[i] for i in range(len(prompts))]


def filter_logits(logits: jax.Array, config: SamplingConfig) -> tuple[jax.Array, jax.Array]:
    """Applies temperature (not 0), top_k, top_p and min_p to logits [B, V] float32.

    Returns:
      logits: [B, C] float32 of the candidates, -inf for those filtered out; C is top_k if that is set, else V.
      ids: [B, C] int32 of the candidates.
    """
    B, V = logits.shape
    logits = logits / config.temperature
    ids = jnp.broadcast_to(jnp.arange(V, dtype=jnp.int32)[None], (B, V))
    if config.top_k or config.top_p < 1:
        logits, ids = jax.lax.top_k(logits, min(config.top_k or V, V))
        p = jax.nn.softmax(logits, axis=1)
        before = jnp.cumsum(p, axis=1) - p
        logits = jnp.where(before < config.top_p, logits, -jnp.inf)
    if config.min_p:
        best = jnp.max(logits, axis=1, keepdims=True)
        logits = jnp.where(logits >= best + math.log(config.min_p), logits, -jnp.inf)
    return logits, ids


def _check_lengths(prompts: Sequence[Sequence[int]], longest: int | None) -> None:
    for i, prompt in enumerate(prompts):
        if not len(prompt):
            raise InputError(f"prompt {i}: is empty. Give at least one token to go on from.")
        if longest is not None and len(prompt) > longest:
            raise InputError(
                f"prompt {i}: has {len(prompt)} tokens, and there is room for {longest} (model.max_length "
                "less sampling.max_new_tokens). Shorten it, or lower sampling.max_new_tokens."
            )


class _Steps(NamedTuple):
    """The parts of decoding, on unstacked parameters.

    Attributes:
      begin: (params, queue) -> the _State of as many slots as there are rows, after the prompts and one new token.
      step: (params, queue, state) -> the state after one more token in every slot that isn't done.
      idle: (queue, slots) -> a state in which no slot has a row.
      refill: (params, queue, state, rows [R], count) -> the state after the first `count` of these rows have gone into
        slots that are done, of which there are at least as many.
      shift: (queue, state) -> the state after all of the cache has moved to the left as far as possible.
    """

    begin: Callable[[Params, _Queue], _State]
    step: Callable[[Params, _Queue, _State], _State]
    idle: Callable[[_Queue, int], _State]
    refill: Callable[[Params, _Queue, _State, jax.Array, jax.Array], _State]
    shift: Callable[[_Queue, _State], _State]


def _make_steps(model: Model, config: SamplingConfig, vocab_size: int | None) -> _Steps:
    N, max_length = config.max_new_tokens, model.config.max_length
    vocab_size = model.config.vocab_size if vocab_size is None else vocab_size
    if not 0 < vocab_size <= model.config.vocab_size:
        raise InputError(
            f"vocab_size = {vocab_size}: the model has {model.config.vocab_size} ids. Use the tokenizer that it "
            "was trained with."
        )
    for token in config.stop_tokens:
        if token >= vocab_size:
            raise InputError(f"sampling.stop_tokens: {token} is not below vocab_size = {vocab_size}. Leave it out.")
    if longest_prompt(model, config) < 1:
        raise InputError(
            f"sampling.max_new_tokens = {N}: leaves no room for a prompt in model.max_length = {max_length}. Lower it."
        )
    stops = np.array(config.stop_tokens, np.int32)

    def choose(params, queue, hidden, row, made, done, out):
        """The next token of rows [R] from their last hidden states [R, D]; returns (tokens, done, out)."""
        logits = _logits(model.unembed(params), hidden, vocab_size)
        tokens = _choose(logits, config, queue.keys[row], made)
        logprobs = jnp.take_along_axis(jax.nn.log_softmax(logits, axis=1), tokens[:, None], axis=1)[:, 0]
        row = jnp.where(done, len(out.lengths), row)  # beyond the end: written nowhere
        out = Generated(
            tokens=out.tokens.at[row, made].set(tokens, mode="drop"),
            lengths=out.lengths.at[row].set(made + 1, mode="drop"),
            logprobs=out.logprobs.at[row, made].set(logprobs, mode="drop"),
        )
        return tokens, done | jnp.isin(tokens, stops) | (made + 1 >= queue.limits[row]), out

    def read(params, prompts, lengths, cache, index, size):
        """Puts entries index to index + size of prompts [R, P] into the cache; returns ([R, size, D], cache)."""
        S = _cache_size(cache)
        first = (prompts.shape[1] - lengths)[:, None, None]
        t, s = index + jnp.arange(size)[None, :, None], jnp.arange(S)[None, None, :]
        # Padding sees itself: a softmax over nothing would put NaN into the cache.
        mask = ((first <= s) & (s <= t)) | (s == t)
        positions = jnp.maximum(t - first, 0)[:, :, 0]
        tokens = jax.lax.dynamic_slice_in_dim(prompts, index, size, axis=1)
        return model.decode(params, tokens, positions, mask, cache, index)

    def empty(queue):
        B = len(queue.lengths)
        return Generated(jnp.zeros((B, N), jnp.int32), jnp.zeros(B, jnp.int32), jnp.zeros((B, N), jnp.float32))

    def begin(params, queue):
        B, P = queue.prompts.shape
        row, made, done, out = jnp.arange(B), jnp.zeros(B, jnp.int32), queue.lengths == 0, empty(queue)
        hidden, cache = read(params, queue.prompts, queue.lengths, model.init_cache(B, P + N), 0, P)
        last, done, out = choose(params, queue, hidden[:, -1], row, made, done, out)
        return _State(jnp.int32(P), row, P - queue.lengths, made + 1, last, done, cache, out)

    def step(params, queue, state):
        index, first = state.index, state.first[:, None, None]
        s = jnp.arange(_cache_size(state.cache))[None, None, :]
        mask, positions = (first <= s) & (s <= index), index - first[:, :, 0]
        hidden, cache = model.decode(params, state.last[:, None], positions, mask, state.cache, index)
        last, done, out = choose(params, queue, hidden[:, 0], state.row, state.made, state.done, state.out)
        return _State(index + 1, state.row, state.first, state.made + 1, last, done, cache, out)

    def idle(queue, slots):
        P = queue.prompts.shape[1]
        none = jnp.zeros(slots, jnp.int32)
        cache = model.init_cache(slots, P + N + max(_SLACK, (P + N) // 8))
        return _State(jnp.int32(P), none, none + P, none, none, jnp.ones(slots, bool), cache, empty(queue))

    def refill(params, queue, state, rows, count):
        (R,), P = rows.shape, queue.prompts.shape[1]
        done = jnp.arange(R) >= count
        lengths = jnp.where(done, 0, queue.lengths[rows])
        # In pieces, so that short prompts cost little. LongRoPE has to see all of a prompt to choose its factors.
        size = P if P % _PIECE or model.config.rope_scaling.kind == "longrope" else _PIECE
        piece = functools.partial(read, params, queue.prompts[rows], lengths, size=size)
        cache = model.init_cache(R, P)
        hidden = jax.eval_shape(piece, cache, 0)[0]
        hidden, cache = jax.lax.fori_loop(
            (P - jnp.max(lengths)) // size,
            P // size,
            lambda i, carry: piece(carry[1], i * size),
            (jnp.zeros(hidden.shape, hidden.dtype), cache),
        )
        made = jnp.zeros(R, jnp.int32)
        last, ended, out = choose(params, queue, hidden[:, -1], rows, made, done, state.out)

        free = jnp.argsort(~state.done)[:R]

        def place(i, big):  # a prompt's last entry is just before what all slots write next
            return jax.tree.map(
                lambda big, new: jax.lax.dynamic_update_slice(
                    big,
                    jax.lax.dynamic_slice_in_dim(new, i, 1),
                    (free[i], *(0,) * (big.ndim - 3), state.index - P, 0),
                ),
                big,
                cache,
            )

        into = jnp.where(done, len(state.row), free)
        put = lambda old, new: old.at[into].set(new, mode="drop")  # noqa: E731
        return _State(
            index=state.index,
            row=put(state.row, rows),
            first=put(state.first, state.index - lengths),
            made=put(state.made, made + 1),
            last=put(state.last, last),
            done=put(state.done, ended),
            cache=jax.lax.fori_loop(0, count, place, state.cache),
            out=out,
        )

    def shift(queue, state):
        by = jnp.min(jnp.where(state.done, state.index, state.first))
        by = jnp.minimum(by, state.index - queue.prompts.shape[1])
        cache = jax.tree.map(lambda x: jnp.roll(x, -by, axis=-2), state.cache)
        return state._replace(index=state.index - by, first=state.first - by, cache=cache)

    return _Steps(begin, step, idle, refill, shift)


def _cache_size(cache: Cache) -> int:
    """S: the axis before the last of its arrays."""
    return jax.tree.leaves(cache)[0].shape[-2]


def _decode(steps: _Steps, params: Params, queue: _Queue) -> Generated:
    """All rows at once, until all are done."""
    state = steps.begin(params, queue)
    going = lambda state: ~jnp.all(state.done)  # noqa: E731
    return jax.lax.while_loop(going, lambda state: steps.step(params, queue, state), state).out


def _take_turns(steps: _Steps, params: Params, queue: _Queue, slots: int) -> Generated:
    """As many rows at once as there are slots.

    Some are put into slots together, once as many are free. Loops stand for conditions, since XLA may copy the cache
    into a lax.cond.
    """
    P = queue.prompts.shape[1]
    padded = -(-P // _PIECE) * _PIECE if P > _PIECE else P
    queue = queue._replace(prompts=jnp.pad(queue.prompts, ((0, 0), (padded - P, 0))))
    parts = sharding.num_parts(sharding.RULES["batch"])
    group = min(slots, -(-slots // (_GROUPS * parts)) * parts)
    order = jnp.pad(jnp.argsort(-queue.lengths), (0, group))
    total = jnp.sum(queue.lengths > 0)

    def wanted(begun, state):
        left = total - begun
        return (left > 0) & (jnp.sum(state.done) >= jnp.minimum(group, left))

    def refill(carry):
        begun, state = carry
        count = jnp.minimum(group, total - begun)
        rows = jax.lax.dynamic_slice_in_dim(order, begun, group)
        return begun + count, steps.refill(params, queue, state, rows, count)

    def full(state):
        return state.index == _cache_size(state.cache)

    def turn(carry):
        begun, state = jax.lax.while_loop(lambda carry: wanted(*carry), refill, carry)
        state = jax.lax.while_loop(full, lambda state: steps.shift(queue, state), state)
        going = lambda state: ~jnp.all(state.done) & ~full(state) & ~wanted(begun, state)  # noqa: E731
        return begun, jax.lax.while_loop(going, lambda state: steps.step(params, queue, state), state)

    going = lambda carry: (carry[0] < total) | ~jnp.all(carry[1].done)  # noqa: E731
    return jax.lax.while_loop(going, turn, (jnp.int32(0), steps.idle(queue, slots)))[1].out


def _logits(head: Head, hidden: jax.Array, vocab_size: int) -> jax.Array:
    """[B, D] -> [B, V] float32, -inf from `vocab_size` on."""
    logits = jnp.dot(hidden, head.kernel.astype(hidden.dtype), preferred_element_type=jnp.float32)
    if head.bias is not None:
        logits += head.bias.astype(jnp.float32)[None]
    if head.softcap:
        logits = head.softcap * jnp.tanh(logits / head.softcap)
    return jnp.where(jnp.arange(logits.shape[1])[None] < vocab_size, logits, -jnp.inf)


def _choose(logits: jax.Array, config: SamplingConfig, keys: jax.Array, made: jax.Array) -> jax.Array:
    """Token number made[i] of each row, [B] int32, from logits [B, V]."""
    if config.temperature == 0:
        return _argmax(logits)
    logits, ids = filter_logits(logits, config)
    keys = jax.vmap(jax.random.fold_in)(keys, made)
    noise = jax.vmap(lambda key: jax.random.gumbel(key, logits.shape[1:], logits.dtype))(keys)
    drawn = _argmax(logits + noise)  # the Gumbel-max trick, which is jax.random.categorical
    return jnp.take_along_axis(ids, drawn[:, None], axis=1)[:, 0]


def _argmax(x: jax.Array) -> jax.Array:
    """jnp.argmax of x [B, V] along V, [B] int32. Two passes that use all lanes of a CPU, where XLA's one uses none."""
    V = x.shape[1]
    best = jnp.max(x, axis=1, keepdims=True)
    return jnp.min(jnp.where(x == best, jnp.arange(V, dtype=jnp.int32)[None], V - 1), axis=1)
