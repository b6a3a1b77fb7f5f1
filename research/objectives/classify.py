"""Classification: the class of a document, read at its last token."""

import dataclasses
from collections.abc import Sequence
from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float

from research.errors import InputError, did_you_mean
from research.objectives.classes import class_logits, label_tokens
from research.objectives.types import Batch, Context, Forward, LossOut, Objective
from research.ops import class_losses
from research.ranges import Fraction, NotNegative
from research.sources.tokenizers import Tokenizer

FIELDS = ("tokens", "segment_ids", "positions", "label_probs")
HEADS = ("linear", "words")


class Predictions(NamedTuple):
    """What losses of ops.class_losses read.

    Attributes:
      logits: of the classes.
      labels: probabilities of the classes.
      weights: 1 at a labelled position, else 0.
    """

    logits: Float[Array, "B T C"]
    labels: Float[Array, "B T C"]
    weights: Float[Array, "B T"]


def make(
    head: str = "linear",
    words: Sequence[str] = (),
    label_smoothing: Fraction = 0.0,
    class_weights: Sequence[NotNegative] = (),
    tokenizer: Tokenizer | None = None,
) -> Objective:
    """Mean cross-entropy of the documents' labels, `label_probs` [B, T, C] float32: the probabilities of the classes at
    the last token of a labelled document (one-hot, or soft), and 0 elsewhere.

    Args:
      head: "linear" is a head with a logit for each class (model.num_labels); "words" is that of a language model,
        which is to go on with the class's word.
      words: of "words", one for each class; see classes.label_tokens.
      label_smoothing: see ops.class_losses.cross_entropy.
      class_weights: one for each class, for classes of unequal frequency: a document counts as its class's weight w_c,
        with soft labels p as sum_c p_c w_c, and the mean is over these weights. Metrics are unweighted.
      tokenizer: the run's.

    Raises:
      InputError: an option out of its range, or words that can't be told apart.
    """
    if class_weights and not any(class_weights):
        raise InputError(f"class_weights = {class_weights}: are all 0, so that nothing would be learned. Raise one.")
    reader = make_reader(head, words, tokenizer)

    def loss(forward: Forward, batch: Batch, context: Context) -> LossOut:
        read = reader(forward, batch)
        weights = _document_weights(read, class_weights)
        values = class_losses.cross_entropies(read.logits, read.labels, weights, label_smoothing=label_smoothing)
        total = class_losses.cross_entropy(read.logits, read.labels, weights, label_smoothing=label_smoothing)
        return LossOut(total, jnp.sum(weights), metrics(read), per_token=(values, weights))

    return Objective(loss=loss, fields=FIELDS)


def _document_weights(read: Predictions, class_weights: Sequence[float]) -> Float[Array, "B T"]:
    """What each position counts. Raises InputError where there aren't as many weights as classes."""
    if not class_weights:
        return read.weights
    if len(class_weights) != read.labels.shape[-1]:
        raise InputError(
            f"class_weights = {tuple(class_weights)}: {len(class_weights)} weights for the {read.labels.shape[-1]} "
            "classes of the data. Give one for each."
        )
    return read.weights * (read.labels @ jnp.asarray(class_weights, read.labels.dtype))


@dataclasses.dataclass(frozen=True)
class Reader:
    """(forward, batch) -> Predictions of the policy.

    Attributes:
      words: those that stand for the classes; () for a head with a logit for each class.
      tokens: the first token of each; None without words, or without a tokenizer.
    """

    words: tuple[str, ...]
    tokens: tuple[int, ...] | None

    def __call__(self, forward: Forward, batch: Batch) -> Predictions:
        """Raises InputError where the words, the head and the data have different classes."""
        labels = batch["label_probs"]
        if self.words and self.tokens is None:
            raise InputError(f"words = {list(self.words)}: needs a tokenizer, and the objective was made without.")
        if self.words and len(self.words) != labels.shape[-1]:
            raise InputError(
                f"words = {list(self.words)}: {len(self.words)} words for the {labels.shape[-1]} classes of the data. "
                "Name one for each."
            )
        logits = class_logits(forward, self.tokens)
        if logits.shape[-1] != labels.shape[-1]:
            raise InputError(
                f"model.num_labels = {logits.shape[-1]}: the data has {labels.shape[-1]} classes. Set it to that."
            )
        return Predictions(logits, labels, (jnp.sum(labels, axis=-1) > 0).astype(jnp.float32))


def make_reader(head: str, words: Sequence[str], tokenizer: Tokenizer | None) -> Reader:
    """The reader for `head` and `words`: see `make`. Raises InputError where they don't go together."""
    if head not in HEADS:
        raise InputError(f"head = {head!r}: no such head.{did_you_mean(str(head), HEADS)}")
    if (head == "words") != bool(words):
        raise InputError(
            f"head = {head!r} with words = {list(words)}: "
            + ("name a word for each class." if head == "words" else "words are for head = 'words'.")
        )
    tokens = label_tokens(words, tokenizer, "words") if words and tokenizer else None
    return Reader(tuple(words), tokens)


def metrics(read: Predictions) -> dict[str, tuple[Float[Array, ""], Float[Array, ""]]]:
    """`label_nll` (nats), `accuracy`, `brier` and `confidence`: see ops.class_losses.Scores. (`nll` would be that of
    tokens, of which perplexities are made.)"""
    out = class_losses.scores(*read)
    sums = {
        "label_nll": out.nll_sum,
        "accuracy": out.correct_sum,
        "brier": out.brier_sum,
        "confidence": out.confidence_sum,
    }
    return {name: (total, out.weight_sum) for name, total in sums.items()}
