"""What a model writes after prompts: as text that streams, or as lines of a file that a killed run goes on with."""

import bisect
import dataclasses
import functools
import hashlib
import json
import sys
import time
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax

from research import files
from research.evals.markers import say_markers
from research.evals.prompts import GapEncoder, Prompt, PromptEncoder
from research.loading import LoadedModel
from research.models.generation import (
    BATCHES_AT_ONCE,
    Completion,
    MakeGenerate,
    Stream,
    generate_batches,
    make_generate,
    make_stream,
)
from research.models.sampling import SamplingConfig, longest_prompt
from research.sources.infilling import make_infilling

Decode = Callable[[list[int]], str]


@dataclasses.dataclass(frozen=True)
class Responder:
    """A model and how it answers prompts.

    Attributes:
      loaded: the model, its parameters and its tokenizer.
      sampling: how tokens are drawn.
      encode: prompt -> token ids.
      stops: an answer ends before the first of these texts.
      key: of the draws.
      make: of what answers many prompts.
    """

    loaded: LoadedModel
    sampling: SamplingConfig
    encode: PromptEncoder | GapEncoder
    stops: tuple[str, ...]
    key: jax.Array
    make: MakeGenerate = make_generate

    def stream(
        self, prompt: Prompt, turn: int | None = None, temperature: float | None = None
    ) -> Generator[str, None, bool]:
        """Yields the answer to one prompt in pieces, as they come; returns whether it was cut off for its length.

        Args:
          prompt: what is to be answered.
          turn: of a conversation; draws differ by it.
          temperature: by default that of `sampling`.
        """
        key = self.key if turn is None else jax.random.fold_in(self.key, turn)
        sampling = self.sampling if temperature is None else dataclasses.replace(self.sampling, temperature=temperature)
        start, params = self._start(sampling), self._unstacked
        (ids,) = self.encode_all([prompt]) if turn is None else [self.encode(prompt)]
        text = TextStream(self.decode, self.stops)
        for chunk in start(params, ids, key):
            if piece := text.add(chunk):
                yield piece
            if text.stopped:
                return False
        if piece := text.end():
            yield piece
        return text.tokens[-1] not in sampling.stop_tokens

    def encode_all(self, prompts: Sequence[Prompt]) -> list[list[int]]:
        """Token ids of prompts; a line on stderr says how many seem to be rendered already."""
        ids = [self.encode(prompt) for prompt in prompts]
        say_markers("prompts", (prompt.record for prompt in prompts), self.loaded.tokenizer)
        return ids

    @functools.cached_property
    def decode(self) -> Decode:
        return self.encode.decode

    def _start(self, sampling: SamplingConfig) -> Stream:
        """What streams tokens that are drawn so; it compiles once."""
        if sampling not in self._streams:
            model = self.loaded.with_adapter().model
            self._streams[sampling] = make_stream(model, sampling, self.loaded.tokenizer.size)
        return self._streams[sampling]

    @functools.cached_property
    def _streams(self) -> dict[SamplingConfig, Stream]:
        return {}

    @functools.cached_property
    def _unstacked(self) -> Any:
        model, values = self.loaded.with_adapter()[:2]
        return jax.jit(model.unstack)(values)

    def complete(
        self,
        prompts: Sequence[Prompt],
        batch_size: int,
        *,
        n: int = 1,
        done: int = 0,
        ids: Sequence[list[int]] | None = None,
    ) -> Iterator[list[tuple[Prompt, str, Completion]]]:
        """Answers many prompts; yields (prompt, text, tokens and log-probabilities) of a few batches at a time, the
        answers to a prompt one after the other and together. A batch has prompts for one adapter.

        Args:
          prompts: all of them; each is encoded before the first is answered.
          batch_size: how many answers are decoded at once.
          n: how many answers each gets, each drawn by itself.
          done: how many prompts to leave out at the start. The others' answers are those that they'd have without it.
          ids: the prompts' tokens, where they have been encoded.

        Raises:
          InputError: a prompt is at fault, or names an adapter that the model hasn't.
        """
        adapters = [self.loaded.adapter_of(prompt.record, prompt.where) for prompt in prompts]
        ids = self.encode_all(prompts) if ids is None else ids
        models = {id(each.model): each.model for each in self.loaded.each}  # adapters share one, but for those in front
        generate = {i: self.make(m, self.sampling, self.loaded.tokenizer.size) for i, m in models.items()}
        total, size = n * len(ids), n * together(batch_size, n)
        count, seconds = 0, 0.0
        for first in range(n * done, total, size):
            began = time.perf_counter()
            rows, completions = range(first, min(first + size, total)), {}
            for adapter in dict.fromkeys(adapters[i // n] for i in rows):
                numbers = [i for i in rows if adapters[i // n] == adapter]
                model, values, *_ = self.loaded.beside(adapter)
                answers = generate_batches(
                    generate[id(model)],
                    values,
                    [ids[i // n] for i in numbers],
                    self.key,
                    batch_size=min(batch_size, total),
                    longest=self.encode.longest,
                    numbers=numbers,
                    progress=functools.partial(_show_progress, first + len(completions), total, n),
                )
                completions |= zip(numbers, answers, strict=True)
            count += sum(len(c.tokens) for c in completions.values())
            seconds += time.perf_counter() - began
            yield [(prompts[i // n], *cut(completions[i], self.decode, self.stops)) for i in rows]
        if seconds:
            print(f"{count} tokens in {seconds:.1f} s, compiling included", file=sys.stderr)


def _show_progress(first: int, total: int, n: int, done: int) -> None:
    print(f"{first + done} of {total} {'prompts' if n == 1 else 'answers'}", file=sys.stderr)


def make_responder(
    loaded: LoadedModel,
    sampling: Mapping[str, Any],
    *,
    max_new_tokens: int | None = None,
    template: str | None = None,
    system: str | None = None,
    stops: Sequence[str] = (),
    seed: int = 0,
    form: str = "",
    make: MakeGenerate = make_generate,
) -> Responder:
    """Prepares a model to answer prompts.

    Args:
      loaded: the model.
      sampling: temperature, top_k, top_p, min_p; see models.sampling.SamplingConfig.
      max_new_tokens: of an answer; by default 256, or half of the model's max_length if that is less.
      template: how prompts are put to the model; by default its own way.
      system: see PromptEncoder.
      stops: texts that end an answer.
      seed: of the draws.
      form: of sources.infilling, where prompts have a prefix and a suffix; "" for the others.
      make: of what answers many prompts.

    Raises:
      InputError: the sampling can't work, or leaves no room for a prompt; or the model can't fill in.
    """
    tokenizer = loaded.tokenizer
    if max_new_tokens is None:
        max_new_tokens = min(256, loaded.max_length // 2)
    room = f"model.max_length = {loaded.max_length} less --max_new_tokens={max_new_tokens}"
    infilling, stop = None, tokenizer.stop
    if form:
        infilling = make_infilling(form, tokenizer)
        if form == "auto":
            print(f"form {infilling.form}, {infilling.why}", file=sys.stderr)
        stop, max_new_tokens = infilling.stop, max_new_tokens + infilling.extra
    config = SamplingConfig(max_new_tokens=max_new_tokens, stop_tokens=stop, **sampling)
    longest = min(longest_prompt(each.model, config) for each in loaded.each)
    if infilling:
        encoder = GapEncoder(infilling, longest, room)
    else:
        encoder = PromptEncoder(tokenizer, loaded.template_for(template), system, longest, room)
    return Responder(loaded, config, encoder, tuple(stops), jax.random.key(seed), make)


def together(batch_size: int, n: int) -> int:
    """How many prompts are answered together, of which each gets n answers and batch_size answers are one batch."""
    return max(1, BATCHES_AT_ONCE * batch_size // n)


def write_completions(
    responder: Responder, prompts: Sequence[Prompt], output: Path, batch_size: int, flags: Mapping[str, Any]
) -> None:
    """Answers prompts into a file of JSON lines: each record with `completion`, `tokens` and `logprob`; or, of several
    answers to each, with `completions`, and `tokens` and `logprob` as lists with a value for each.

    A killed run leaves OUTPUT.partial, and the same call goes on from there.

    Args:
      responder: the model.
      prompts: all of them.
      output: the file; it is replaced.
      batch_size: how many are decoded at once.
      flags: what else decides the answers, by flag's name; `n` is how many each prompt gets.

    Raises:
      InputError: a prompt is at fault, or OUTPUT.partial is the work of another command.
    """
    ids = responder.encode_all(prompts)
    content = json.dumps([prompt.record for prompt in prompts], sort_keys=True)
    decides = {
        **flags,
        "batch_size": batch_size,
        "data": hashlib.sha256(content.encode()).hexdigest(),
        "tokens": hashlib.sha256(json.dumps(ids).encode()).hexdigest(),
    }
    reasons = {name: f"--{name} was {{}}" for name in decides}
    reasons |= {"data": "--data holds other prompts", "tokens": "--template or the tokenizer gives other tokens"}
    n = flags["n"]
    with files.ResumableLines(output, decides, reasons, together(batch_size, n)) as lines:
        for answers in responder.complete(prompts, batch_size, n=n, done=lines.done, ids=ids):
            groups = [answers[i : i + n] for i in range(0, len(answers), n)]
            lines.append(group[0][0].line(**_fields([answer[1:] for answer in group])) for group in groups)
        lines.finish()


def _fields(answers: Sequence[tuple[str, Completion]]) -> dict[str, Any]:
    """What a record gets: of one answer its values, of several lists of them."""
    texts, completions = zip(*answers, strict=True)
    tokens, logprobs = [each.tokens for each in completions], [sum(each.logprobs) for each in completions]
    if len(answers) == 1:
        return {"completion": texts[0], "tokens": tokens[0], "logprob": logprobs[0]}
    return {"completions": list(texts), "tokens": tokens, "logprob": logprobs}


def cut(completion: Completion, decode: Decode, stops: Sequence[str]) -> tuple[str, Completion]:
    """The text before the first stop, and the tokens up to the one that completes that stop."""
    text = decode(completion.tokens)
    at = _first_stop(text, stops)
    if at is None:
        return text, completion
    tokens, logprobs = completion
    n = bisect.bisect_left(range(len(tokens)), True, key=lambda n: _first_stop(decode(tokens[:n]), stops) is not None)
    return text[:at], Completion(tokens[:n], logprobs[:n])


class TextStream:
    """Turns tokens into text as they come; the pieces joined are what `cut` gives for all of them.

    What may change with the next token is held back: bytes that are no whole character yet, which decode to U+FFFD, and
    what may be the beginning of a stop.

    Attributes:
      tokens: those that have come, up to the one that completes a stop.
      stopped: whether a stop has come; nothing follows it.
    """

    def __init__(self, decode: Decode, stops: Sequence[str] = ()):
        self.tokens: list[int] = []
        self.stopped = False
        self._decode, self._stops, self._shown = decode, stops, 0

    def add(self, tokens: Sequence[int]) -> str:
        """What is new in the text with these tokens."""
        self.tokens += tokens
        text = self._decode(self.tokens)
        at = _first_stop(text, self._stops)
        if at is not None:
            self.stopped = True
            return text[self._shown : at]
        text = text.rstrip("\ufffd")
        held = max((n for stop in self._stops for n in range(1, len(stop)) if text.endswith(stop[:n])), default=0)
        first, self._shown = self._shown, max(self._shown, len(text) - held)
        return text[first : self._shown]

    def end(self) -> str:
        """What was held back, after the last token."""
        return "" if self.stopped else self._decode(self.tokens)[self._shown :]


def _first_stop(text: str, stops: Sequence[str]) -> int | None:
    return min((text.index(stop) for stop in stops if stop in text), default=None)
