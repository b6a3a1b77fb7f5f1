"""Log-probabilities of given tokens under a model, batched by length: what scoring and evaluations are made of.

A sequence of n tokens is n - 1 predictions. What is longer than the model's max_length goes through it in windows: each
token is predicted once, from at most max_length tokens before it, and the last window reaches back to be full.

To a prefix LM all that stands before the first scored token is a prefix, so that an answer has the log-probabilities
that it had when it was generated.
"""

import collections
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from research.devices import distributed, sharding
from research.errors import InputError, located
from research.models import virtual
from research.models.transformer import Model
from research.ops.chunks import chunk_bytes, chunk_tokens
from research.ops.head import Head
from research.ops.losses import cross_entropy, log_probs
from research.sources import formats, records
from research.sources.tokenizers import Tokenizer

Params = Any
Record = Mapping[str, Any]
Progress = Callable[[int], None]  # is told how many more predictions are made

BATCH_TOKENS = 8192
_LEAST_LENGTH = 32
_IN_FLIGHT = 2


class Example(NamedTuple):
    """A sequence and which of its tokens are scored.

    Attributes:
      tokens: [n] int32.
      mask: [n] bool. The first token is never scored, whatever it says: nothing comes before it.
    """

    tokens: np.ndarray
    mask: np.ndarray

    @property
    def count(self) -> int:
        """How many tokens are scored."""
        return int(np.count_nonzero(self.mask[1:]))


class Likelihood(NamedTuple):
    """Of an example's scored tokens: the log-probability of all, in nats, and whether each is the likeliest."""

    logprob: float
    greedy: bool


class _Window(NamedTuple):
    """Tokens start to stop - 1 of an example go in, and the tokens from `first` to `stop` are predictions of it."""

    example: int
    start: int
    first: int
    stop: int


def encode_records(
    items: Sequence[tuple[str, Record]], tokenizer: Tokenizer | None, template: str, vocab_size: int
) -> list[Example]:
    """Tokenises records as training does (see sources.formats), so that the same tokens are scored.

    `text` is scored whole, its end token included; of prompt and response, or messages, the answers and their ends;
    of `tokens`, a list of ids, all.

    Args:
      items: (where, record); `where` is file:line, for errors.
      tokenizer: None will do where all records have tokens.
      template: see sources.formats.
      vocab_size: of the model.

    Raises:
      InputError: a record is at fault, or has nothing to score; it is named.
    """
    examples: list[Example | None] = [None] * len(items)
    # Documents and conversations apart, since the model's own chat template is for the latter alone.
    turns: tuple[list[tuple[int, list[records.Turn]]], ...] = ([], [])
    for i, (where, record) in enumerate(items):
        with located(where):
            if _is_tokens(record):
                ids = _token_ids(record["tokens"], vocab_size)
                examples[i] = Example(ids, np.ones(len(ids), bool))
                continue
            if tokenizer is None:
                raise InputError("holds text, and the model has no tokenizer. Give ids in a field 'tokens'.")
            one = records.check(dict(record), records.detect_format(record, {}), {})
            turns[one[0][0] == "text"].append((i, one))
    for kind in filter(None, turns):
        places = [items[i][0] for i, _ in kind]
        tokens, mask, lengths = formats.encode([one for _, one in kind], tokenizer, template, places)
        ends = np.cumsum(lengths)
        for (i, _), start, end in zip(kind, ends - lengths, ends, strict=True):
            examples[i] = Example(tokens[start:end], mask[start:end])
    for (where, _), example in zip(items, examples, strict=True):
        if not example.count:
            raise InputError(f"{where}: has no token to score: one is predicted from those before it. Lengthen it.")
        if example.tokens.max() >= vocab_size:
            raise InputError(
                f"{where}: has token {example.tokens.max()}, and the model's vocabulary ends at {vocab_size - 1}. Use "
                "the tokenizer that the model was trained with."
            )
    return examples


def _is_tokens(record: Record) -> bool:
    """Whether the record holds ids.

    Raises:
      InputError: what it holds can't be scored, or isn't clear.
    """
    text = [name for name in records.FIELDS if name in record]
    if "tokens" in record:
        if text:
            raise InputError(f"has 'tokens' and {text[0]!r}: which is to be scored? Drop or rename the other.")
        return True
    if not ({"text", "messages"} & record.keys() or {"prompt", "response"} <= record.keys()):
        raise InputError(
            f"has the fields {', '.join(map(repr, record)) or 'none'}, but needs 'text', 'prompt' and 'response', "
            "'messages' or 'tokens'. Rename its fields."
        )
    return False


def _token_ids(ids: Any, vocab_size: int) -> np.ndarray:
    if not isinstance(ids, list) or not all(type(i) is int for i in ids):
        raise InputError("field 'tokens' must be a list of whole numbers. Write it as one.")
    for i in ids:
        if not 0 <= i < vocab_size:
            raise InputError(f"field 'tokens' holds {i}, and the model's ids are 0 to {vocab_size - 1}. Mend it.")
    return np.array(ids, np.int32)


def encode_context(tokenizer: Tokenizer, texts: Sequence[str], *, special: bool = False) -> list[list[int]]:
    """Ids of texts that begin a sequence: the token that begins a text, where the tokenizer has one, comes first.

    An empty text is that token, else the one that ends a text. With `special`, what reads like a special token is that
    token, and the one that begins a text isn't put before itself.
    """
    ids = tokenizer.encode_stretches(list(texts), special=special, first=True)
    if tokenizer.bos is None:
        return [one or [tokenizer.eos] for one in ids]
    return [one if one[:1] == [tokenizer.bos] else [tokenizer.bos, *one] for one in ids]


def encode_pair(tokenizer: Tokenizer, context: str, continuation: str, *, special: bool = False) -> Example:
    """A continuation scored after its context, both text, tokenised as lm-evaluation-harness does for causal models.

    White space at the end of the context goes to the continuation, and the tokens of the continuation are those of the
    whole text that come after as many as the context has alone. See `encode_context` for the rest.

    Raises:
      InputError: no token is the continuation's own.
    """
    kept = context.rstrip()
    continuation = context[len(kept) :] + continuation
    whole, before = encode_context(tokenizer, [kept + continuation, kept], special=special)
    if not kept and tokenizer.bos is None:
        whole = before + whole
    if len(whole) <= len(before):
        raise InputError(f"{continuation!r} after {context[-40:]!r} has no tokens of its own. Lengthen it.")
    return Example(np.array(whole, np.int32), np.arange(len(whole)) >= len(before))


def keep_end(example: Example, max_length: int) -> Example:
    """Drops tokens from the left that leave no room for the scored ones in a model of `max_length`."""
    first = min(max(0, len(example.tokens) - max_length - 1), max(0, int(np.argmax(example.mask)) - 1))
    return Example(example.tokens[first:], example.mask[first:])


def token_logprobs(model: Model, params: Params, batch: Mapping[str, jax.Array]) -> jax.Array:
    """log p of the `targets` of a batch, [B, T] float32 on every device; see `_batch` for what it holds."""
    batch = constrain(batch, model.rules)
    out = log_probs(virtual.hidden(model, params, batch), model.unembed(params), batch["targets"]).target
    return sharding.replicate(out)


def row_likelihoods(model: Model, params: Params, batch: Mapping[str, jax.Array]) -> tuple[jax.Array, jax.Array]:
    """Of each row of a batch, the sum of log p over its weighted targets, [B] float32, and whether all of these are the
    likeliest, [B] bool; on every device."""
    batch = constrain(batch, model.rules)
    hidden, head = virtual.hidden(model, params, batch), model.unembed(params)
    chunk = _chunk(hidden.shape[0], head)

    def one(hidden: jax.Array, targets: jax.Array, weights: jax.Array) -> tuple[jax.Array, jax.Array]:
        out = cross_entropy(hidden[None], head, targets[None], weights[None], chunk=chunk)
        return -out.nll_sum, out.correct_sum == out.weight_sum

    out = jax.vmap(one)(hidden, batch["targets"], batch["weights"])
    return jax.tree.map(sharding.replicate, out)


def make_token_scorer(model: Model, *, batch_tokens: int = BATCH_TOKENS) -> Callable[..., list[np.ndarray]]:
    """Returns score(params, examples, progress=nothing) -> for each example the log-probabilities of its scored tokens.

    They are [count] float32, in nats. Call it under the mesh of the parameters (jax.set_mesh).

    Args:
      model: of `params`.
      batch_tokens: tokens of a batch, padding included, on each device that shares in the batch.
    """

    compute = distributed.one_at_a_time(jax.jit(functools.partial(token_logprobs, model)))

    def score(
        params: Params, examples: Sequence[Example], progress: Progress = lambda tokens: None
    ) -> list[np.ndarray]:
        scored = [np.zeros(example.count, np.float32) for example in examples]
        for windows, out in compute_windows(compute, model, params, examples, batch_tokens, progress):
            for (i, start, first, stop), row in zip(windows, out, strict=False):
                mask = examples[i].mask
                at = int(np.count_nonzero(mask[1:first]))
                values = row[first - 1 - start : stop - start][mask[first : stop + 1]]
                scored[i][at : at + len(values)] = values
        return scored

    return score


def make_loglikelihood(model: Model, *, batch_tokens: int = BATCH_TOKENS) -> Callable[..., list[Likelihood]]:
    """Returns loglikelihood(params, examples, progress=nothing) -> the Likelihood of each example's scored tokens.

    Args: see `make_token_scorer`.
    """

    compute = distributed.one_at_a_time(jax.jit(functools.partial(row_likelihoods, model)))

    def loglikelihood(
        params: Params, examples: Sequence[Example], progress: Progress = lambda tokens: None
    ) -> list[Likelihood]:
        sums, greedy = np.zeros(len(examples)), np.ones(len(examples), bool)
        for windows, out in compute_windows(compute, model, params, examples, batch_tokens, progress):
            for window, logprob, likeliest in zip(windows, *out, strict=False):
                sums[window.example] += logprob
                greedy[window.example] &= likeliest
        return [Likelihood(*each) for each in zip(sums.tolist(), greedy.tolist(), strict=True)]

    return loglikelihood


def constrain(batch: Mapping[str, jax.Array], rules: sharding.Rules) -> dict[str, jax.Array]:
    return {name: sharding.constrain(x, ("batch", "time"), rules) for name, x in batch.items()}


def _chunk(rows: int, head: Head) -> int:
    """How many positions of a row are scanned together.

    Each row is scanned by itself, for its own sum, and all rows at the same time: so the logits of a device's rows
    together keep to the size of a chunk (ops.chunks).
    """
    tokens = min(chunk_tokens(), chunk_bytes() // (4 * head.size))
    return max(1, tokens * sharding.axis_parts("batch", head.rules) // rows)


def _windows(examples: Sequence[Example], max_length: int) -> Iterator[_Window]:
    for i, (tokens, mask) in enumerate(examples):
        for first in range(1, len(tokens), max_length):
            stop = min(first + max_length, len(tokens)) - 1
            if np.any(mask[first : stop + 1]):
                yield _Window(i, max(0, stop - max_length), first, stop)


def padded_length(length: int, max_length: int) -> int:
    """The next of 32, 48, 64, 96, 128, ...: few shapes are compiled, and at most a third is padding."""
    size = _LEAST_LENGTH
    while size < length:
        size = size * 3 // 2 if size & (size - 1) == 0 else size * 4 // 3
    return min(size, max_length)


def compute_windows(
    compute: Callable[[Params, dict[str, np.ndarray]], Any],
    model: Model,
    params: Params,
    examples: Sequence[Example],
    batch_tokens: int,
    progress: Progress,
) -> Iterator[tuple[list[_Window], Any]]:
    """Computes all windows of the examples, the longest first.

    Yields:
      (windows, results) of one batch after the other. Row i of the results is of windows[i]; rows beyond are padding.
    """
    max_length = model.max_length
    windows = sorted(_windows(examples, max_length), key=lambda window: window.start - window.stop)
    waiting: collections.deque = collections.deque()  # the devices get the next batch before the last one is read

    def read() -> tuple[list[_Window], Any]:
        taken, out = waiting.popleft()
        out = jax.device_get(out)
        progress(sum(stop + 1 - first for _, _, first, stop in taken))
        return taken, out

    done, shards = 0, sharding.axis_parts("batch", model.rules)
    while done < len(windows):
        length = padded_length(windows[done].stop - windows[done].start, max_length)
        rows = max(1, batch_tokens // length)
        if len(windows) - done <= rows // 8 * shards:
            rows //= 8  # the last few; only two sizes, since each is compiled
        taken = windows[done : done + rows * shards]
        batch = _batch(examples, taken, rows * shards, length)
        if model.config.prefix:
            batch["prefix"] = _prefixes(examples, taken, batch["segment_ids"])
        waiting.append((taken, compute(params, batch)))
        done += len(taken)
        if len(waiting) > _IN_FLIGHT:
            yield read()
    while waiting:
        yield read()


def _batch(examples: Sequence[Example], windows: Sequence[_Window], rows: int, length: int) -> dict[str, np.ndarray]:
    """tokens, segment_ids, positions and targets, [rows, length] int32, and weights, float32 and 1 where scored."""
    batch = {name: np.zeros((rows, length), np.int32) for name in ("tokens", "segment_ids", "targets")}
    batch["positions"] = np.broadcast_to(np.arange(length, dtype=np.int32), (rows, length))
    batch["weights"] = np.zeros((rows, length), np.float32)
    for row, (i, start, first, stop) in enumerate(windows):
        tokens, mask = examples[i]
        batch["tokens"][row, : stop - start] = tokens[start:stop]
        batch["segment_ids"][row, : stop - start] = 1
        batch["targets"][row, : stop - start] = tokens[start + 1 : stop + 1]
        batch["weights"][row, first - 1 - start : stop - start] = mask[first : stop + 1]
    return batch


def _prefixes(examples: Sequence[Example], windows: Sequence[_Window], segment_ids: np.ndarray) -> np.ndarray:
    """The batch field `prefix` of the windows: what stands before an example's first scored token is its prompt, as
    decoding shows it to a prefix LM. Text, which is scored whole, has none."""
    first = np.zeros((len(segment_ids), 1), np.int32)
    for row, (i, start, _, _) in enumerate(windows):
        first[row] = np.argmax(examples[i].mask) - start
    return (np.arange(segment_ids.shape[1])[None] < first) & (segment_ids > 0).astype(np.int32)


def ratio_of_sums(sums: np.ndarray, weights: np.ndarray) -> tuple[float, float | None]:
    """sum(sums) / sum(weights) over independent examples, and its standard error; None where there is but one.

    The error is that of a ratio estimator, linearised (Cochran 1977, Sampling Techniques, chapter 6); with weights of 1
    it is the standard error of the mean.
    """
    n, value = len(sums), float(np.sum(sums) / np.sum(weights))
    if n < 2:
        return value, None
    return value, float(np.sqrt(n / (n - 1) * np.sum(np.square(sums - value * weights))) / np.sum(weights))
