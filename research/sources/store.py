"""Tokens of one source on disk: made once, then mapped into memory, whatever the sequence length."""

import dataclasses
import itertools
import json
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from research.errors import InputError
from research.files import cache_root
from research.sources import chat, formats, records
from research.sources.cache import cached, code_digest, digest
from research.sources.records import NUMBERED, BadRecord, Classes, Origin, Turn
from research.sources.tokenizers import Tokenizer

READING = code_digest(
    records.__file__, formats.__file__, chat.__file__, __file__
)  # of all that decides what examples hold
SAMPLES = 256  # raw records kept beside the tokens
_CHUNK_EXAMPLES, _CHUNK_CHARS = 1024, 4_000_000
_EXAMPLE = np.dtype([("key", "<u8"), ("length", "<i8"), ("supervised", "<i8"), ("bytes", "<i8")])


class Example(NamedTuple):
    """A checked record."""

    record: dict[str, Any]  # under the fields' own names
    turns: list[Turn]
    key: int  # equal for equal documents and equal prompts
    where: str  # file and line, or the like
    label: int | list[float] | None = None


@dataclasses.dataclass(frozen=True, eq=False)
class Store:
    """The tokens of one source.

    Attributes:
      tokens: [N] uint16 or uint32, those of all examples one after the other.
      mask: [N] bool, True where a token is to be predicted; None for plain text, where all are.
      key: [E] uint64, hash of each example's document or prompt.
      length: [E] int64, tokens of each example.
      supervised: [E] int64, tokens to be predicted of each example.
      bytes: [E] int64, UTF-8 bytes of each example's text.
      samples: the examples of the least keys, sorted by key, one a prompt: {"key", "length", "record"}; none
        for text.
      labels: [E, C] float32, the probability of each class; None where the examples have no labels.
      counts: "records" read, "duplicates" dropped, and "bad": {reason: how many were skipped}.
      was_cached: nothing had to be tokenised.
    """

    tokens: np.ndarray
    mask: np.ndarray | None
    key: np.ndarray
    length: np.ndarray
    supervised: np.ndarray
    bytes: np.ndarray
    samples: list[dict[str, Any]]
    labels: np.ndarray | None
    counts: dict[str, Any]
    was_cached: bool


def read_examples(
    origin: Origin,
    format: str,
    fields: Mapping[str, str],
    on_bad_record: str,
    counts: Counter[str],
    classes: Classes = NUMBERED,
) -> Iterator[Example]:
    """Yields the checked records of `origin`; counts "records", "duplicates" and the bad ones by reason.

    Raises:
      InputError: a record is bad and `on_bad_record` is "error"; or no record is good.
    """
    seen: set[int] = set()
    any_good = False
    for where, raw in origin.read():
        counts["records"] += 1
        try:
            record = records.parse(raw)
            if format == "auto":
                format = records.detect_format(record, fields)
            turns, label = records.check(record, format, fields), None
            if format == "labelled":
                if classes.known:
                    label = records.label(record, fields, classes.names)
                turns = [(role, classes.prompt.replace("{text}", text)) for role, text in turns]
        except BadRecord as e:
            if on_bad_record == "error":
                raise InputError(f"{where}: {e} Or set data.on_bad_record='skip'.") from e
            counts[f"bad: {e.reason}"] += 1
            continue
        except InputError as e:
            raise InputError(f"{where}: {e}") from e
        any_good = True
        key = formats.split_key(turns)
        if origin.generated:
            if key in seen:
                counts["duplicates"] += 1
                continue
            seen.add(key)
        yield Example(records.canonical(record, fields), turns, key, where, label)
    if not any_good:
        bad = ", ".join(f"{n} {name}" for name, n in counts.items() if name.startswith("bad: "))
        raise InputError(f"{origin.name!r} holds no usable record ({bad or 'it is empty'}). Give another.")


def open_store(
    origin: Origin,
    tokenizer: Tokenizer,
    *,
    format: str,
    fields: Mapping[str, str],
    template: str,
    on_bad_record: str,
    classes: Classes = NUMBERED,
    cache_dir: str = "",
) -> Store:
    """Returns the tokens of `origin`, from the cache where they have been made of the same things before.

    Raises:
      InputError: a record is bad, the template can't be used, or the cache can't be written.
    """
    template = formats.resolve_template(template, tokenizer)
    made_of = {
        "origin": origin.made_of,
        "tokenizer": tokenizer.fingerprint(),
        "options": [format, dict(sorted(fields.items())), template, on_bad_record, *classes],
        "code": READING,
    }
    folder = cache_root(cache_dir) / "tokens" / digest([json.dumps(made_of)])

    def build(made: Path) -> None:
        counts: Counter[str] = Counter()
        examples = read_examples(origin, format, fields, on_bad_record, counts, classes)
        _write(made, examples, tokenizer, template, counts)

    was_cached = cached(folder, build)
    meta = json.loads((folder / "meta.json").read_text())
    examples = np.load(folder / "examples.npy")
    return Store(
        tokens=np.memmap(folder / "tokens.bin", dtype=meta["dtype"], mode="r"),
        mask=None if meta["text"] else np.memmap(folder / "mask.bin", dtype=bool, mode="r"),
        **{name: np.ascontiguousarray(examples[name]) for name in _EXAMPLE.names},
        samples=meta["samples"],
        labels=np.load(folder / "labels.npy") if (folder / "labels.npy").is_file() else None,
        counts=meta["counts"],
        was_cached=was_cached,
    )


def _write(made: Path, examples: Iterator[Example], tokenizer: Tokenizer, template: str, counts: Counter[str]) -> None:
    dtype = "<u2" if tokenizer.size <= 2**16 else "<u4"
    rows: list[np.ndarray] = []
    samples: list[dict[str, Any]] = []
    labels: list[int | list[float]] = []
    text = False
    with open(made / "tokens.bin", "wb") as tokens_file, open(made / "mask.bin", "wb") as mask_file:
        for chunk in _chunks(examples):
            text = chunk[0].turns[0][0] == "text"
            turns, where = [example.turns for example in chunk], [example.where for example in chunk]
            tokens, mask, lengths = formats.encode(turns, tokenizer, template, where)
            tokens_file.write(tokens.astype(dtype).tobytes())
            row = np.zeros(len(chunk), _EXAMPLE)
            row["key"] = np.fromiter((example.key for example in chunk), np.uint64, len(chunk))
            row["length"] = lengths
            row["supervised"] = np.add.reduceat(mask, np.cumsum(lengths) - lengths, dtype=np.int64)
            row["bytes"] = [sum(len(text.encode()) for _, text in example.turns) for example in chunk]
            rows.append(row)
            labels += [example.label for example in chunk if example.label is not None]
            if not text:
                mask_file.write(mask.tobytes())
                samples = _least(samples, chunk, lengths)
    np.save(made / "examples.npy", np.concatenate(rows))
    if labels:
        np.save(made / "labels.npy", _distributions(labels))
    bad = {name.removeprefix("bad: "): n for name, n in counts.items() if name.startswith("bad: ")}
    meta = {
        "dtype": dtype,
        "text": text,
        "samples": samples,
        "counts": {"records": counts["records"], "duplicates": counts["duplicates"], "bad": bad},
    }
    (made / "meta.json").write_text(json.dumps(meta, default=str))


def _distributions(labels: list[int | list[float]]) -> np.ndarray:
    """Class numbers, or probabilities, one for each example -> [E, C] float32."""
    soft = {len(label) for label in labels if isinstance(label, list)}
    if len(soft) > 1:
        raise InputError(f"labels: some records have {min(soft)} probabilities, and others {max(soft)}. Mend them.")
    made = np.zeros((len(labels), max(soft | {1 + max((x for x in labels if isinstance(x, int)), default=1)})))
    for row, label in zip(made, labels, strict=True):
        if isinstance(label, int):
            row[label] = 1
        else:
            row[: len(label)] = label
    return (made / made.sum(axis=1, keepdims=True)).astype(np.float32)


def _chunks(examples: Iterator[Example]) -> Iterator[list[Example]]:
    chunk: list[Example] = []
    chars = 0
    for example in examples:
        chunk.append(example)
        chars += sum(len(text) for _, text in example.turns)
        if len(chunk) >= _CHUNK_EXAMPLES or chars >= _CHUNK_CHARS:
            yield chunk
            chunk, chars = [], 0
    if chunk:
        yield chunk


def _least(samples: list[dict[str, Any]], chunk: list[Example], lengths: np.ndarray) -> list[dict[str, Any]]:
    """The samples of the least keys: those held out first, whatever the fraction, in random order."""
    new = [
        {"key": example.key, "length": int(length), "record": example.record}
        for example, length in zip(chunk, lengths, strict=True)
    ]
    ordered = sorted([*samples, *new], key=lambda sample: sample["key"])
    return [next(equal) for _, equal in itertools.groupby(ordered, key=lambda sample: sample["key"])][:SAMPLES]
