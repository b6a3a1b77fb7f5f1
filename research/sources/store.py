"""Tokens of one source on disk: made once, then mapped into memory, whatever the sequence length."""

import contextlib
import dataclasses
import functools
import hashlib
import importlib.metadata
import inspect
import json
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any, BinaryIO, NamedTuple

import numpy as np

from research import digests, files, progress
from research.errors import InputError, located
from research.sources import answers, chat, comparisons, encoding, entries, formats, json_limits, records, views
from research.sources import examples as examples_lib
from research.sources import fields as table
from research.sources.cache import cached, code_digest, damaged, digest
from research.sources.cache import entries as entries_of
from research.sources.entries import Origin
from research.sources.examples import Example, none_usable, read_examples
from research.sources.records import NUMBERED, Classes
from research.sources.tokenizers import Tokenizer
from research.sources.tokenizers import tokenizer as tokenizer_lib

_READERS = (entries, records, comparisons, answers, examples_lib, encoding, json_limits, formats, chat, tokenizer_lib)
# A hash of all that decides what examples hold, beside their files, the options and the tokenizer's own.
READING = digest(
    [
        code_digest(__file__, *(module.__file__ for module in _READERS)),
        *(f"{package} {importlib.metadata.version(package)}" for package in ("tokenizers", "jinja2")),
    ]
)
_LATER = (".bin", ".jsonl")  # files that are checked block by block, as they are read


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
      folder: where it lies; the name stands for all that it was made of. None where it is in memory alone.
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
    folder: Path | None
    content: str
    template: str = ""
    records: Records | None = None


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
            raise none_usable(origin.name, counts)

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
        raise view_of_answers(field)
    seen = views.load(view, field, seq_len, tokenizer)
    where = f"{field}.kind = {view['kind']!r}"
    was_cached = cached(folder, lambda partial: _write_view(partial, store, seen, where), _LATER)
    return _read(folder, was_cached and store.was_cached)


def view_of_answers(field: str) -> InputError:
    """What is said of a view of answers to prompts."""
    return InputError(
        f"{field}: a view is of single documents, and here answers are judged or compared. Take the view out."
    )


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
        **{name: np.ascontiguousarray(examples[name]) for name in encoding.EXAMPLE.names},
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
    with contextlib.ExitStack() as stack:
        open_file = lambda name: stack.enter_context(open(partial / f"{name}.bin", "wb"))  # noqa: E731
        outputs = {name: open_file(name) for name in ("tokens", "mask", *view.fields)}
        for owner, row, arrays in _seen(store, view, where):
            text = text and bool(arrays["mask"].all())
            for name, values in arrays.items():
                outputs[name].write(values.tobytes())
                shapes[name] = values.shape[1:]
            rows.append(row)
            owners.append(owner)
    if not rows:
        raise InputError(f"{where}: leaves nothing of any document. Change its options, or take it out.")
    np.save(partial / "examples.npy", np.array(rows, encoding.EXAMPLE))
    if store.labels is not None:
        np.save(partial / "labels.npy", store.labels[owners])
    shapes = {name: shapes[name] for name in view.fields}
    meta = {"dtype": store.tokens.dtype.str, "text": text, "samples": store.samples, "counts": store.counts}
    meta |= {"fields": shapes, "content": _content(partial), "of": where}
    files.write_json(partial / "meta.json", meta, indent=None)


def _seen(
    store: Store, view: views.View, where: str
) -> Iterator[tuple[int, tuple[int, int, int, int], dict[str, np.ndarray]]]:
    """Yields what a view shows: of which example it is, its row of EXAMPLE, and its tokens, mask and fields."""
    ends = np.cumsum(store.length)
    for i, (start, end) in enumerate(zip(ends - store.length, ends, strict=True)):
        tokens = store.tokens[start:end].astype(np.int32)
        mask = np.ones(len(tokens), bool) if store.mask is None else np.array(store.mask[start:end])
        with located(where):
            seen = view.documents(views.Document(tokens, mask), np.random.default_rng(int(store.key[i])))
        for n, document in enumerate(seen):
            _check_document(document, view, where)
            if store.labels is not None:  # a label is read at the last token, whichever that is
                document = document._replace(mask=np.arange(len(document.tokens)) == len(document.tokens) - 1)
            arrays = {"tokens": document.tokens.astype(store.tokens.dtype), "mask": document.mask.astype(bool)}
            arrays |= {name: np.asarray(document.fields[name], table.find(name).dtype) for name in view.fields}
            size = int(store.bytes[i]) if n == 0 else 0  # of a document's text, once
            yield i, (int(store.key[i]), len(document.tokens), int(document.mask.sum()), size), arrays


def in_memory(
    examples: Sequence[Example], tokenizer: Tokenizer, template: str, counts: Counter[str], skip: bool
) -> Store | None:
    """The tokens of some examples, which are written nowhere; None where none is left.

    Args:
      examples: of one format.
      tokenizer: makes the tokens.
      template: "model", "chat" or "plain".
      counts: takes up what becomes of them.
      skip: those that the template refuses are skipped; else such a one is an error.
    """
    columns, arrays, samples, text, marker = encoding.Columns([], [], [], []), [], [], False, ""
    dtype = np.uint16 if tokenizer.size <= 2**16 else np.uint32
    for chunk in encoding.chunks(iter(examples)):
        text = chunk[0].turns[0][0] == "text"
        tokens, mask, lengths, chunk = encoding.encode(chunk, tokenizer, template, counts, skip)
        if not chunk:
            continue
        arrays.append((tokens.astype(dtype), mask))
        columns.add(chunk, mask, lengths)
        marker = marker or encoding.count(chunk, tokenizer, counts)
        samples = samples if text else encoding.least(samples, chunk, lengths)
    if not arrays:
        return None
    tokens, mask = (np.concatenate(parts) for parts in zip(*arrays, strict=True))
    made = columns.arrays()
    of_each = {name: np.ascontiguousarray(made["examples"][name]) for name in encoding.EXAMPLE.names}
    labels, said = made.get("labels"), made.get("answers")
    content = _hash([tokens, mask, of_each["length"], of_each["key"], *(x for x in (labels, said) if x is not None)])
    summary = _summary(counts, marker, bool(columns.judged))
    none = None if text else mask
    return Store(
        tokens, none, **of_each, samples=samples, labels=labels, fields={}, answers=said, counts=summary,
        was_cached=False, folder=None, content=content, template=template,
    )  # fmt: skip


def seen_in_memory(store: Store, view: views.View, where: str) -> Store | None:
    """What a view shows of a store that is in memory; None where nothing is left. `where`: the view's field."""
    seen = list(_seen(store, view, where))
    if not seen:
        return None
    owners, rows, arrays = zip(*seen, strict=True)
    joined = {name: np.concatenate([each[name] for each in arrays]) for name in arrays[0]}
    made = np.array(list(rows), encoding.EXAMPLE)
    text = store.mask is None and bool(joined["mask"].all())
    return dataclasses.replace(
        store,
        tokens=joined["tokens"],
        mask=None if text else joined["mask"],
        **{name: np.ascontiguousarray(made[name]) for name in encoding.EXAMPLE.names},
        labels=None if store.labels is None else store.labels[list(owners)],
        fields={name: joined[name] for name in view.fields},
        content=_hash([*joined.values(), made]),
        template="",
    )


def _hash(arrays: Iterable[np.ndarray]) -> str:
    result = hashlib.blake2b(digest_size=16)
    for array in arrays:
        result.update(np.ascontiguousarray(array).tobytes())
    return result.hexdigest()


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
    columns, samples, text, marker = encoding.Columns([], [], [], []), [], False, ""
    with contextlib.ExitStack() as stack:
        tokens_file = stack.enter_context(open(partial / "tokens.bin", "wb"))
        mask_file = stack.enter_context(open(partial / "mask.bin", "wb"))
        records_file = stack.enter_context(open(partial / "records.jsonl", "wb")) if keep_records else None
        for chunk in encoding.chunks(examples):
            progress.say(f"tokenising {name}: {counts['records']:,}{of} records")
            text = chunk[0].turns[0][0] == "text"
            tokens, mask, lengths, chunk = encoding.encode(chunk, tokenizer, template, counts, skip)
            if not chunk:
                continue
            tokens_file.write(tokens.astype(dtype).tobytes())
            columns.add(chunk, mask, lengths)
            if records_file is not None:
                columns.ends.extend(_write_records(records_file, chunk))
            first = encoding.count(chunk, tokenizer, counts)
            marker = marker or first
            if not text:
                mask_file.write(mask.tobytes())
                samples = encoding.least(samples, chunk, lengths)
    if not columns.rows:
        return False
    for kind, values in columns.arrays().items():
        np.save(partial / f"{kind}.npy", values)
    summary = _summary(counts, marker, bool(columns.judged))
    meta = {"dtype": dtype, "text": text, "samples": samples, "counts": summary, "content": _content(partial)}
    meta |= {"template": template, "of": name}
    (partial / "meta.json").write_text(json.dumps(meta, default=str))
    return True


def _summary(counts: Counter[str], marker: str, judged: bool) -> dict[str, Any]:
    """What a store says of its records: Store.counts."""
    bad = {name.removeprefix("bad: "): n for name, n in counts.items() if name.startswith("bad: ")}
    summary = {"records": counts["records"], "duplicates": counts["duplicates"], "bad": bad}
    summary |= {"markers": counts["markers"], "marker": marker, "weights": counts["weights"]}
    if judged:
        summary |= {name: counts[name] for name in ("comparisons", "identical", "ties")}
    return summary


def _write_records(file: BinaryIO, chunk: list[Example]) -> Iterator[int]:
    """Writes the record of each document of the examples; yields where each ends. Those of one example are the same."""
    for example in chunk:
        for _ in example.documents:
            file.write(json.dumps(example.record, default=str).encode())
            yield file.tell()
