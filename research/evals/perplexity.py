"""How well a model predicts held-out tokens: means over the whole set, made from sums."""

import functools
import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from research.errors import InputError
from research.evals.scoring import BATCH_TOKENS, Example, Record, encode_records, make_loglikelihood, ratio_of_sums
from research.models.transformer import Model
from research.objectives.types import good_answers, next_token_targets
from research.sources.tokenizers import Tokenizer
from research.train import means

Batch = Mapping[str, Any]


def make_perplexity(
    eval_step: Callable[..., dict[str, tuple[jax.Array, jax.Array]]],
    batches: Sequence[Batch],
    token_bytes: np.ndarray,
    *,
    use_loss_mask: bool,
    view: Callable[[Batch], Batch] = lambda batch: batch,
    put: Callable[[Batch], Batch] = lambda batch: batch,
    with_bytes: bool = True,
) -> Callable[..., dict[str, float]]:
    """Returns evaluate(params, frozen, carry) -> metric -> mean over all of `batches`.

    The metrics are those of `eval_step`, and from its `nll` (nats per supervised token, one for each term of a
    composed objective)
      perplexity: exp(nll).
      bits_per_byte: nll summed, in bits, over the bytes of text that the supervised targets stand for; it compares
        models across tokenizers. With one term only. An end-of-text token costs bits and stands for no byte.

    All draws are of one key, by the row's number in the data: the same in each evaluation, and for any size of batches.

    Args:
      eval_step: (params, frozen, batch, key, carry, first) -> name -> (sum, weight), jitted; see train.EvalStep.
      batches: this process's rows of each held-out batch, as a Source gives them.
      token_bytes: [V] int32, UTF-8 bytes of each token.
      use_loss_mask: supervise the tokens of `loss_mask`, as the objective does; else all tokens but those of a prefix.
      view: batch -> the batch in which only what the objective counts is no padding, for bits_per_byte.
      put: takes a batch to the devices, for the global batch there.
      with_bytes: give bits_per_byte; see Objective.bits_per_byte.

    Raises:
      InputError: there is no batch or, when called, no supervised token.
    """
    if not batches:
        raise InputError(
            "data: nothing is held out to evaluate on. Raise data.eval_fraction, name data.eval_path, or set "
            "eval.every = 0."
        )
    bits_and_bytes = jax.jit(functools.partial(_bits_and_bytes, token_bytes, use_loss_mask, view))

    def evaluate(params: Any, frozen: Any, carry: Any = None) -> dict[str, float]:
        parts, first = [], 0
        for batch in map(put, batches):
            out = eval_step(params, frozen, batch, jax.random.key(0), carry, np.int32(first))
            first += len(batch["tokens"])
            if with_bytes and "nll" in out:
                out = out | {"bits_per_byte": bits_and_bytes(out["nll"][0], batch)}
            parts.append(out)
        result = means(parts)
        if "loss" not in result:
            raise InputError(
                "data: no token of the held-out data is supervised. Raise data.eval_fraction or data.seq_len."
            )
        return result | _perplexities(result)

    return evaluate


def _bits_and_bytes(
    token_bytes: np.ndarray,
    use_loss_mask: bool,
    view: Callable[[Batch], Batch],
    nll_sum: jax.Array,
    batch: Batch,
) -> tuple[jax.Array, jax.Array]:
    """Bits of a batch's supervised targets, and the bytes of text that they stand for."""
    batch = view(batch)
    targets, weights = next_token_targets(
        batch, good_answers(batch) if use_loss_mask else 1 - batch["prefix"] if "prefix" in batch else None
    )
    sizes = jnp.asarray(token_bytes, jnp.float32)[targets]
    return nll_sum / math.log(2), jnp.sum(sizes * weights)


def _perplexities(metrics: Mapping[str, float]) -> dict[str, float]:
    """exp of each `nll` or `..._nll`, under the same name with `perplexity` for `nll`."""
    nll = {name: value for name, value in metrics.items() if re.search(r"(^|[/_])nll$", name)}
    return {name.removesuffix("nll") + "perplexity": exp(value) for name, value in nll.items()}


class TextSample(NamedTuple):
    """One record: where it is, its scored tokens, and nats for each of these."""

    where: str
    count: int
    loss: float

    def __str__(self) -> str:
        return f"{self.where}: {self.loss:.4f} nats a token, {self.count} tokens"


def make_record_perplexity(
    model: Model,
    tokenizer: Tokenizer | None,
    records: Sequence[tuple[str, Record]],
    *,
    template: str,
    batch_tokens: int = BATCH_TOKENS,
) -> Callable[[Any], tuple[dict[str, float], list[TextSample]]]:
    """Returns evaluate(params) -> (metrics, a TextSample for each record, in order); each record is a row of its own.

    The metrics are means over all scored tokens (see scoring.encode_records), those of records longer than the model
    piece by piece (see scoring)
      loss: nats per token.
      perplexity: exp(loss).
      bits_per_byte: bits over the UTF-8 bytes that the scored tokens stand for; an end token stands for none. Left out
        where there is no tokenizer or no byte.
      NAME_stderr: the standard error of each, records being independent, where there are two records or more.
      tokens: how many are scored.

    Args:
      model: of `params`.
      tokenizer: of the model; None will do where all records have tokens.
      records: (where, record).
      template: see sources.formats.
      batch_tokens: see scoring.

    Raises:
      InputError: a record is at fault.
    """
    examples = encode_records(records, tokenizer, template, model.config.vocab_size)
    counts = np.array([example.count for example in examples], np.float64)
    sizes = None if tokenizer is None else scored_bytes(examples, tokenizer, model.config.vocab_size)
    loglikelihood = make_loglikelihood(model, batch_tokens=batch_tokens)

    def evaluate(params: Any) -> tuple[dict[str, float], list[TextSample]]:
        nats = -np.array([score.logprob for score in loglikelihood(params, examples)])
        loss, error = ratio_of_sums(nats, counts)
        ratios = {"loss": (loss, error), "perplexity": (exp(loss), None if error is None else exp(loss) * error)}
        if sizes is not None and sizes.sum():
            ratios["bits_per_byte"] = ratio_of_sums(nats / math.log(2), sizes)
        metrics = {name: value for name, (value, _) in ratios.items()}
        metrics |= {f"{name}_stderr": error for name, (_, error) in ratios.items() if error is not None}
        samples = [
            TextSample(where, int(count), float(total / count))
            for (where, _), count, total in zip(records, counts, nats, strict=True)
        ]
        return metrics | {"tokens": float(counts.sum())}, samples

    return evaluate


def scored_bytes(examples: Sequence[Example], tokenizer: Tokenizer, vocab_size: int) -> np.ndarray:
    """UTF-8 bytes that the scored tokens of each example stand for, [len(examples)] float64."""
    token_bytes = np.zeros(vocab_size, np.float64)
    token_bytes[: tokenizer.size] = tokenizer.token_bytes()
    return np.array([token_bytes[tokens[1:][mask[1:]]].sum() for tokens, mask in examples])


def exp(x: float) -> float:
    """e^x; infinity where it is no float."""
    return math.exp(x) if x < 700 else math.inf  # math.exp raises where the result is no float
