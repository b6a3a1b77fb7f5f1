"""Classification: the class of a document, read at its last token."""

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp

from research.errors import InputError, did_you_mean
from research.objectives.types import Batch, Forward, LossOut, Objective, class_logits, label_tokens
from research.ops import class_losses
from research.sources.tokenizers import Tokenizer

FIELDS = ("tokens", "segment_ids", "positions", "label_probs")
HEADS = ("linear", "words")

Read = Callable[[Forward, Batch], tuple[jax.Array, jax.Array, jax.Array]]


def make(
    head: str = "linear",
    words: Sequence[str] = (),
    label_smoothing: float = 0.0,
    tokenizer: Tokenizer | None = None,
) -> Objective:
    """Mean cross-entropy of the documents' labels, `label_probs` [B, T, C] float32: the probabilities of the classes at
    the last token of a labelled document (one-hot, or soft), and 0 elsewhere.

    Args:
      head: "linear" is a head with a logit for each class (model.num_labels); "words" is that of a language model,
        which is to go on with the class's word.
      words: of "words", one for each class; see types.label_tokens.
      label_smoothing: see ops.class_losses.cross_entropy.
      tokenizer: the run's.

    Raises:
      InputError: an option out of its range, or words that can't be told apart.
    """
    if not 0 <= label_smoothing < 1:
        raise InputError(f"objective.classify.label_smoothing = {label_smoothing}: must be in [0, 1).")
    read = reader("objective.classify", head, words, tokenizer)

    def loss(forward: Forward, batch: Batch, key: jax.Array, step: jax.Array) -> LossOut:
        del key, step
        logits, labels, weights = read(forward, batch)
        total = class_losses.cross_entropy(logits, labels, weights, label_smoothing=label_smoothing)
        return LossOut(total, jnp.sum(weights), metrics(logits, labels, weights))

    return Objective(loss=loss, fields=FIELDS)


def reader(field: str, head: str, words: Sequence[str], tokenizer: Tokenizer | None) -> Read:
    """Returns read(forward, batch) -> (logits [B, T, C], labels [B, T, C], weights [B, T]), all float32.

    A weight is 1 at a labelled position, else 0. For the options see `make`; `field` is what an error calls them.
    """
    if head not in HEADS:
        raise InputError(f"{field}.head = {head!r}: no such head.{did_you_mean(str(head), HEADS)}")
    if (head == "words") != bool(words):
        raise InputError(
            f"{field}.head = {head!r} with words = {list(words)}: "
            + ("name a word for each class." if head == "words" else "words are for head = 'words'.")
        )
    tokens = label_tokens(words, tokenizer, f"{field}.words") if words and tokenizer else None

    def read(forward: Forward, batch: Batch) -> tuple[jax.Array, jax.Array, jax.Array]:
        labels = batch["label_probs"]
        if words and tokens is None:
            raise InputError(f"{field}.words = {list(words)}: needs a tokenizer, and the objective was made without.")
        if words and len(words) != labels.shape[-1]:
            raise InputError(
                f"{field}.words = {list(words)}: {len(words)} words for the {labels.shape[-1]} classes of the data. "
                "Name one for each."
            )
        logits = class_logits(forward, tokens)
        if logits.shape[-1] != labels.shape[-1]:
            raise InputError(
                f"model.num_labels = {logits.shape[-1]}: the data has {labels.shape[-1]} classes. Set it to that."
            )
        return logits, labels, (jnp.sum(labels, axis=-1) > 0).astype(jnp.float32)

    return read


def metrics(logits: jax.Array, labels: jax.Array, weights: jax.Array) -> dict[str, tuple[jax.Array, jax.Array]]:
    """`label_nll` (nats), `accuracy`, `brier` and `confidence`: see ops.class_losses.Scores. (`nll` would be that of
    tokens, of which perplexities are made.)"""
    out = class_losses.scores(logits, labels, weights)
    sums = {
        "label_nll": out.nll_sum,
        "accuracy": out.correct_sum,
        "brier": out.brier_sum,
        "confidence": out.confidence_sum,
    }
    return {name: (total, out.weight_sum) for name, total in sums.items()}
