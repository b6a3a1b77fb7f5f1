"""The entries of a run's data, found and opened: what loading has in common, kept in the cache or streamed."""

import dataclasses
import itertools
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from research.errors import InputError
from research.sources import answers, rows, selected, streaming
from research.sources import spec as spec_lib
from research.sources.encoding import SAMPLES
from research.sources.entries import Origin, locate
from research.sources.rows import Part, Rows
from research.sources.spec import DataSpec, Entry
from research.sources.store import Store, open_store, open_view
from research.sources.tokenizers import Tokenizer

_OF_ROWS = (
    "weights",
    "pack",
    "shuffle",
    "in_order",
    "mismatches",
    "keep_records",
    "eval_fraction",
    "annotations",
    "cache_dir",
    "streaming",
    "buffer",
    "eval_records",
)


class Input(NamedTuple):
    """An entry of the data, with what was read of it; `plain` where that are texts, of which all is learned."""

    entry: Entry
    origin: Origin
    store: Store
    teacher: Store | None
    plain: bool

    def report(self) -> dict[str, Any]:
        """What was read of it."""
        return {
            "name": self.entry.name,
            "files": self.origin.summary,
            **self.store.counts,
            "was_cached": self.store.was_cached,
            "content": self.store.content,
            "plain": self.plain,
        }


def _comma(entry: Entry, spec: DataSpec) -> str:
    """Says how to write a path with a comma, where `entry` is a piece of one that is there."""
    if spec.sources or "," not in (whole := spec.eval_path if entry.field == "data.eval_path" else spec.path):
        return ""
    pieces = whole.split(",")
    for first, last in itertools.combinations(range(len(pieces)), 2):
        path = ",".join(pieces[first : last + 1]).strip()
        if entry.path in path and Path(path).expanduser().exists():
            option = "eval_path" if entry.field == "data.eval_path" else "path"
            return (
                f" A comma parts entries, and {path!r} is there: name it in data.sources, as in "
                f"data.sources={{'NAME': {{{option!r}: {path!r}}}}}, and leave {entry.field} empty."
            )
    return ""


def located(spec: DataSpec, seed: int) -> tuple[list[tuple[Entry, Origin]], list[tuple[Entry, Origin]]]:
    """The entries to train on and those to evaluate, each with where it lies."""
    train_on = [(entry, _locate(entry, seed, spec, entry.options.select)) for entry in spec_lib.entries(spec)[0]]
    if spec.eval_records:
        return train_on, [(entry, _first(origin, spec.eval_records)) for entry, origin in train_on]
    return train_on, [(entry, _locate(entry, seed + 1, spec)) for entry in spec_lib.eval_entries(spec)]


def _first(origin: Origin, count: int) -> Origin:
    """The first records of an origin."""
    read = lambda: itertools.islice(origin.read(), count)  # noqa: E731
    return origin._replace(identity=[origin.identity, count], read=read)


def _locate(entry: Entry, seed: int, spec: DataSpec, select: str = "") -> Origin:
    try:
        training = spec.streaming and not entry.field.endswith("eval_path")
        origin = locate(entry.path, count=entry.options.examples, seed=seed, streaming=training)
        if training and origin.stream is None:
            kind = "is generated" if origin.generated else "is read as a whole"
            raise InputError(
                f"{entry.path!r}: {kind}, and can't be streamed. Write its records into a .jsonl, or set "
                "data.streaming to False."
            )
    except InputError as e:
        raise InputError(f"{entry.field}: {e}{_comma(entry, spec)}") from e
    if select:
        field = entry.select_field(spec)
        origin = selected.of_origin(origin, selected.read(select, field), (field, entry.field))
    most = entry.options.max_records or None
    return origin._replace(identity=[origin.identity, most], read=lambda: itertools.islice(origin.read(), most))


def open_input(entry: Entry, origin: Origin, spec: DataSpec, tokenizer: Tokenizer, teacher: Tokenizer | None) -> Input:
    check_view(entry, spec, teacher)
    options = entry.options

    def tokens(tokenizer: Tokenizer) -> Store:
        return open_store(
            origin,
            tokenizer,
            format=options.format,
            fields=options.fields,
            template=options.template,
            on_bad_record=options.on_bad_record,
            classes=entry.classes(spec),
            cache_dir=spec.cache_dir,
            keep_records=spec.keep_records,
        )

    store, other = tokens(tokenizer), None if teacher is None else tokens(teacher)
    if other is not None and not np.array_equal(store.key, other.key):
        raise InputError(
            f"{entry.field}: {entry.name!r} has records that the chat template of the policy or that of the teacher "
            "refuses, and not the other, so that they read different records. Drop these, or name another template."
        )
    plain = store.mask is None and store.labels is None and store.answers is None
    if options.view:
        store = open_view(store, options.view, f"data.sources.{entry.name}.view", spec.seq_len, tokenizer)
    return Input(entry, origin, store, other, plain)


def check_view(entry: Entry, spec: DataSpec, teacher: Tokenizer | None) -> None:
    """Raises InputError where an entry has a view, and something else doesn't go with one."""
    options = entry.options
    if options.view and teacher is not None:
        raise InputError(
            f"data.sources.{entry.name}.view: a teacher reads the same documents in its own tokens, and a view is of "
            "the policy's. Take the view out, or use a teacher with the policy's tokenizer."
        )
    if options.view and spec.keep_records:
        raise InputError(
            f"data.sources.{entry.name}.view: shows other documents than the records that rewards judge by. Take the "
            "view out."
        )


def without_labels(name: str, value: Any) -> InputError:
    """What is said of a field of the data section that says something of labels, where there are none."""
    return InputError(
        f"data.{name} = {value!r}: has no effect, since the data has no labels. Leave it out, or set data.format to "
        "'labelled'."
    )


def same_classes(inputs: list[Input], spec: DataSpec) -> list[Input]:
    """The inputs with labels over the same number of classes."""
    labelled = [each.store.labels is not None for each in inputs]
    if not any(labelled):
        if spec.labels:
            raise without_labels("labels", spec.labels)
        return inputs
    if not all(labelled):
        raise InputError(
            f"{_field(spec)}: some entries have labels, and others none. Train on them in runs of their own."
        )
    seen = max(each.store.labels.shape[1] for each in inputs)
    C = spec.num_classes or max(seen, len(spec.labels))
    if seen > C:
        raise InputError(f"data.num_classes: {C} is fewer than the labels have, {seen}. Set it to 0 to follow them.")

    def padded(store: Store) -> Store:
        return dataclasses.replace(store, labels=np.pad(store.labels, ((0, 0), (0, C - store.labels.shape[1]))))

    return [each._replace(store=padded(each.store)) for each in inputs]


def with_prefixes(inputs: list[Input]) -> list[Input]:
    """Where a view gives prefixes to one source, the prompts of the others are theirs: a batch has the field or not."""
    if not any("prefix" in each.store.fields for each in inputs):
        return inputs
    return [each._replace(store=streaming.with_prompts(each.store)) for each in inputs]


def parts_of(inputs: Sequence[Input], examples: Sequence[np.ndarray]) -> list[Part]:
    return [Part(each.store, mask, each.teacher) for each, mask in zip(inputs, examples, strict=True)]


def finished(
    each: Rows, *, inputs: Sequence[Input], spec: DataSpec, tokenizer: Tokenizer, teacher: Tokenizer | None, seed: int
) -> Rows:
    """The rows with what else batches hold: which source, fields of views, a teacher's tokens or annotations."""
    extra = {name: values.shape[1:] for one in inputs for name, values in one.store.fields.items()}
    said = [answers.field_names(one.store.answers) for one in inputs if one.store.answers is not None]
    extra |= {name: () for names in said for name in names}
    if spec.mismatches and "desirable" in extra:
        extra |= {"mismatched": ()}
    numbers = {id(one.store): one.entry.number for one in inputs}
    each = dataclasses.replace(each, extra=extra)
    if len(spec.sources) > 1:
        each = dataclasses.replace(each, sources=tuple(numbers[id(store)] for store in each.stores))
    if teacher is not None:
        each = dataclasses.replace(each, token_sizes=(tokenizer.token_bytes(), teacher.token_bytes()))
    if spec.annotations:
        each = rows.annotated(each, spec.annotations, settings(spec, tokenizer, seed))
    return each


def settings(spec: DataSpec, tokenizer: Tokenizer, seed: int, virtual: int = 0) -> dict[str, Any]:
    """What decides the tokens of a run, and where documents are cut: `virtual` tokens in front of each leave them so
    much less of data.seq_len. Not how they are packed and ordered."""
    values = dataclasses.asdict(spec)
    unset = [name for name in ("sources", "select") if not values[name]]
    skipped = ("seq_len", *_OF_ROWS, *unset)
    of_data = {f"data.{name}": value for name, value in values.items() if name not in skipped}
    known = {"tokenizer": f"{tokenizer.fingerprint()} ({tokenizer.size} tokens)", "seq_len": spec.seq_len - virtual}
    return known | of_data | {"seed": seed}


def _field(spec: DataSpec) -> str:
    return "data.sources" if spec.sources else "data.path"


def check_left(
    counts: Sequence[Counter[str]], sizes: Sequence[int], names: Sequence[str], spec: DataSpec, virtual: int
) -> None:
    """Raises InputError where a part of the mixture has no row; the message says what became of its records."""
    room = f"data.seq_len={spec.seq_len}" + (f" less {virtual} virtual tokens" if virtual else "")
    for count, size, name in zip(counts, sizes, names, strict=True):
        faults = {
            f"{count['too_long']} longer than {room}": count["too_long"],
            f"{count['nothing_supervised']} cut before their answer": count["nothing_supervised"],
        }
        if size:
            continue
        dropped = ", ".join(text for text, n in faults.items() if n) or "all of it is held out or in data.eval_path"
        remedy = "give other data, or other data to evaluate on"
        if any(faults.values()):
            truncate = "" if spec.on_long == "truncate" or not count["too_long"] else "set data.on_long='truncate', "
            remedy = f"raise data.seq_len, {truncate}or give shorter records"
        raise InputError(f"{_field(spec)}: nothing of {name!r} is left to train on ({dropped}). {_capital(remedy)}.")


def _capital(text: str) -> str:
    return text[:1].upper() + text[1:]


def samples(inputs: Sequence[Input], limit: int, seq_len: int) -> list[tuple[dict[str, Any], str]]:
    """Held-out records of keys below `limit`, one a prompt, with the templates of their sources."""
    one_a_prompt = {
        sample["key"]: (sample["record"], each.entry.options.template)
        for each in inputs
        for sample in each.store.samples
        if sample["key"] < limit and sample["length"] <= seq_len
    }
    return [one_a_prompt[key] for key in sorted(one_a_prompt)[:SAMPLES]]
