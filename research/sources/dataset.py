"""From what a config says of its data to batches: find, tokenise, split, pack, order."""

import dataclasses
import functools
import itertools
import json
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from research.errors import InputError
from research.sources import answers, fields, mixture, rows, selected
from research.sources import spec as spec_lib
from research.sources.cache import digest
from research.sources.entries import Origin, locate
from research.sources.rows import Part, Rows
from research.sources.spec import DataSpec, Entry
from research.sources.store import READING, SAMPLES, Example, Store, open_store, open_view, read_examples
from research.sources.tokenizers import Tokenizer, TokenizerSpec, make_tokenizer
from research.sources.types import Source, State

_TOKENIZER_CHARS = 100_000_000  # a trained tokenizer sees at most so much text, shared among the sources
_KEYS = 2**64
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
)


@dataclasses.dataclass(frozen=True, eq=False)
class Data:
    """A run's data, ready to be batched.

    Attributes:
      tokenizer: the one that made the tokens.
      source_names: of the sources, in order; where data.sources names two or more, a batch's `source` counts them.
      train: (rows, weight) of each part of a weighted mixture; one part, of weight 1, where there are no
        weights.
      held_out: rows for evaluation; none where eval_fraction is 0 and there is no eval_path.
      held_out_records: at most 256 held-out records with prompts (prompt, response or messages, and whatever
        else they held), one a prompt, in random order: for evaluations that generate.
      held_out_templates: how each of them is put to a model: the template of its source.
      report: counts of all that was read, dropped, cut and packed.
    """

    tokenizer: Tokenizer
    source_names: tuple[str, ...]
    train: list[tuple[Rows, float]]
    held_out: Rows
    held_out_records: list[dict[str, Any]]
    held_out_templates: list[str]
    report: dict[str, Any]


class _Input(NamedTuple):
    """An entry of the data, with what was read of it; `plain` where that are texts, of which all is learned."""

    entry: Entry
    origin: Origin
    store: Store
    teacher: Store | None
    plain: bool


def load(
    spec: DataSpec,
    tokenizer_spec: TokenizerSpec,
    tokenizer: Tokenizer | None = None,
    seed: int = 0,
    teacher: Tokenizer | None = None,
    virtual: range = range(0),
) -> Data:
    """Reads, tokenises, splits and packs what `spec` names.

    Args:
      spec: the data.
      tokenizer_spec: the tokenizer to make; not looked at where one is given.
      tokenizer: one made before, so that ids stay those of a checkpoint.
      seed: of generated records, and of which examples share a row.
      teacher: another tokenizer; batches then hold the same documents in its tokens too (parallel.fields).
      virtual: ids of the tokens that stand in front of every document, or piece of one; they count in data.seq_len.

    Raises:
      InputError: an option, an entry or a record is at fault, or nothing is left to train on.
    """
    spec_lib.check(spec)
    if spec.mismatches and (spec.annotations or teacher):
        what = "data.annotations" if spec.annotations else "a teacher with another tokenizer"
        raise InputError(
            f"{what}: says nothing of answers behind other prompts, which the objective reads (the batch field "
            "'mismatched'). Leave it out, or use a live model with the policy's tokenizer."
        )
    entries, weights = spec_lib.entries(spec)
    spec = dataclasses.replace(spec, in_order=selected.is_curriculum(entries, spec))
    train_on, eval_on = _located(spec, seed)
    if tokenizer is None:
        tokenizer = with_special_tokens(_make_tokenizer(tokenizer_spec, train_on, eval_on, spec), tokenizer_spec, spec)
    room = spec.seq_len - len(virtual)
    short = dataclasses.replace(spec, seq_len=room)
    inputs = _same_classes([_open(*each, short, tokenizer, teacher) for each in (*train_on, *eval_on)], spec)
    inputs = _with_prefixes(inputs)
    train_inputs, eval_inputs = inputs[: len(entries)], inputs[len(entries) :]

    to_train, to_eval, limit = _split(train_inputs, eval_inputs, spec.eval_fraction)
    parts = _parts(train_inputs, to_train)
    rng = np.random.default_rng(seed) if spec.shuffle else None
    groups = [parts] if weights is None else [[part] for part in parts]
    placed = [rows.lay_out(group, spec, rng, virtual) for group in groups]
    counts = [count for _, counts in placed for count in counts]
    sums = [sum(counts, Counter()) for _, counts in placed]
    _check_left(sums, [len(each) for each, _ in placed], entries, spec, len(virtual))
    if weights is not None and spec.weights == "tokens":  # a row of each part has so many tokens on average
        filled = [count["tokens"] / len(each) for count, (each, _) in zip(sums, placed, strict=True)]
        weights = [weight / tokens for weight, tokens in zip(weights, filled, strict=True)]
    held_out, eval_counts = rows.lay_out(_parts(eval_inputs or train_inputs, to_eval), spec, None, virtual)
    finish = functools.partial(_finish, inputs=inputs, spec=short, tokenizer=tokenizer, teacher=teacher, seed=seed)
    train = list(zip([finish(each) for each, _ in placed], weights or [1.0], strict=True))
    report = {
        "tokenizer_size": tokenizer.size,
        "sources": _report_sources(inputs, train, counts, eval_counts),
        "train": rows.report(counts, sum(len(each) for each, _ in train), parts, spec),
        "held_out": rows.report(eval_counts, len(held_out), _parts(eval_inputs or train_inputs, to_eval), spec),
    }
    if eval_inputs:
        report["train"]["dropped_as_in_eval_path"] = sum(int(np.sum(~mask)) for mask in to_train)
    samples = _samples(eval_inputs or train_inputs, limit, room)
    return Data(
        tokenizer=tokenizer,
        source_names=spec_lib.names(spec),
        train=train,
        held_out=finish(held_out),
        held_out_records=[record for record, _ in samples],
        held_out_templates=[template for _, template in samples],
        report=report,
    )


def has_plain_texts(data: Data) -> bool:
    """Whether a model learns from texts alone, in which no prompt has the marks of a conversation around it."""
    return all(source["plain"] for source in data.report["sources"])


def build_tokenizer(spec: DataSpec, tokenizer_spec: TokenizerSpec, seed: int = 0) -> Tokenizer:
    """The tokenizer that `load` makes where it is handed none, before special tokens are added. A BPE learns from the
    texts to train on.

    Args and errors: see `load`.
    """
    spec_lib.check(spec)
    return _make_tokenizer(tokenizer_spec, *_located(spec, seed), spec)


def with_special_tokens(tokenizer: Tokenizer, tokenizer_spec: TokenizerSpec, spec: DataSpec) -> Tokenizer:
    """A tokenizer that has the special tokens that are asked for and those that the views of `spec` need, and notes of
    the views what is to be known of them wherever the model is used."""
    tokenizer = tokenizer.with_tokens(tokenizer_spec.added_tokens)
    tokenizer = tokenizer.with_tokens(spec_lib.needed_tokens(spec, tokenizer))
    tokenizer = tokenizer.with_variables(spec_lib.noted_tokens(spec, tokenizer))
    return tokenizer.with_infilling(spec_lib.infilling_note(spec, tokenizer))


def _located(spec: DataSpec, seed: int) -> tuple[list[tuple[Entry, Origin]], list[tuple[Entry, Origin]]]:
    """The entries to train on and those to evaluate, each with where it lies."""
    train_on = [(entry, _locate(entry, seed, spec, entry.options.select)) for entry in spec_lib.entries(spec)[0]]
    return train_on, [(entry, _locate(entry, seed + 1, spec)) for entry in spec_lib.eval_entries(spec)]


def settings(spec: DataSpec, tokenizer: Tokenizer, seed: int, virtual: int = 0) -> dict[str, Any]:
    """What decides the tokens of a run, and where documents are cut: `virtual` tokens in front of each leave them so
    much less of data.seq_len. Not how they are packed and ordered."""
    values = dataclasses.asdict(spec)
    unset = [name for name in ("sources", "select") if not values[name]]
    skipped = ("seq_len", *_OF_ROWS, *unset)
    of_data = {f"data.{name}": value for name, value in values.items() if name not in skipped}
    known = {"tokenizer": f"{tokenizer.fingerprint()} ({tokenizer.size} tokens)", "seq_len": spec.seq_len - virtual}
    return known | of_data | {"seed": seed}


def make_source(
    train: Sequence[tuple[Rows, float]],
    *,
    batch_size: int,
    seed: int,
    shuffle: bool = True,
    mine: Sequence[int] | None = None,
) -> Source:
    """Returns a source of endless batches. Its state counts the rows that were drawn: a batch depends on (seed, rows)
    alone, so that a run that goes on with batches of another size misses no row, and repeats none.

    Args:
      train: (rows, weight) parts, as Data.train: rows are drawn in proportion to the weights, those of each
        part in a new order each epoch.
      batch_size: B of the global batch.
      seed: of the order.
      shuffle: else each part keeps its own order.
      mine: numbers of the rows of the global batch that batches hold, for one process of several; by default all.
    """
    numbers = range(batch_size) if mine is None else mine
    spec = train[0][0].spec(batch_size)
    sizes = fields.sizes(spec)

    parts = [len(each) for each, _ in train], [weight for _, weight in train]
    order = mixture.row_order(*parts, seed if shuffle else None)

    def init() -> State:
        return {"row": 0}

    def next_batch(state: State) -> tuple[dict[str, np.ndarray], State]:
        first = state["row"]
        drawn = np.array([order(first + int(i)) for i in numbers])
        part, row = drawn[:, 0], drawn[:, 1]
        batch = fields.empty(spec, len(drawn), sizes)
        for k in np.unique(part):
            for name, value in train[k][0].batch(row[part == k]).items():
                batch[name][part == k] = value
        return batch, {"row": first + batch_size}

    return Source(spec, init, next_batch)


def eval_batches(
    held_out: Rows,
    batch_size: int,
    max_batches: int | None = None,
    *,
    mine: Sequence[int] | None = None,
) -> Iterator[dict[str, np.ndarray]]:
    """Yields batches that hold every row once; padding rows fill up the last. `mine`: see `make_source`.

    Where `max_batches` leaves some out, the rows taken lie evenly over all of them.
    """
    count = len(held_out) if max_batches is None else min(len(held_out), max_batches * batch_size)
    index = np.arange(count) * len(held_out) // max(count, 1)
    index = np.concatenate([index, np.full(-count % batch_size, -1)])
    return (held_out.batch(each if mine is None else each[np.asarray(mine)]) for each in index.reshape(-1, batch_size))


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


def _locate(entry: Entry, seed: int, spec: DataSpec, select: str = "") -> Origin:
    try:
        origin = locate(entry.path, count=entry.options.examples, seed=seed)
    except InputError as e:
        raise InputError(f"{entry.field}: {e}{_comma(entry, spec)}") from e
    if select:
        field = entry.select_field(spec)
        origin = selected.of_origin(origin, selected.read(select, field), (field, entry.field))
    most = entry.options.max_records or None
    return origin._replace(identity=[origin.identity, most], read=lambda: itertools.islice(origin.read(), most))


def _open(entry: Entry, origin: Origin, spec: DataSpec, tokenizer: Tokenizer, teacher: Tokenizer | None) -> _Input:
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
    return _Input(entry, origin, store, other, plain)


def without_labels(name: str, value: Any) -> InputError:
    """What is said of a field of the data section that says something of labels, where there are none."""
    return InputError(
        f"data.{name} = {value!r}: has no effect, since the data has no labels. Leave it out, or set data.format to "
        "'labelled'."
    )


def _same_classes(inputs: list[_Input], spec: DataSpec) -> list[_Input]:
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


def _with_prefixes(inputs: list[_Input]) -> list[_Input]:
    """Where a view gives prefixes to one source, the prompts of the others are theirs: a batch has the field or not."""
    if not any("prefix" in each.store.fields for each in inputs):
        return inputs
    return [
        each
        if "prefix" in each.store.fields or each.store.mask is None
        else each._replace(store=_with_prompts(each.store))
        for each in inputs
    ]


def _with_prompts(store: Store) -> Store:
    """The store, with what stands before the first token to be predicted of each example as its prefix."""
    prefix = np.zeros(len(store.tokens), bool)
    ends = np.cumsum(store.length)
    for start, end in zip(ends - store.length, ends, strict=True):
        prefix[start : start + int(np.argmax(store.mask[start:end]))] = True
    return dataclasses.replace(store, fields={**store.fields, "prefix": prefix})


def _make_tokenizer(
    tokenizer_spec: TokenizerSpec,
    train_on: Sequence[tuple[Entry, Origin]],
    eval_on: Sequence[tuple[Entry, Origin]],
    spec: DataSpec,
) -> Tokenizer:
    # Of so few records that the split must force one out, this may let the tokenizer see that one.
    limit = 0 if eval_on else int(spec.eval_fraction * _KEYS)

    def examples(entry: Entry, origin: Origin) -> Iterator[Example]:
        options = entry.options
        return read_examples(
            origin, options.format, options.fields, options.on_bad_record, Counter(), entry.classes(spec)
        )

    def texts() -> Iterator[str]:
        held_out = {example.key for each in eval_on for example in examples(*each)}
        for each in train_on:
            room = _TOKENIZER_CHARS // len(train_on)
            for example in examples(*each):
                if example.key >= limit and example.key not in held_out:
                    yield from (turn.text for turn in example.turns)
                    room -= sum(len(turn.text) for turn in example.turns)
                if room <= 0:
                    break

    identity = [
        [
            origin.identity,
            entry.options.format,
            sorted(entry.options.fields.items()),
            entry.options.on_bad_record,
            *entry.classes(spec),
        ]
        for entry, origin in (*train_on, *eval_on)
    ]
    name = digest([json.dumps([identity, len(train_on), limit, READING])])
    return make_tokenizer(tokenizer_spec, texts, texts_id=name, cache_dir=spec.cache_dir)


def _split(
    inputs: Sequence[_Input], eval_inputs: Sequence[_Input], fraction: float
) -> tuple[list[np.ndarray], list[np.ndarray], int]:
    """Returns which examples of each input to train on, and which of each of `eval_inputs or inputs` to hold out, as
    lists of [E] bool; of the latter, all have keys below the number that comes third."""
    stores, eval_stores = [each.store for each in inputs], [each.store for each in eval_inputs]
    if eval_stores:
        eval_keys = np.concatenate([store.key for store in eval_stores])
        to_train = [~np.isin(store.key, eval_keys) for store in stores]
        to_eval = [np.ones(len(store.key), bool) for store in eval_stores]
        return to_train, to_eval, _KEYS
    limit = _held_out_below(np.concatenate([store.key for store in stores]), fraction)
    to_eval = [store.key < np.uint64(limit) for store in stores]
    return [~mask for mask in to_eval], to_eval, limit


def _held_out_below(keys: np.ndarray, fraction: float) -> int:
    """The records with keys below this are held out: equal ones together, and one at least on either side."""
    least, greatest = int(keys.min()), int(keys.max())
    if fraction == 0 or least == greatest:
        return 0
    return min(max(int(fraction * _KEYS), least + 1), greatest)


def _parts(inputs: Sequence[_Input], examples: Sequence[np.ndarray]) -> list[Part]:
    return [Part(each.store, mask, each.teacher) for each, mask in zip(inputs, examples, strict=True)]


def _finish(
    each: Rows, *, inputs: Sequence[_Input], spec: DataSpec, tokenizer: Tokenizer, teacher: Tokenizer | None, seed: int
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


def _field(spec: DataSpec) -> str:
    return "data.sources" if spec.sources else "data.path"


def _check_left(
    counts: Sequence[Counter[str]], sizes: Sequence[int], entries: Sequence[Entry], spec: DataSpec, virtual: int
) -> None:
    """Raises InputError where a part of the mixture has no row; the message says what became of its records."""
    names = [entry.name for entry in entries] if len(sizes) > 1 else [", ".join(spec.sources) or spec.path]
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


def _report_sources(
    inputs: Sequence[_Input],
    train: Sequence[tuple[Rows, float]],
    counts: Sequence[Counter[str]],
    eval_counts: Sequence[Counter[str]],
) -> list[dict[str, Any]]:
    """What was read of each source, and "examples", "tokens" and "supervised_tokens" to train on, "share" of the tokens
    that training draws, "row_share" of the rows (None where they are shared), "passes", how many times it is read whole
    for each row that is drawn, and "held_out_examples"; of what is only evaluated, "held_out_examples" alone."""
    report = [
        {
            "name": each.entry.name,
            "files": each.origin.summary,
            **each.store.counts,
            "was_cached": each.store.was_cached,
            "content": each.store.content,
            "plain": each.plain,
        }
        for each in inputs
    ]
    per_row = [count["tokens"] * weight / len(each) for count, (each, weight) in zip(counts, train, strict=False)]
    drawn = per_row if len(train) > 1 else [count["tokens"] for count in counts]
    total, several = sum(weight for _, weight in train), len(train) > 1
    for i, (source, count, tokens) in enumerate(zip(report, counts, drawn, strict=False)):
        names = ("examples", "tokens", "supervised_tokens")
        source |= {name: count[name] for name in names} | {"share": tokens / max(sum(drawn), 1e-9)}
        each, weight = train[i if several else 0]
        source |= {"row_share": weight / total if several else None}
        source |= {"passes": weight / total / max(len(each), 1)}
    for source, count in zip(report[len(counts) :] or report, eval_counts, strict=True):
        source["held_out_examples"] = count["examples"]
    return report


def _samples(inputs: Sequence[_Input], limit: int, seq_len: int) -> list[tuple[dict[str, Any], str]]:
    """Held-out records of keys below `limit`, one a prompt, with the templates of their sources."""
    one_a_prompt = {
        sample["key"]: (sample["record"], each.entry.options.template)
        for each in inputs
        for sample in each.store.samples
        if sample["key"] < limit and sample["length"] <= seq_len
    }
    return [one_a_prompt[key] for key in sorted(one_a_prompt)[:SAMPLES]]
