"""Logits of a few classes: those of a classifier's head, or of the words that stand for the classes."""

from collections.abc import Sequence

import jax.numpy as jnp
from jaxtyping import Array, Float

from research.errors import InputError
from research.objectives.types import Forward
from research.sources.tokenizers import Tokenizer


def class_logits(
    forward: Forward, label_tokens: Sequence[int] | None = None, role: str = "policy"
) -> Float[Array, "B T C"]:
    """Logits [B, T, C] of a few classes at every position, float32.

    Args:
      forward: the models on the batch.
      label_tokens: of a language model, C tokens that stand for the classes: no other logit is computed. None for a
        model whose head has a logit for each class (num_labels).
      role: whose logits.

    Raises:
      InputError: the model's head is of the other kind.
    """
    num_labels, where = forward.models[role].config.num_labels, "model" if role == "policy" else f"roles.{role}"
    if label_tokens is None and not num_labels:
        raise InputError(
            f"{where}.num_labels = 0: the model's head predicts tokens, not classes. Set it to the number of classes, "
            "or let words stand for the classes (head = 'words')."
        )
    if label_tokens is not None and num_labels:
        raise InputError(
            f"{where}.num_labels = {num_labels}: the model's head predicts classes, so that no words can stand for "
            "them. Set it to 0, or use head = 'linear'."
        )
    hidden, head = forward.hidden(role), forward.head(role)
    return head.logits(hidden, None if label_tokens is None else jnp.asarray(label_tokens, jnp.int32))


def label_tokens(words: Sequence[str], tokenizer: Tokenizer, field: str) -> tuple[int, ...]:
    """The first token of each word, as it is where the word goes on from other text.

    Args:
      words: one for each class, with the space before them that the model expects: " yes".
      tokenizer: of the model.
      field: what to call them in an error.

    Raises:
      InputError: fewer than two words, an empty one, or two that begin with the same token.
    """
    if isinstance(words, str) or len(words) < 2 or not all(isinstance(w, str) and w for w in words):
        raise InputError(f"{field} = {words!r}: give a list of words, one for each class, two or more.")
    tokens = tuple(ids[0] for ids in tokenizer.encode_stretches(list(words), special=False, first=False))
    for i, token in enumerate(tokens):
        if token in tokens[:i]:
            raise InputError(
                f"{field} = {list(words)}: {words[tokens.index(token)]!r} and {words[i]!r} begin with the same token "
                f"{tokenizer.decode([token])!r}, and a class is known by its first. Choose other words."
            )
    return tokens
