"""Pseudo-perplexity of texts under a model that reads in both directions: each token is masked in turn and told from
all others (Salazar et al. 2020, arXiv:1910.14659)."""

import collections
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from research.devices import distributed, sharding
from research.errors import InputError
from research.evals.perplexity import TextSample, exp
from research.evals.scoring import BATCH_TOKENS, Example, Record, encode_records, padded_length, ratio_of_sums
from research.models import virtual
from research.models.transformer import Model
from research.objectives.masked import take
from research.ops.losses import log_probs
from research.sources.special_tokens import mask_token
from research.sources.tokenizers import Tokenizer
from research.sources.words import ordinary_tokens

_IN_FLIGHT = 2


class _Masked(NamedTuple):
    """The token `at` of an example, masked, in tokens start to stop - 1."""

    example: int
    start: int
    stop: int
    at: int


def make_pseudo_perplexity(
    model: Model,
    tokenizer: Tokenizer,
    records: Sequence[tuple[str, Record]],
    *,
    template: str,
    batch_tokens: int = BATCH_TOKENS,
) -> Callable[[Any], tuple[dict[str, float], list[TextSample]]]:
    """Returns evaluate(params) -> (metrics, a TextSample for each record, in order).

    The metrics are means over all scored tokens: of text all, of prompts and responses the responses, special tokens
    aside. A record of n tokens is n rows of its length. Of one that is longer than the model, each token is told from a
    stretch of max_length tokens: the text is cut into such, and the last of them reaches back to be full.
      loss: -log p of a masked token given all others, nats per token.
      pseudo_perplexity: exp(loss); it is no perplexity, since these probabilities are of no one distribution of texts.
      NAME_stderr: the standard error of each, records being independent, where there are two records or more.
      tokens: how many are scored.

    Args:
      model: of `params`.
      tokenizer: of the model.
      records: (where, record).
      template: see sources.formats.
      batch_tokens: see scoring.

    Raises:
      InputError: a record is at fault, or the tokenizer has no mask token.
    """
    mask, ordinary = mask_token(tokenizer), ordinary_tokens(tokenizer)
    examples = encode_records(records, tokenizer, template, model.config.vocab_size)
    scored = [Example(tokens, marked & _are(ordinary, tokens)) for tokens, marked in examples]
    counts = np.array([np.count_nonzero(example.mask) for example in scored], np.float64)
    for (where, _), count in zip(records, counts, strict=True):
        if not count:
            raise InputError(f"{where}: has no token to score: all are special tokens. Lengthen it.")
    compute = distributed.one_at_a_time(jax.jit(functools.partial(masked_log_probs, model)))

    def evaluate(params: Any) -> tuple[dict[str, float], list[TextSample]]:
        nats = np.zeros(len(scored))
        for rows, values in _compute(compute, model, params, scored, mask, batch_tokens):
            np.subtract.at(nats, [row.example for row in rows], values[: len(rows)].astype(np.float64))
        loss, error = ratio_of_sums(nats, counts)
        metrics = {"loss": loss, "pseudo_perplexity": exp(loss), "tokens": float(counts.sum())}
        if error is not None:
            metrics |= {"loss_stderr": error, "pseudo_perplexity_stderr": exp(loss) * error}
        samples = [
            TextSample(where, int(count), float(total / count))
            for (where, _), count, total in zip(records, counts, nats, strict=True)
        ]
        return metrics, samples

    return evaluate


def masked_log_probs(model: Model, params: Any, batch: Mapping[str, jax.Array]) -> jax.Array:
    """log p of the `targets` [B] at the places `at` [B] of a batch, [B] float32 on every device."""
    at, targets = batch["at"][:, None], batch["targets"][:, None]
    names = ("tokens", "segment_ids", "positions")
    batch = {name: sharding.constrain(batch[name], ("batch", "time"), model.rules) for name in names}
    hidden = sharding.constrain(take(virtual.hidden(model, params, batch), at), ("batch", None, None), model.rules)
    return sharding.replicate(log_probs(hidden, model.unembed(params), targets).target[:, 0])


def _are(ordinary: np.ndarray, tokens: np.ndarray) -> np.ndarray:
    """Whether each token is an ordinary one; an id beyond the tokenizer's is none."""
    known = tokens < len(ordinary)
    return known & ordinary[np.where(known, tokens, 0)]


def _rows(examples: Sequence[Example], max_length: int) -> Iterator[_Masked]:
    for i, (tokens, mask) in enumerate(examples):
        for at in np.flatnonzero(mask):
            stop = min((at // max_length + 1) * max_length, len(tokens))
            yield _Masked(i, max(0, stop - max_length), stop, int(at))


def _compute(
    compute: Callable[[Any, dict[str, np.ndarray]], jax.Array],
    model: Model,
    params: Any,
    examples: Sequence[Example],
    mask: int,
    batch_tokens: int,
) -> Iterator[tuple[list[_Masked], np.ndarray]]:
    """Computes all rows of the examples, the longest first.

    Yields:
      (rows, log-probabilities) of one batch after the other; those beyond the rows are of padding.
    """
    max_length = model.max_length
    rows = sorted(_rows(examples, max_length), key=lambda row: row.start - row.stop)
    shards, done = sharding.axis_parts("batch", model.rules), 0
    waiting: collections.deque = collections.deque()  # the devices get the next batch before the last one is read
    while done < len(rows) or waiting:
        if done < len(rows):
            length = padded_length(rows[done].stop - rows[done].start, max_length)
            size = max(1, batch_tokens // length) * shards
            taken = rows[done : done + size]
            waiting.append((taken, compute(params, _batch(examples, taken, size, length, mask))))
            done += len(taken)
        if len(waiting) > _IN_FLIGHT or done == len(rows):
            taken, out = waiting.popleft()
            yield taken, np.asarray(jax.device_get(out))


def _batch(
    examples: Sequence[Example], rows: Sequence[_Masked], size: int, length: int, mask: int
) -> dict[str, np.ndarray]:
    """tokens, segment_ids and positions, [size, length] int32; at and targets, [size] int32."""
    batch = {name: np.zeros((size, length), np.int32) for name in ("tokens", "segment_ids")}
    batch["positions"] = np.broadcast_to(np.arange(length, dtype=np.int32), (size, length))
    batch |= {name: np.zeros(size, np.int32) for name in ("at", "targets")}
    for number, (i, start, stop, at) in enumerate(rows):
        tokens = examples[i].tokens
        batch["tokens"][number, : stop - start] = tokens[start:stop]
        batch["segment_ids"][number, : stop - start] = 1
        batch["tokens"][number, at - start] = mask
        batch["at"][number], batch["targets"][number] = at - start, tokens[at]
    return batch
