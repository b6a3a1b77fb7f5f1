"""The data of a run that reads it while it trains: what is known of it before."""

import dataclasses
import itertools
from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np

from research import progress
from research.errors import InputError
from research.sources import examples, formats, opening, rows, store, streaming, views
from research.sources import spec as spec_lib
from research.sources.data import Data
from research.sources.entries import Origin
from research.sources.examples import Reading
from research.sources.opening import Input
from research.sources.rows import Part
from research.sources.spec import DataSpec, Entry
from research.sources.streaming import Block, Shape, Stream
from research.sources.tokenizers import Tokenizer

_LOOKED_AT = 10_000  # records, for the first that can be read
_KEYS = 2**64


def load(
    train_on: Sequence[tuple[Entry, Origin]],
    eval_on: Sequence[tuple[Entry, Origin]],
    weights: Sequence[float] | None,
    spec: DataSpec,
    tokenizer: Tokenizer,
    *,
    seed: int,
    teacher: Tokenizer | None,
    virtual: range,
) -> Data:
    """Opens the streams, and reads their first blocks and what is held out.

    Args:
      train_on, eval_on: entries, and where they lie.
      weights: of those to train on; None where they are read one after the other.
      spec, tokenizer, seed, teacher, virtual: see dataset.load.

    Raises:
      InputError: see dataset.load.
    """
    if teacher is not None:
        raise InputError(
            "data.streaming = True: a teacher with another tokenizer reads the data from the cache. Set it to False, "
            "or use a teacher with the policy's tokenizer."
        )
    room = spec.seq_len - len(virtual)
    short = dataclasses.replace(spec, seq_len=room)
    read = [_opened(*each, short, tokenizer) for each in train_on]
    if spec.eval_records:
        held = [_first_records(one, spec, tokenizer) for one in read]
    else:
        held = [opening.open_input(*each, short, tokenizer, None) for each in eval_on]
    keys = np.unique(np.concatenate([each.store.key for each in held] or [np.zeros(0, np.uint64)]))
    groups = [tuple(read)] if weights is None else [(one,) for one in read]
    streams = [Stream(group, spec, tokenizer, keys, virtual, (seed, part)) for part, group in enumerate(groups)]
    first = []
    for each in streams:
        progress.say(f"tokenising the first rows of {each.inputs[0].entry.name}")
        first.append(streaming.first_block(each))
    names = [", ".join(one.entry.name for one in group) for group in groups]
    opening.check_left([block.counts for block in first], [len(each.rows) for each in first], names, spec, len(virtual))
    held, shape = _shaped(first, held, spec)
    streams = [dataclasses.replace(each, shape=shape) for each in streams]
    train = [each.finished(block.rows, each.inputs[0]) for each, block in zip(streams, first, strict=True)]
    held_parts = [Part(each.store, np.ones(len(each.store.key), bool)) for each in held]
    numbers = [one.entry.number for one in held]
    if not held:  # rows of the same fields, of which there are none
        held_parts = [Part(each, np.zeros(len(each.key), bool)) for each in first[0].rows.stores]
        numbers = [0] * len(held_parts)
    held_out, held_counts = rows.lay_out(held_parts, spec, None, virtual)
    held_out = dataclasses.replace(held_out, extra=shape.extra, sources=tuple(numbers) if shape.by_source else ())
    parts = [Part(each, np.ones(len(each.key), bool)) for block in first for each in block.stores]
    of_held = [
        one.report() | {"held_out_examples": count["examples"]} for one, count in zip(held, held_counts, strict=False)
    ]
    report = {
        "tokenizer_size": tokenizer.size,
        "sources": _report_streams(groups, first, weights or [1.0]) + of_held,
        "train": rows.report([block.counts for block in first], sum(map(len, train)), parts, spec) | {"streamed": True},
        "held_out": rows.report(held_counts, len(held_out), held_parts if held else [], spec),
    }
    samples = opening.samples(held, _KEYS, room)
    return Data(
        tokenizer=tokenizer,
        source_names=spec_lib.names(spec),
        train=list(zip(train, weights or [1.0], strict=True)),
        held_out=held_out,
        held_out_records=[record for record, _ in samples],
        held_out_templates=[template for _, template in samples],
        report=report,
        streams=tuple(streams),
    )


def _opened(entry: Entry, origin: Origin, spec: DataSpec, tokenizer: Tokenizer) -> streaming.Input:
    """An entry whose format and template are known."""
    options = entry.options
    how = Reading(options.format, options.fields, options.on_bad_record, entry.classes(spec))
    counts: Counter[str] = Counter()
    for _, where, raw in itertools.islice(origin.stream([]), _LOOKED_AT):
        found, how = examples.of_record(where, raw, how, counts)
        if found:
            break
    else:
        raise examples.none_usable(origin.name, counts)
    view = None
    if options.view:
        opening.check_view(entry, spec, None)
        view = views.load(options.view, f"data.sources.{entry.name}.view", spec.seq_len, tokenizer)
        if found[0].comparison is not None:
            raise store.view_of_answers(f"data.sources.{entry.name}.view")
    template = formats.resolve_template(options.template, tokenizer)
    return streaming.Input(entry, origin, how, template, view)


def _first_records(one: streaming.Input, spec: DataSpec, tokenizer: Tokenizer) -> Input:
    """The first records of an entry, to be held out."""
    counts: Counter[str] = Counter()
    found = list(streaming.first_records(one, spec.eval_records, counts))
    made = store.in_memory(found, tokenizer, one.template, counts, one.how.on_bad_record == "skip")
    if made is None:
        raise InputError(
            f"data.eval_records = {spec.eval_records}: none of the first records of {one.entry.name!r} can be used. "
            "Raise it, or name data.eval_path."
        )
    plain = _is_plain(made)
    if one.view is not None:
        made = store.seen_in_memory(made, one.view, f"data.sources.{one.entry.name}.view") or made
    return Input(one.entry, one.origin, made, None, plain)


def _is_plain(made: store.Store) -> bool:
    return made.mask is None and made.labels is None and made.answers is None


def _shaped(first: Sequence[Block], held: list[Input], spec: DataSpec) -> tuple[list[Input], Shape]:
    """What all batches have, by the first blocks and what is held out; and this as they have it."""
    stores = [each for block in first for each in block.stores]
    labelled = {each.labels is not None for each in [*stores, *(one.store for one in held)]}
    if len(labelled) > 1:
        raise InputError("data: some entries have labels, and others none. Train on them in runs of their own.")
    classes = (spec.num_classes or len(spec.labels)) if True in labelled else 0
    extra = {name: shape for block in first for name, shape in streaming.fields_of(block.rows).items()}
    prompts = "prefix" in extra
    if prompts:
        held = [one._replace(store=streaming.with_prompts(one.store)) for one in held]
    if classes:
        held = [one._replace(store=_padded(one, classes)) for one in held]
    return held, Shape(extra, classes, len(spec.sources) > 1, prompts)


def _padded(one: Input, classes: int) -> store.Store:
    seen = one.store.labels.shape[1]
    if seen > classes:
        raise InputError(f"data.num_classes: {classes} is fewer than the labels of {one.entry.name!r} have, {seen}.")
    return dataclasses.replace(one.store, labels=np.pad(one.store.labels, ((0, 0), (0, classes - seen))))


def _report_streams(
    groups: Sequence[tuple[streaming.Input, ...]], first: Sequence[Block], weights: Sequence[float]
) -> list[dict[str, Any]]:
    """What was read of each entry so far: see dataset's report of sources. What isn't known is None. Of entries that
    are read one after the other, the first has been looked at alone."""
    per_row = [block.counts["tokens"] * w / len(block.order) for block, w in zip(first, weights, strict=True)]
    shares = [each / sum(per_row) for each in per_row]
    report = []
    for group, block, share, weight in zip(groups, first, shares, weights, strict=True):
        for i, one in enumerate(group):
            read = block if i == 0 else None
            report.append(
                {
                    "name": one.entry.name,
                    "files": one.origin.summary,
                    **_counts(read),
                    "was_cached": False,
                    "streamed": True,
                    "content": "" if read is None else read.content,
                    "plain": all(map(_is_plain, block.stores)) and one.view is None,
                    "examples": None,
                    "tokens": None,
                    "supervised_tokens": None,
                    "learned": None if read is None else read.counts["supervised_tokens"] / read.counts["tokens"],
                    "share": share if len(group) == 1 else None,
                    "row_share": weight / sum(weights) if len(groups) > 1 else None,
                    "passes": None,
                    "held_out_examples": 0,
                }
            )
    return report


def _counts(block: Block | None) -> dict[str, Any]:
    """What is said of the records of a first block, in the fields of Store.counts."""
    if block is None:
        return {"records": 0, "duplicates": 0, "bad": {}, "markers": 0, "marker": "", "weights": 0}
    bad = {name.removeprefix("bad: "): n for name, n in block.counts.items() if name.startswith("bad: ")}
    spelled = next((each.counts["marker"] for each in block.stores if each.counts["marker"]), "")
    names = ("records", "duplicates", "markers", "weights", "comparisons", "identical", "ties")
    return {name: block.counts[name] for name in names} | {"bad": bad, "marker": spelled}
