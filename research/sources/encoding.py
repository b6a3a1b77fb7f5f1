"""From examples to tokens, and what else is kept of them."""

import itertools
from collections import Counter
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np

from research.errors import InputError
from research.sources import answers, formats, records
from research.sources.examples import Example
from research.sources.records import CONFIG_SETTINGS, BadRecord
from research.sources.tokenizers import Tokenizer

SAMPLES = 256  # raw records kept beside the tokens
_CHUNK_EXAMPLES, _CHUNK_CHARS = 1024, 4_000_000
EXAMPLE = np.dtype([("key", "<u8"), ("length", "<i8"), ("supervised", "<i8"), ("bytes", "<i8")])


class Columns(NamedTuple):
    """What is kept of examples beside their tokens.

    Attributes:
      rows: arrays of EXAMPLE, a row for each document.
      labels: of the examples that have one.
      judged: of each comparison, see answers.of_comparison.
      ends: where the record of each document ends in records.jsonl; empty where they aren't kept.
    """

    rows: list[np.ndarray]
    labels: list[int | list[float]]
    judged: list[np.ndarray]
    ends: list[int]

    def add(self, chunk: list[Example], mask: np.ndarray, lengths: np.ndarray) -> None:
        """Adds examples; `mask` is that of all their tokens, and `lengths` those of their documents."""
        documents = [(example.key, turns) for example in chunk for turns in example.documents]
        rows = np.zeros(len(documents), EXAMPLE)
        rows["key"] = np.fromiter((key for key, _ in documents), np.uint64, len(documents))
        rows["length"] = lengths
        rows["supervised"] = np.add.reduceat(mask, np.cumsum(lengths) - lengths, dtype=np.int64)
        rows["bytes"] = [sum(len(turn.text.encode()) for turn in turns) for _, turns in documents]
        self.rows.append(rows)
        self.labels.extend(example.label for example in chunk if example.label is not None)
        self.judged.extend(answers.of_comparison(each.comparison) for each in chunk if each.comparison is not None)

    def arrays(self) -> dict[str, np.ndarray]:
        """What there is: "examples" [E] EXAMPLE, "labels" [E, C] float32, "answers" [E] answers.DTYPE, "records"."""
        there = {"examples": np.concatenate(self.rows)}
        if self.labels:
            there["labels"] = _distributions(self.labels)
        if self.judged:
            there["answers"] = answers.numbered(self.judged)
        if self.ends:
            there["records"] = np.array(self.ends, np.int64)
        return there


def count(chunk: list[Example], tokenizer: Tokenizer, counts: Counter[str]) -> str:
    """Counts what a report says of examples; returns the first special token that one of their texts spells, or ""."""
    counts.update(_count_comparisons(chunk))
    texts = ([turn.text for turns in example.documents for turn in turns] for example in chunk)
    spelled, first = formats.count_markers(texts, tokenizer)
    counts["markers"] += spelled
    counts["weights"] += sum(example.record.get("weight") not in (None, 1) for example in chunk)
    return first


def encode(
    chunk: list[Example], tokenizer: Tokenizer, template: str, counts: Counter[str], skip: bool
) -> tuple[np.ndarray, np.ndarray, np.ndarray, list[Example]]:
    """Tokens, mask and lengths of the documents of a chunk's examples, and these without those that are skipped, which
    are counted: a comparison goes whole."""
    refused: dict[int, BadRecord] = {}
    documents = [(i, turns) for i, example in enumerate(chunk) for turns in example.documents]
    where = [chunk[i].where for i, _ in documents]
    try:
        encoded = formats.encode(
            [turns for _, turns in documents], tokenizer, template, where, refused if skip else None
        )
    except BadRecord as e:
        raise e.at("", **CONFIG_SETTINGS) from e
    lost = {documents[i][0]: error for i, error in refused.items()}
    counts.update(f"bad: {error.reason}" for error in lost.values())
    kept = [example for i, example in enumerate(chunk) if i not in lost]
    if sum(len(chunk[i].documents) for i in lost) > len(refused):  # what is compared with them was encoded
        return encode(kept, tokenizer, template, counts, skip)
    return *encoded, kept


def _count_comparisons(chunk: list[Example]) -> Counter[str]:
    compared = [each.comparison for each in chunk if each.comparison is not None and len(each.comparison.answers) > 1]
    return Counter(
        comparisons=len(compared),
        identical=sum(each.identical for each in compared),
        ties=sum(each.ties for each in compared),
    )


def _distributions(labels: list[int | list[float]]) -> np.ndarray:
    """Class numbers, or probabilities, one for each example -> [E, C] float32."""
    soft = {len(label) for label in labels if isinstance(label, list)}
    if len(soft) > 1:
        raise InputError(f"labels: some records have {min(soft)} probabilities, and others {max(soft)}. Mend them.")
    probs = np.zeros((len(labels), max(soft | {1 + max((x for x in labels if isinstance(x, int)), default=1)})))
    for row, label in zip(probs, labels, strict=True):
        if isinstance(label, int):
            row[label] = 1
        else:
            row[: len(label)] = label
    return (probs / probs.sum(axis=1, keepdims=True)).astype(np.float32)


def chunks(examples: Iterator[Example]) -> Iterator[list[Example]]:
    """Examples by as many as are worth encoding at once, and fit in memory."""
    chunk: list[Example] = []
    chars = 0
    for example in examples:
        chunk.append(example)
        chars += sum(len(turn.text) for turns in example.documents for turn in turns)
        if len(chunk) >= _CHUNK_EXAMPLES or chars >= _CHUNK_CHARS:
            yield chunk
            chunk, chars = [], 0
    if chunk:
        yield chunk


def least(samples: list[dict[str, Any]], chunk: list[Example], lengths: np.ndarray) -> list[dict[str, Any]]:
    """The samples of the least keys: those held out first, whatever the fraction, in random order."""
    new = [
        {"key": example.key, "length": int(length), "record": example.record}
        for example, length in zip(chunk, lengths[_firsts(chunk)], strict=True)
        # An answer that nobody should learn is none to expect, nor one that calls tools.
        if example.turns[-1].role != records.SHOWN and not records.calls(example.turns[-1])
    ]
    ordered = sorted([*samples, *new], key=lambda sample: sample["key"])
    return [next(equal) for _, equal in itertools.groupby(ordered, key=lambda sample: sample["key"])][:SAMPLES]


def _firsts(chunk: list[Example]) -> np.ndarray:
    """[examples] int64: where the first document of each is among all documents of a chunk."""
    sizes = np.array([len(example.documents) for example in chunk])
    return np.cumsum(sizes) - sizes
