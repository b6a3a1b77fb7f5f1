"""From what a config says of its data to batches: find, tokenise, split, pack, order."""

import dataclasses
import functools
import json
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from research.errors import InputError
from research.sources import fields, mixture, opening, rows, selected, streamed, streaming
from research.sources import spec as spec_lib
from research.sources.cache import digest
from research.sources.data import Data
from research.sources.entries import Origin
from research.sources.examples import Example, read_examples
from research.sources.rows import Rows
from research.sources.spec import DataSpec, Entry
from research.sources.store import READING
from research.sources.tokenizers import Tokenizer, TokenizerSpec, make_tokenizer
from research.sources.types import Source, State

_TOKENIZER_CHARS = 100_000_000  # a trained tokenizer sees at most so much text, shared among the sources
_KEYS = 2**64


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
    train_on, eval_on = opening.located(spec, seed)
    if tokenizer is None:
        tokenizer = with_special_tokens(_make_tokenizer(tokenizer_spec, train_on, eval_on, spec), tokenizer_spec, spec)
    room = spec.seq_len - len(virtual)
    short = dataclasses.replace(spec, seq_len=room)
    if spec.streaming:
        return streamed.load(train_on, eval_on, weights, spec, tokenizer, seed=seed, teacher=teacher, virtual=virtual)
    inputs = [opening.open_input(*each, short, tokenizer, teacher) for each in (*train_on, *eval_on)]
    inputs = opening.same_classes(inputs, spec)
    inputs = opening.with_prefixes(inputs)
    train_inputs, eval_inputs = inputs[: len(entries)], inputs[len(entries) :]

    to_train, to_eval, limit = _split(train_inputs, eval_inputs, spec.eval_fraction)
    parts = opening.parts_of(train_inputs, to_train)
    rng = np.random.default_rng(seed) if spec.shuffle else None
    groups = [parts] if weights is None else [[part] for part in parts]
    placed = [rows.lay_out(group, spec, rng, virtual) for group in groups]
    counts = [count for _, counts in placed for count in counts]
    sums = [sum(counts, Counter()) for _, counts in placed]
    names = [entry.name for entry in entries] if len(placed) > 1 else [", ".join(spec.sources) or spec.path]
    opening.check_left(sums, [len(each) for each, _ in placed], names, spec, len(virtual))
    if weights is not None and spec.weights == "tokens":  # a row of each part has so many tokens on average
        filled = [count["tokens"] / len(each) for count, (each, _) in zip(sums, placed, strict=True)]
        weights = [weight / tokens for weight, tokens in zip(weights, filled, strict=True)]
    eval_parts = opening.parts_of(eval_inputs or train_inputs, to_eval)
    held_out, eval_counts = rows.lay_out(eval_parts, spec, None, virtual)
    finish = functools.partial(
        opening.finished, inputs=inputs, spec=short, tokenizer=tokenizer, teacher=teacher, seed=seed
    )
    train = list(zip([finish(each) for each, _ in placed], weights or [1.0], strict=True))
    report = {
        "tokenizer_size": tokenizer.size,
        "sources": _report_sources(inputs, train, counts, eval_counts),
        "train": rows.report(counts, sum(len(each) for each, _ in train), parts, spec),
        "held_out": rows.report(eval_counts, len(held_out), eval_parts, spec),
    }
    if eval_inputs:
        report["train"]["dropped_as_in_eval_path"] = sum(int(np.sum(~mask)) for mask in to_train)
    samples = opening.samples(eval_inputs or train_inputs, limit, room)
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
    return _make_tokenizer(tokenizer_spec, *opening.located(spec, seed), spec)


def with_special_tokens(tokenizer: Tokenizer, tokenizer_spec: TokenizerSpec, spec: DataSpec) -> Tokenizer:
    """A tokenizer that has the special tokens that are asked for and those that the views of `spec` need, and notes of
    the views what is to be known of them wherever the model is used."""
    tokenizer = tokenizer.with_tokens(tokenizer_spec.added_tokens)
    tokenizer = tokenizer.with_tokens(spec_lib.needed_tokens(spec, tokenizer))
    tokenizer = tokenizer.with_variables(spec_lib.noted_tokens(spec, tokenizer))
    return tokenizer.with_infilling(spec_lib.infilling_note(spec, tokenizer))


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


def source_of(
    data: Data, *, batch_size: int, seed: int, shuffle: bool = True, mine: Sequence[int] | None = None
) -> Source:
    """The source of a run's batches, of rows that lie in the cache or are streamed. Args: see `make_source`."""
    if not data.streams:
        return make_source(data.train, batch_size=batch_size, seed=seed, shuffle=shuffle, mine=mine)
    weights, spec = [weight for _, weight in data.train], data.train[0][0].spec(batch_size)
    return streaming.make_source(data.streams, weights, spec, batch_size=batch_size, mine=mine)


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
    inputs: Sequence[opening.Input], eval_inputs: Sequence[opening.Input], fraction: float
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


def _report_sources(
    inputs: Sequence[opening.Input],
    train: Sequence[tuple[Rows, float]],
    counts: Sequence[Counter[str]],
    eval_counts: Sequence[Counter[str]],
) -> list[dict[str, Any]]:
    """What was read of each source, and "examples", "tokens" and "supervised_tokens" to train on, "share" of the tokens
    that training draws, "row_share" of the rows (None where they are shared), "passes", how many times it is read whole
    for each row that is drawn, and "held_out_examples"; of what is only evaluated, "held_out_examples" alone."""
    report = [each.report() for each in inputs]
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
