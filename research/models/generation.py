"""Continues prompts: a jitted function for padded batches, a stream for one prompt, and a loop over any number of them.

Axes: B rows, P padded length of the prompts, N new tokens.
"""

import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from research.errors import InputError
from research.models import virtual
from research.models.sampling import SamplingConfig, longest_prompt, uniforms
from research.models.slots import Decoder, Generated, Queue
from research.models.transformer import Model

Params = Any
Generate = Callable[..., Generated]
MakeGenerate = Callable[..., Generate]  # (model, sampling, vocabulary size) -> see make_generate
Stream = Callable[[Params, Sequence[int], jax.Array], Iterator[list[int]]]

BATCHES_AT_ONCE = 8  # so many times batch_size prompts, a power of two, are the most in one call


class Completion(NamedTuple):
    """One row of Generated without what comes after its end."""

    tokens: list[int]
    logprobs: list[float]


def make_generate(
    model: Model, config: SamplingConfig, vocab_size: int | None = None, *, of_draws: bool = False
) -> Generate:
    """Returns generate(params, prompts, lengths, key, rows=None, limits=None, *, slots=None, each=1) -> Generated,
    jitted.

    It takes
      params: of `model`, sharded as you like under the mesh of jax.set_mesh. The result is on every device.
      prompts: [B, P] int32, padded on the left (see `pad_prompts`); every new shape compiles.
      lengths: [B] int32, tokens of each prompt. A row of length 0 only fills the batch and gets nothing.
      key: random key.
      rows: [B] int32, by default 0 to B - 1. A row's token n is drawn with a key made of (key, its number
        here, n), so that it depends on no other row.
      limits: [B] int32, the most tokens of each row, where that is below N.
      slots: A, an int: the most rows that are decoded at once; None: all. Of more, the next takes the place of one that
        has ended. Every row gets the same tokens, and the cache has room for A rows.
      each: an int: how many rows each prompt is continued in, one after the other. `prompts` and `lengths` then have
        B / each rows, and all else has B. A prompt is read once where its rows begin together.

    Args:
      model: to decode with.
      config: how to choose tokens.
      vocab_size: ids from here on, which pad the model's vocabulary, are never chosen; None: there are none.
      of_draws: log-probabilities are those that tokens were drawn with, and not the model's.

    Raises:
      InputError: `vocab_size` or a stop token is beyond the vocabulary, or there is no room for a prompt; when
        called, P + N > model.max_length, or `slots` is below 1.
    """
    decoder = Decoder(model, config, model.config.vocab_size if vocab_size is None else vocab_size, of_draws)
    return jax.jit(decoder.generate, static_argnames=("slots", "each"))


def make_stream(
    model: Model, config: SamplingConfig, vocab_size: int | None = None, *, chunk: int = 8, bucket: int = 32
) -> Stream:
    """Returns stream(params, prompt ids, key): an iterator over the new tokens, at most `chunk` at a time.

    They are the tokens that `make_generate` gives in row 0. `params` are what model.unstack returns under jit,
    once for many prompts. Raises InputError as `make_generate` does and, when iterated over, as `pad_prompts`.
    """
    decoder = Decoder(model, config, model.config.vocab_size if vocab_size is None else vocab_size)
    limit = np.array([config.max_new_tokens], np.int32)
    begin = jax.jit(decoder.begin)
    extend = jax.jit(functools.partial(decoder.extend, tokens=chunk), donate_argnums=2)
    drawn = jax.jit(lambda key: uniforms(jax.random.fold_in(key, 0)[None], config.max_new_tokens))

    def stream(params: Params, prompt: Sequence[int], key: jax.Array) -> Iterator[list[int]]:
        prompts, lengths = pad_prompts([prompt], bucket=bucket, longest=longest_prompt(model, config))
        queue = Queue(*virtual.ahead(model, prompts, lengths), limit, drawn(key))
        slots, sent = begin(params, queue), 0
        while True:
            tokens, count, done = jax.device_get((slots.out.tokens[0], slots.count[0], slots.done[0]))
            yield tokens[sent:count].tolist()
            if done:
                return
            sent = count
            slots = extend(params, queue, slots)

    return stream


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
    numbers: Sequence[int] | None = None,
    progress: Callable[[int], None] = lambda done: None,
) -> list[Completion]:
    """Continues any number of prompts, those of similar length together; returns their completions in order.

    Prompt i is row numbers[i] of `generate` whatever call it falls into. A call takes batch_size prompts, or 2, 4 or
    8 times as many, which take turns; empty rows fill it up, so that there are at most four compilations for each
    padded length. All processes of a run call this together, with the same prompts.

    Args:
      generate: of `make_generate`.
      params: its parameters.
      prompts: lists of ids.
      key: random key.
      batch_size: prompts decoded at once; a multiple of the mesh's data and fsdp axes wastes nothing.
      bucket, longest: see `pad_prompts`.
      numbers: of the prompts, where these are a part of more; by default from 0 on.
      progress: called with the number of prompts done, after each call.

    Raises:
      InputError: see `pad_prompts`.
    """
    _check_lengths(prompts, longest)
    completions: dict[int, Completion] = {}
    numbers = np.arange(len(prompts)) if numbers is None else np.asarray(numbers)
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
            np.pad(numbers[rows].astype(np.int32), (0, empty)),
            slots=batch_size,
        )
        tokens, lengths, logprobs = jax.device_get(out)
        for row, i in enumerate(rows):
            completions[i] = Completion(tokens[row, : lengths[row]].tolist(), logprobs[row, : lengths[row]].tolist())
        progress(len(completions))
    return [completions[i] for i in range(len(prompts))]


def _check_lengths(prompts: Sequence[Sequence[int]], longest: int | None) -> None:
    for i, prompt in enumerate(prompts):
        if not len(prompt):
            raise InputError(f"prompt {i}: is empty. Give at least one token to go on from.")
        if longest is not None and len(prompt) > longest:
            raise InputError(
                f"prompt {i}: has {len(prompt)} tokens, and there is room for {longest} (model.max_length "
                "less sampling.max_new_tokens). Shorten it, or lower sampling.max_new_tokens."
            )
