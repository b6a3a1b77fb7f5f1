"""Rows of a batch as people read them: documents, and in each what is only read, what is learned and what is hidden."""

import dataclasses
import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from research.sources.store import Store
from research.sources.tokenizers import Tokenizer

_FATES = {"drop": "dropped", "truncate": "cut"}
Batch = Mapping[str, np.ndarray]


@dataclasses.dataclass(frozen=True)
class Span:
    """A stretch of a document's tokens of one kind.

    Attributes:
      text: of the tokens that the model reads.
      learned: whether they are predicted, and count in the loss.
      special: whether they are special tokens; virtual ones are, whose text says how many there are.
      hidden: of learned tokens that the model doesn't read as they are, what they are; else "".
    """

    text: str
    learned: bool = False
    special: bool = False
    hidden: str = ""


@dataclasses.dataclass(frozen=True)
class Document:
    """A document, or a piece of one, in a row.

    Attributes:
      spans: what it consists of.
      notes: what is said of it: its source, which answer of a comparison it is, its class.
      tokens: how many it has.
      learned: how many of them are learned.
    """

    spans: tuple[Span, ...]
    notes: tuple[str, ...]
    tokens: int
    learned: int


@dataclasses.dataclass(frozen=True)
class Row:
    """A row of a batch: its documents, and how many places at its end are empty."""

    documents: tuple[Document, ...]
    padding: int


def rows(
    batch: Batch, learned: np.ndarray, tokenizer: Tokenizer, sources: Sequence[str] = (), read: np.ndarray | None = None
) -> list[Row]:
    """The rows of a batch.

    Args:
      batch: fields [B, T, ...]; see sources.fields.
      learned: [B, T] bool, which tokens are predicted and count.
      tokenizer: that made the tokens.
      sources: names of the sources that the field `source` counts.
      read: [B, T] int32, what the model reads in the place of `tokens`; by default these.
    """
    read = batch["tokens"] if read is None else read
    special = _special(tokenizer)
    result = []
    for row, segments in enumerate(batch["segment_ids"]):
        documents = []
        for number in range(1, int(segments.max(initial=0)) + 1):
            (at,) = np.nonzero(segments == number)
            own = {name: values[row, at] for name, values in batch.items() if name != "segment_ids"}
            spans = _spans(own["tokens"], read[row, at], learned[row, at], special, tokenizer)
            notes = _notes(own, sources)
            documents.append(Document(spans, notes, len(at), int(learned[row, at].sum())))
        result.append(Row(tuple(documents), int(np.sum(segments == 0))))
    return result


def _special(tokenizer: Tokenizer) -> frozenset[int]:
    """The ids that no text yields, and those that end documents."""
    added = tokenizer.backend.get_added_tokens_decoder()
    return frozenset(i for i, token in added.items() if token.special) | frozenset(tokenizer.stop)


def _spans(
    tokens: np.ndarray, read: np.ndarray, learned: np.ndarray, special: frozenset[int], tokenizer: Tokenizer
) -> tuple[Span, ...]:
    """The spans of one document, [N] each."""
    kinds = [
        (bool(yes), int(seen) in special, int(seen) >= tokenizer.size, int(seen) != int(token))
        for token, seen, yes in zip(tokens, read, learned, strict=True)
    ]
    spans, start = [], 0
    for (yes, is_special, virtual, hidden), group in itertools.groupby(kinds):
        end = start + len(list(group))
        text = f"<{end - start} virtual>" if virtual else _text(read, start, end, tokenizer)
        true = _text(tokens, start, end, tokenizer) if hidden and not virtual else ""
        spans.append(Span(text, yes, is_special or virtual, true))
        start = end
    return tuple(spans)


def _text(ids: np.ndarray, start: int, end: int, tokenizer: Tokenizer) -> str:
    """The text of tokens within a document: that of all up to the end, without that of those before."""
    known = [int(i) for i in ids if i < tokenizer.size]
    skipped = len(ids) - len(known)  # virtual tokens, which stand in front
    before = tokenizer.decode(known[: max(start - skipped, 0)], skip_special=False)
    whole = tokenizer.decode(known[: max(end - skipped, 0)], skip_special=False)
    if whole.startswith(before):
        return whole[len(before) :]
    return tokenizer.decode([int(i) for i in ids[start:end]], skip_special=False)


def _notes(own: Batch, sources: Sequence[str]) -> tuple[str, ...]:
    """What batch fields of one document, [N, ...] each, say of it."""
    notes = []
    if "source" in own and sources:
        notes.append(sources[int(own["source"][0])])
    if "pair" in own and own["pair"][0]:
        side = int(own["side"][0])
        rank = {0: "chosen", 1: "rejected"}.get(side, f"rank {side + 1}")
        notes.append(f"pair {int(own['pair'][0])}: {rank}")
    for name in ("margin", "preference", "score"):
        if name in own and np.isfinite(own[name][0]) and own[name][0] != {"margin": 0, "preference": 1}.get(name):
            notes.append(f"{name} {own[name][0]:.3g}")
    if "desirable" in own and own["desirable"][0] >= 0:
        notes.append("desirable" if own["desirable"][0] else "undesirable")
    if "mismatched" in own and own["mismatched"].any():
        notes.append("the answer to another prompt")
    if "label_probs" in own:
        notes.append(_label(own["label_probs"][-1]))
    return tuple(notes)


def _label(probs: np.ndarray) -> str:
    if not probs.any():
        return "no label"
    if probs.max() == 1:
        return f"class {int(probs.argmax())}"
    return "classes " + " ".join(f"{p:.2f}" for p in probs)


def lengths(names: Sequence[str], stores: Sequence[Store], seq_len: int, on_long: str) -> list[dict[str, Any]]:
    """How long the examples of each source are: "median", "p90", "p99" and "longest" in tokens, and how many are
    "over" seq_len, with their "fate".

    Args:
      names: of the sources.
      stores: their tokens.
      seq_len: T, without virtual tokens.
      on_long: data.on_long.
    """
    table = []
    for name, store in zip(names, stores, strict=True):
        length = np.asarray(store.length)
        median, p90, p99, longest = (int(np.quantile(length, q, method="higher")) for q in (0.5, 0.9, 0.99, 1.0))
        over = int(np.sum(length > seq_len))
        fate = "cut into pieces" if store.mask is None else "cut" if store.labels is not None else _FATES[on_long]
        table.append(
            {"source": name, "examples": len(length), "median": median, "p90": p90, "p99": p99, "longest": longest}
            | {"over": over, "fate": fate}
        )
    return table
