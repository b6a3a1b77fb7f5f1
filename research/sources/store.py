"""Tokens of one source on disk: made once, then mapped into memory, whatever the sequence length."""

import contextlib
import dataclasses
import functools
import hashlib
import importlib.metadata
import inspect
import itertools
import json
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any, BinaryIO, NamedTuple

import numpy as np

from research import digests, files, progress
from research.errors import InputError, located
from research.sources import answers, chat, comparisons, entries, formats, json_limits, records, views
from research.sources import fields as table
from research.sources.cache import cached, code_digest, damaged, digest
from research.sources.cache import entries as entries_of
from research.sources.comparisons import Comparison
from research.sources.entries import Origin
from research.sources.records import CONFIG_SETTINGS, NUMBERED, BadRecord, Classes, Turn, speaker
from research.sources.tokenizers import Tokenizer
from research.sources.tokenizers import tokenizer as tokenizer_lib

_READERS = (entries, records, comparisons, answers, json_limits, formats, chat, tokenizer_lib)
# A hash of all that decides what examples hold, beside their files, the options and the tokenizer's own.
READING = digest(
    [
        code_digest(__file__, *(module.__file__ for module in _READERS)),
        *(f"{package} {importlib.metadata.version(package)}" for package in ("tokenizers", "jinja2")),
    ]
)
SAMPLES = 256  # raw records kept beside the tokens
_LATER = (".bin", ".jsonl")  # files that are checked block by block, as they are read
_CHUNK_EXAMPLES, _CHUNK_CHARS = 1024, 4_000_000
_EXAMPLE = np.dtype([("key", "<u8"), ("length", "<i8"), ("supervised", "<i8"), ("bytes", "<i8")])


class Records:
    """The raw records of a source's examples, read from disk one by one.

    Args:
      folder: of the store.
    """

    def __init__(self, folder: Path):
        self._ends = np.load(folder / "records.npy")
        self._bytes = _Mapping(folder)("records.jsonl", np.uint8)

    def __len__(self) -> int:
        return len(self._ends)

    def __getitem__(self, example: int) -> dict[str, Any]:
        """The record that example number `example` was made of."""
        start = int(self._ends[example - 1]) if example else 0
        return json.loads(self._bytes[start : int(self._ends[example])].tobytes())


class Example(NamedTuple):
    """A checked record."""

    record: dict[str, Any]  # under the fields' own names
    turns: list[Turn]  # of several answers, with the best
    key: int  # equal for equal documents and equal prompts
    where: str  # file and line, or the like
    label: int | list[float] | None = None
    comparison: Comparison | None = None

    @property
    def documents(self) -> list[list[Turn]]:
        """The turns of each document that it is: one, or as many as it has answers."""
        if self.comparison is None:
            return [self.turns]
        return [[*self.comparison.prompt, *answer] for answer in self.comparison.answers]


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
      fields: further batch fields, which a view gives: name -> [N, ...], a value for each token.
      answers: [E] answers.DTYPE, what is said of answers to prompts; None where nothing is.
      counts: "records" read, "duplicates" dropped, "bad": {reason: how many were skipped}, and "markers": of how many
        records spell special tokens, with the first of these ("marker"); "weights": how many have a weight; of answers
        that are compared "comparisons", in how many of them two are "identical", and in how many some have equal
        scores, "ties".
      was_cached: nothing had to be tokenised.
      folder: where it lies; the name stands for all that it was made of.
      content: a hash of the tokens, and of what else there is of each.
      template: how its conversations are written: "model", "chat" or "plain"; "" in a view.
      records: [E] what each example was made of; None unless that was asked for.
    """

    tokens: np.ndarray
    mask: np.ndarray | None
    key: np.ndarray
    length: np.ndarray
    supervised: np.ndarray
    bytes: np.ndarray
    samples: list[dict[str, Any]]
    labels: np.ndarray | None
    fields: dict[str, np.ndarray]
    answers: np.ndarray | None
    counts: dict[str, Any]
    was_cached: bool
    folder: Path
    content: str
    template: str = ""
    records: Records | None = None


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
                format = comparisons.detect(record, fields) or records.detect_format(record, fields)
            checked = _checked(record, format, fields, classes)
        except BadRecord as e:
            if on_bad_record == "error":
                raise e.at(where, **CONFIG_SETTINGS) from e
            counts[f"bad: {e.reason}"] += 1
            continue
        any_good = True
        key = formats.split_key(checked[0].turns)
        if origin.generated:
            if key in seen:
                counts["duplicates"] += 1
                continue
            seen.add(key)
        yield from (example._replace(key=key, where=where) for example in checked)
    if not any_good:
        raise _none_usable(origin.name, counts)


def _checked(record: dict[str, Any], format: str, fields: Mapping[str, str], classes: Classes) -> list[Example]:
    """The examples that a record is, without their keys and places. Raises BadRecord."""
    if format in comparisons.FORMATS:
        return [
            Example(_asked(record, fields, each), [*each.prompt, *each.answers[0]], 0, "", comparison=each)
            for each in comparisons.read_all(record, format, fields)
        ]
    turns, label = records.check(record, format, fields), None
    if format == "labelled":
        if classes.known:
            label = records.label(record, fields, classes.names)
        turns = [turn._replace(text=classes.prompt.replace("{text}", turn.text)) for turn in turns]
    return [Example(records.canonical(record, fields), turns, 0, "", label)]


def _asked(record: Mapping[str, Any], fields: Mapping[str, str], comparison: Comparison) -> dict[str, Any]:
    """A record of answers as one of a prompt and its best answer, for evaluations that generate."""
    turns = [*comparison.prompt, *comparison.answers[0]]
    turns = turns[1:] if turns[0].role == records.TOOLS else turns
    rest = records.canonical(record, fields)
    if [(speaker(turn.role), turn.more) for turn in turns] == [("user", {}), ("assistant", {})]:
        rest = {name: value for name, value in rest.items() if name != "messages"}
        return {**rest, "prompt": turns[0].text, "response": turns[1].text}
    messages = [{"role": speaker(turn.role), "content": turn.text, **turn.more} for turn in turns]
    return {**rest, "messages": messages}


def _none_usable(name: str, counts: Counter[str]) -> InputError:
    bad = ", ".join(f"{n} {reason}" for reason, n in counts.items() if reason.startswith("bad: "))
    return InputError(f"{name!r} holds no usable record ({bad or 'it is empty'}). Give another.")


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
    keep_records: bool = False,
) -> Store:
    """Returns the tokens of `origin`, from the cache where they have been made of the same things before; with
    `keep_records` beside the records that they were made of.

    Raises:
      InputError: a record is bad, the template can't be used, or the cache can't be written.
    """
    template = formats.resolve_template(template, tokenizer)
    identity = {
        "origin": origin.identity,
        "tokenizer": tokenizer.fingerprint(),
        "options": [format, dict(sorted(fields.items())), template, on_bad_record, *classes],
        "code": READING,
    } | ({"records": True} if keep_records else {})
    folder = files.cache_root(cache_dir) / "tokens" / digest([json.dumps(identity)])

    def build(partial: Path) -> None:
        counts: Counter[str] = Counter()
        examples = read_examples(origin, format, fields, on_bad_record, counts, classes)
        writing = _Writing(
            tokenizer, template, counts, on_bad_record == "skip", keep_records, origin.name, origin.count()
        )
        if not _write(partial, examples, writing):
            raise _none_usable(origin.name, counts)

    was_cached = cached(folder, build, _LATER)
    return _read(folder, was_cached)


def open_view(store: Store, view: Mapping[str, Any], field: str, seq_len: int, tokenizer: Tokenizer) -> Store:
    """Returns the tokens of `store` as a view shows them, kept in the cache beside it.

    Args:
      store: of whole documents.
      view, field, seq_len, tokenizer: see views.load.

    Raises:
      InputError: see views.load; or what the view gives doesn't fit together.
    """
    module = views.find(view, field)
    depends = seq_len if "seq_len" in inspect.signature(module.make).parameters else None
    code = code_digest(module.__file__, views.__file__, __file__, *_helpers(module))
    folder = store.folder.with_name(digest([store.folder.name, json.dumps(view, sort_keys=True), depends, code]))
    if store.answers is not None:
        raise InputError(
            f"{field}: a view is of single documents, and here answers are judged or compared. Take the view out."
        )
    seen = views.load(view, field, seq_len, tokenizer)
    where = f"{field}.kind = {view['kind']!r}"
    was_cached = cached(folder, lambda partial: _write_view(partial, store, seen, where), _LATER)
    return _read(folder, was_cached and store.was_cached)


def _helpers(module: ModuleType) -> list[str]:
    """The files in sources/ that a view takes names from: what they say decides what it shows."""
    modules = {inspect.getmodule(value) for value in vars(module).values()} - {None}
    return sorted(each.__file__ for each in modules if each.__name__.startswith("research.sources."))


class _Mapping:
    """Maps arrays from the files of a folder of the cache, with their blocks checked as they are read."""

    def __init__(self, folder: Path):
        self._folder, self._entries = folder, entries_of(folder)

    def __call__(self, name: str, dtype: Any, shape: tuple[int, ...] | None = None) -> Any:
        path = self._folder / name
        return digests.mapped(path, dtype, shape, self._entries[name], functools.partial(damaged, path))


def _read(folder: Path, was_cached: bool) -> Store:
    meta, mapped = files.read_json(folder / "meta.json"), _Mapping(folder)
    examples = np.load(folder / "examples.npy")
    tokens = mapped("tokens.bin", meta["dtype"])
    return Store(
        tokens=tokens,
        mask=None if meta["text"] else mapped("mask.bin", bool),
        **{name: np.ascontiguousarray(examples[name]) for name in _EXAMPLE.names},
        samples=meta["samples"],
        labels=np.load(folder / "labels.npy") if (folder / "labels.npy").is_file() else None,
        fields={
            name: mapped(f"{name}.bin", table.find(name).dtype, (len(tokens), *shape))
            for name, shape in meta.get("fields", {}).items()
        },
        answers=np.load(folder / "answers.npy") if (folder / "answers.npy").is_file() else None,
        counts=meta["counts"],
        was_cached=was_cached,
        folder=folder,
        content=meta["content"],
        template=meta.get("template", ""),
        records=Records(folder) if (folder / "records.npy").is_file() else None,
    )


def _write_view(partial: Path, store: Store, view: views.View, where: str) -> None:
    """Writes what a view shows of each document: as many examples of its key as there are documents."""
    rows, owners, shapes, text = [], [], {}, store.mask is None
    ends = np.cumsum(store.length)
    with contextlib.ExitStack() as stack:
        open_file = lambda name: stack.enter_context(open(partial / f"{name}.bin", "wb"))  # noqa: E731
        outputs = {name: open_file(name) for name in ("tokens", "mask", *view.fields)}
        for i, (start, end) in enumerate(zip(ends - store.length, ends, strict=True)):
            tokens = store.tokens[start:end].astype(np.int32)
            mask = np.ones(len(tokens), bool) if store.mask is None else np.array(store.mask[start:end])
            with located(where):
                seen = view.documents(views.Document(tokens, mask), np.random.default_rng(int(store.key[i])))
            for n, document in enumerate(seen):
                _check_document(document, view, where)
                if store.labels is not None:  # a label is read at the last token, whichever that is
                    document = document._replace(mask=np.arange(len(document.tokens)) == len(document.tokens) - 1)
                text = text and bool(document.mask.all())
                outputs["tokens"].write(document.tokens.astype(store.tokens.dtype).tobytes())
                outputs["mask"].write(document.mask.astype(bool).tobytes())
                for name in view.fields:
                    values = np.asarray(document.fields[name], table.find(name).dtype)
                    shapes.setdefault(name, values.shape[1:])
                    outputs[name].write(values.tobytes())
                size = store.bytes[i] if n == 0 else 0  # of a document's text, once
                rows.append((store.key[i], len(document.tokens), int(document.mask.sum()), size))
                owners.append(i)
    if not rows:
        raise InputError(f"{where}: leaves nothing of any document. Change its options, or take it out.")
    np.save(partial / "examples.npy", np.array(rows, _EXAMPLE))
    if store.labels is not None:
        np.save(partial / "labels.npy", store.labels[owners])
    meta = {"dtype": store.tokens.dtype.str, "text": text, "samples": store.samples, "counts": store.counts}
    meta |= {"fields": shapes, "content": _content(partial), "of": where}
    files.write_json(partial / "meta.json", meta, indent=None)


def _content(folder: Path) -> str:
    """A hash of all arrays in a folder, and of the records that are kept."""
    result = hashlib.blake2b(digest_size=16)
    for file in sorted(folder.iterdir()):
        if file.suffix in (".bin", ".npy", ".jsonl"):
            with open(file, "rb") as f:
                result.update(file.name.encode() + hashlib.file_digest(f, "blake2b").digest())
    return result.hexdigest()


def _check_document(document: views.Document, view: views.View, where: str) -> None:
    n = len(document.tokens)
    if not n:
        raise InputError(f"{where}: gives a document of no tokens. Have it give none instead.")
    if set(document.fields) != set(view.fields):
        raise InputError(f"{where}: gives the fields {sorted(document.fields)}, and promised {sorted(view.fields)}.")
    for name, values in {"mask": document.mask, **document.fields}.items():
        if len(values) != n:
            raise InputError(f"{where}: gives {n} tokens and {len(values)} values of {name!r}. Give one for each.")
    prefix = np.asarray(document.fields.get("prefix", ()), np.int32)
    if not np.array_equal(prefix, np.sort(prefix != 0)[::-1]):
        raise InputError(f"{where}: gives a 'prefix' that isn't 1 at the first tokens and 0 at all others. Mend it.")
    if np.any(prefix & document.mask[: len(prefix)]):
        raise InputError(
            f"{where}: has tokens of a 'prefix', which all of it sees, predicted. Set their mask to False."
        )


class _Writing(NamedTuple):
    """How a store is written.

    Attributes:
      tokenizer, template: make tokens of the examples.
      counts: takes up what becomes of them.
      skip: those that the template refuses are skipped.
      keep_records: they are kept beside the tokens.
      name: of what they are, for `understudy cache`.
      total: how many records there are; 0 where that isn't known.
    """

    tokenizer: Tokenizer
    template: str
    counts: Counter[str]
    skip: bool
    keep_records: bool
    name: str
    total: int = 0


def _write(partial: Path, examples: Iterator[Example], writing: _Writing) -> bool:
    """Writes the examples' tokens and what belongs to them; returns whether there are any."""
    tokenizer, template, counts, skip, keep_records, name, total = writing
    of = f" of {total:,}" if total else ""
    dtype = "<u2" if tokenizer.size <= 2**16 else "<u4"
    columns, samples, text, marker = _Columns([], [], [], []), [], False, ""
    with contextlib.ExitStack() as stack:
        tokens_file = stack.enter_context(open(partial / "tokens.bin", "wb"))
        mask_file = stack.enter_context(open(partial / "mask.bin", "wb"))
        records_file = stack.enter_context(open(partial / "records.jsonl", "wb")) if keep_records else None
        for chunk in _chunks(examples):
            progress.say(f"tokenising {name}: {counts['records']:,}{of} records")
            text = chunk[0].turns[0][0] == "text"
            tokens, mask, lengths, chunk = _encode(chunk, tokenizer, template, counts, skip)
            if not chunk:
                continue
            tokens_file.write(tokens.astype(dtype).tobytes())
            columns.add(chunk, mask, lengths)
            if records_file is not None:
                columns.ends.extend(_write_records(records_file, chunk))
            first = _count(chunk, tokenizer, counts)
            marker = marker or first
            if not text:
                mask_file.write(mask.tobytes())
                samples = _least(samples, chunk, lengths)
    if not columns.rows:
        return False
    columns.save(partial)
    bad = {name.removeprefix("bad: "): n for name, n in counts.items() if name.startswith("bad: ")}
    summary = {"records": counts["records"], "duplicates": counts["duplicates"], "bad": bad}
    summary |= {"markers": counts["markers"], "marker": marker, "weights": counts["weights"]}
    if columns.judged:
        summary |= {name: counts[name] for name in ("comparisons", "identical", "ties")}
    meta = {"dtype": dtype, "text": text, "samples": samples, "counts": summary, "content": _content(partial)}
    meta |= {"template": template, "of": name}
    (partial / "meta.json").write_text(json.dumps(meta, default=str))
    return True


class _Columns(NamedTuple):
    """What is kept of examples beside their tokens.

    Attributes:
      rows: arrays of _EXAMPLE, a row for each document.
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
        rows = np.zeros(len(documents), _EXAMPLE)
        rows["key"] = np.fromiter((key for key, _ in documents), np.uint64, len(documents))
        rows["length"] = lengths
        rows["supervised"] = np.add.reduceat(mask, np.cumsum(lengths) - lengths, dtype=np.int64)
        rows["bytes"] = [sum(len(turn.text.encode()) for turn in turns) for _, turns in documents]
        self.rows.append(rows)
        self.labels.extend(example.label for example in chunk if example.label is not None)
        self.judged.extend(answers.of_comparison(each.comparison) for each in chunk if each.comparison is not None)

    def save(self, folder: Path) -> None:
        np.save(folder / "examples.npy", np.concatenate(self.rows))
        if self.labels:
            np.save(folder / "labels.npy", _distributions(self.labels))
        if self.judged:
            np.save(folder / "answers.npy", answers.numbered(self.judged))
        if self.ends:
            np.save(folder / "records.npy", np.array(self.ends, np.int64))


def _write_records(file: BinaryIO, chunk: list[Example]) -> Iterator[int]:
    """Writes the record of each document of the examples; yields where each ends. Those of one example are the same."""
    for example in chunk:
        for _ in example.documents:
            file.write(json.dumps(example.record, default=str).encode())
            yield file.tell()


def _count(chunk: list[Example], tokenizer: Tokenizer, counts: Counter[str]) -> str:
    """Counts what a report says of examples; returns the first special token that one of their texts spells, or ""."""
    counts.update(_count_comparisons(chunk))
    texts = ([turn.text for turns in example.documents for turn in turns] for example in chunk)
    spelled, first = formats.count_markers(texts, tokenizer)
    counts["markers"] += spelled
    counts["weights"] += sum(example.record.get("weight") not in (None, 1) for example in chunk)
    return first


def _encode(
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
        return _encode(kept, tokenizer, template, counts, skip)
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


def _chunks(examples: Iterator[Example]) -> Iterator[list[Example]]:
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


def _least(samples: list[dict[str, Any]], chunk: list[Example], lengths: np.ndarray) -> list[dict[str, Any]]:
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
