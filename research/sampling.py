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

from research import sharding
from research.errors import InputError
from research.models.transformer import Cache, Model
from research.ops.losses import Head

Params = Any
Generate = Callable[..., "Generated"]
Stream = Callable[[Params, Sequence[int], jax.Array], Iterator[list[int]]]


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


class _State(NamedTuple):
    """Between two tokens: the last of `step` tokens is in `out`, and not yet in the cache."""

    step: jax.Array
    done: jax.Array  # [B] bool
    cache: Cache
    out: Generated


def make_generate(model: Model, config: SamplingConfig, vocab_size: int | None = None) -> Generate:
    """Returns generate(params, prompts, lengths, key, rows=None) -> Generated, jitted.

    It takes
      params: of `model`, sharded as you like under the mesh of jax.set_mesh. The result is on every device.
      prompts: [B, P] int32, padded on the left (see `pad_prompts`); every new shape compiles.
      lengths: [B] int32, tokens of each prompt. A row of length 0 only fills the batch and gets nothing.
      key: random key.
      rows: [B] int32, by default 0 to B - 1. A row's token n is drawn with a key made of (key, its number
        here, n), so that it depends on no other row.

    Args:
      model: to decode with.
      config: how to choose tokens.
      vocab_size: ids from here on, which pad the model's vocabulary, are never chosen; None: there are none.

    Raises:
      InputError: `vocab_size` or a stop token is beyond the vocabulary, or there is no room for a prompt; when
        called, P + N > model.config.max_length.
    """
    begin, advance = _make_steps(model, config, vocab_size)

    @jax.jit
    def generate(
        params: Params, prompts: jax.Array, lengths: jax.Array, key: jax.Array, rows: jax.Array | None = None
    ) -> Generated:
        rows = jnp.arange(prompts.shape[0]) if rows is None else rows
        keys = jax.vmap(jax.random.fold_in, (None, 0))(key, rows)
        params = model.unstack(params)
        state = begin(params, prompts, lengths, keys)
        state = advance(params, lengths, keys, state, config.max_new_tokens)
        return jax.tree.map(lambda x: sharding.constrain(x, (None,) * x.ndim), state.out)

    return generate


def make_stream(
    model: Model, config: SamplingConfig, vocab_size: int | None = None, *, chunk: int = 8, bucket: int = 32
) -> Stream:
    """Returns stream(params, prompt ids, key): an iterator over the new tokens, at most `chunk` at a time.

    They are the tokens that `make_generate` gives in row 0. `params` are what model.unstack returns under jit,
    once for many prompts. Raises InputError as `make_generate` does and, when iterated over, as `pad_prompts`.
    """
    begin, advance = _make_steps(model, config, vocab_size)

    @jax.jit
    def start(params: Params, prompts: jax.Array, lengths: jax.Array, keys: jax.Array) -> _State:
        return begin(params, prompts, lengths, keys)

    @functools.partial(jax.jit, donate_argnums=3)
    def more(params: Params, lengths: jax.Array, keys: jax.Array, state: _State) -> _State:
        return advance(params, lengths, keys, state, jnp.minimum(state.step + chunk, config.max_new_tokens))

    def stream(params: Params, prompt: Sequence[int], key: jax.Array) -> Iterator[list[int]]:
        prompts, lengths = pad_prompts([prompt], bucket=bucket, longest=longest_prompt(model, config))
        keys = jax.random.fold_in(key, 0)[None]
        state = start(params, prompts, lengths, keys)
        given = 0
        while True:
            tokens, made, done = jax.device_get((state.out.tokens[0], state.out.lengths[0], state.done[0]))
            yield tokens[given:made].tolist()
            given = made
            if done or made == config.max_new_tokens:
                return
            state = more(params, lengths, keys, state)

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

    Prompt i is row first_row + i of `generate` whatever batch it falls into. Empty rows fill the last batch up, so that
    there is one compilation for each padded length. All processes of a run call this together, with the same
    prompts.

    Args:
      generate: of `make_generate`.
      params: its parameters.
      prompts: lists of ids.
      key: random key.
      batch_size: B; a multiple of the mesh's data and fsdp axes wastes nothing.
      bucket, longest: see `pad_prompts`.
      first_row: number of the first prompt, where these are a part of more.
      progress: called with the number of prompts done, after each batch.

    Raises:
      InputError: see `pad_prompts`.
    """
    _check_lengths(prompts, longest)
    completions: dict[int, Completion] = {}
    by_length = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    for first in range(0, len(prompts), batch_size):
        rows = by_length[first : first + batch_size]
        padded, lengths = pad_prompts([prompts[i] for i in rows], bucket=bucket, longest=longest)
        empty = batch_size - len(rows)
        out = generate(
            params,
            np.pad(padded, ((0, empty), (0, 0))),
            np.pad(lengths, (0, empty)),
            key,
            np.pad(np.array(rows, np.int32) + np.int32(first_row), (0, empty)),
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


def _make_steps(model: Model, config: SamplingConfig, vocab_size: int | None) -> tuple[Callable, Callable]:
    """The two halves of decoding. `params` are unstacked, and `keys` [B] the random keys of the rows.

    Returns:
      begin: (params, prompts, lengths, keys) -> the _State after the prompts and one new token.
      advance: (params, lengths, keys, state, until) -> that after `until` tokens, or when all rows are done.
    """
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

    def append(params, hidden, keys, step, done, out):
        """Chooses token number `step` of each row from its last hidden state, [B, D]."""
        logits = _logits(model.unembed(params), hidden, vocab_size)
        tokens = _choose(logits, config, keys, step)
        logprobs = jnp.take_along_axis(jax.nn.log_softmax(logits, axis=1), tokens[:, None], axis=1)
        tokens = jnp.where(done, 0, tokens)
        logprobs = jnp.where(done[:, None], 0.0, logprobs)
        out = Generated(
            tokens=jax.lax.dynamic_update_slice_in_dim(out.tokens, tokens[:, None], step, axis=1),
            lengths=jnp.where(done, out.lengths, step + 1),
            logprobs=jax.lax.dynamic_update_slice_in_dim(out.logprobs, logprobs, step, axis=1),
        )
        return done | jnp.isin(tokens, stops), out

    def begin(params, prompts, lengths, keys):
        B, P = prompts.shape
        if max_length < P + N:
            raise InputError(
                f"prompts padded to {P} tokens and sampling.max_new_tokens = {N} make more than "
                f"model.max_length = {max_length}. Lower sampling.max_new_tokens, or shorten the prompts."
            )
        first = (P - lengths)[:, None, None]
        t, s = jnp.arange(P)[None, :, None], jnp.arange(P + N)[None, None, :]
        # Padding sees itself: a softmax over nothing would put NaN into the cache.
        mask = ((first <= s) & (s <= t)) | (s == t)
        positions = jnp.maximum(t - first, 0)[:, :, 0]
        hidden, cache = model.decode(params, prompts, positions, mask, model.init_cache(B, P + N), 0)
        out = Generated(jnp.zeros((B, N), jnp.int32), jnp.zeros(B, jnp.int32), jnp.zeros((B, N), jnp.float32))
        done, out = append(params, hidden[:, -1], keys, jnp.int32(0), lengths == 0, out)
        return _State(jnp.int32(1), done, cache, out)

    def advance(params, lengths, keys, state, until):
        S = state.cache[0][0].shape[1]
        first, s = (S - N - lengths)[:, None, None], jnp.arange(S)[None, None, :]

        def body(state: _State) -> _State:
            index = S - N + state.step - 1
            tokens = jax.lax.dynamic_slice_in_dim(state.out.tokens, state.step - 1, 1, axis=1)
            mask = (first <= s) & (s <= index)
            positions = index - first[:, :, 0]
            hidden, cache = model.decode(params, tokens, positions, mask, state.cache, index)
            done, out = append(params, hidden[:, 0], keys, state.step, state.done, state.out)
            return _State(state.step + 1, done, cache, out)

        return jax.lax.while_loop(lambda state: (state.step < until) & ~jnp.all(state.done), body, state)

    return begin, advance


def _logits(head: Head, hidden: jax.Array, vocab_size: int) -> jax.Array:
    """[B, D] -> [B, V] float32, -inf from `vocab_size` on."""
    logits = jnp.dot(hidden, head.kernel.astype(hidden.dtype), preferred_element_type=jnp.float32)
    if head.bias is not None:
        logits += head.bias.astype(jnp.float32)[None]
    if head.softcap:
        logits = head.softcap * jnp.tanh(logits / head.softcap)
    return jnp.where(jnp.arange(logits.shape[1])[None] < vocab_size, logits, -jnp.inf)


def _choose(logits: jax.Array, config: SamplingConfig, keys: jax.Array, step: jax.Array) -> jax.Array:
    """The next token of each row, [B] int32, from logits [B, V]."""
    if config.temperature == 0:
        return jnp.argmax(logits, axis=1).astype(jnp.int32)
    logits, ids = filter_logits(logits, config)
    keys = jax.vmap(jax.random.fold_in, (0, None))(keys, step)
    drawn = jax.vmap(jax.random.categorical)(keys, logits)
    return jnp.take_along_axis(ids, drawn[:, None], axis=1)[:, 0]
