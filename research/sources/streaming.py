"""Rows that are made while a run trains on them, of data that is read block by block and kept nowhere.

A block is a stretch of an entry's records with about `data.buffer` rows: its documents are packed together, and its
rows come in an order by chance. It depends on where it begins and its number alone, so that a place in the data is a
few numbers for each part of a mixture, and a run that goes on reads the block that it was in again.
"""

import concurrent.futures
import dataclasses
import json
import threading
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from research.errors import InputError
from research.sources import answers, examples, fields, mixture, rows, store, views
from research.sources.cache import digest
from research.sources.entries import Origin
from research.sources.examples import Example, Reading
from research.sources.rows import Part, Rows
from research.sources.spec import DataSpec, Entry
from research.sources.store import Store
from research.sources.tokenizers import Tokenizer
from research.sources.types import Source, State

Cursor = dict[str, Any]  # where a block begins: "block", its number; "epoch", "entry", "at" and "records" before it
START: Cursor = {"block": 0, "epoch": 0, "entry": 0, "at": [], "records": 0}
_TOKENS_PER_CHAR, _LEAST_CHARS = 4.0, 256  # more than there are, so that the first look is a short one; read at once
_ENDLESS = 2**48  # rows
_FULL = 0.97  # of a buffer: what is missing isn't worth another read


class Input(NamedTuple):
    """An entry of the data that is read while a run trains.

    Attributes:
      entry: of the config.
      origin: with a `stream`.
      how: its records are read; the format is known.
      template: "model", "chat" or "plain".
      view: how its documents are seen; None as they are.
    """

    entry: Entry
    origin: Origin
    how: Reading
    template: str
    view: views.View | None


class Shape(NamedTuple):
    """What all batches of a run have.

    Attributes:
      extra: fields that views or answers give: name -> the sizes of their axes after "time".
      classes: C of the labels; 0 where there are none.
      by_source: batches say of which source a token is.
      prompts: prompts are prefixes, also of the sources whose view doesn't say so.
    """

    extra: Mapping[str, tuple[int, ...]] = {}
    classes: int = 0
    by_source: bool = False
    prompts: bool = False


class Block(NamedTuple):
    """Some rows of a stream.

    Attributes:
      rows: of it.
      order: [R] int64, in which they come.
      after: where the next block begins.
      counts: what was read: "records", bad ones by reason, and what became of the examples, as rows.lay_out counts it.
      stores: that the rows are of.
    """

    rows: Rows
    order: np.ndarray
    after: Cursor
    counts: Counter[str]
    stores: tuple[Store, ...]

    @property
    def content(self) -> str:
        """What tells it from a block of other data."""
        return digest([each.content for each in self.stores])


@dataclasses.dataclass(frozen=True, eq=False)
class Stream:
    """The endless rows of one part of a mixture.

    Attributes:
      inputs: read one after the other, then anew.
      spec: of the data.
      tokenizer: makes the tokens.
      held_out: [K] uint64, keys of the examples that aren't trained on.
      virtual: ids of the tokens in front of each document.
      seed: of the order.
      shape: of the batches; None while it isn't known.
    """

    inputs: tuple[Input, ...]
    spec: DataSpec
    tokenizer: Tokenizer
    held_out: np.ndarray
    virtual: range
    seed: Sequence[int]
    shape: Shape | None = None

    def block(self, cursor: Cursor) -> Block:
        """Reads and packs what begins there. It may have no row.

        Raises:
          InputError: a record is bad, or is none that the run's batches have room for; the message says where.
        """
        one, spec = self.inputs[cursor["entry"]], self.spec
        counts: Counter[str] = Counter()
        reading = _Records(one, cursor, counts)
        stores: list[Store] = []
        needed, per_char = 0.0, _TOKENS_PER_CHAR / spec.seq_len  # rows
        while needed < _FULL * spec.buffer and not reading.ended:
            found, chars = reading.take(max(_LEAST_CHARS, int((spec.buffer - needed) / per_char)))
            made = self._store(one, [each for each in found if not self._is_held_out(each)], counts)
            if made is not None:
                stores.append(made)
                needed += _rows_needed(made, spec, len(self.virtual))
                per_char = max(needed / max(chars, 1), per_char / 16)
        rng = np.random.default_rng([*self.seed, cursor["block"]]) if spec.shuffle else None
        laid, laid_counts = rows.lay_out([Part(e, np.ones(len(e.key), bool)) for e in stores], spec, rng, self.virtual)
        order = np.arange(len(laid)) if rng is None else rng.permutation(len(laid))
        counts = sum(laid_counts, counts)
        return Block(self.finished(laid, one), order, reading.after(len(self.inputs)), counts, tuple(stores))

    def finished(self, laid: Rows, one: Input) -> Rows:
        """Rows of an entry with what all batches of the run have."""
        shape, stores = self.shape, laid.stores
        if shape is None:
            return laid
        if shape.prompts:
            stores = tuple(with_prompts(each) for each in stores)
        labels = laid.labels
        if labels is not None and shape.classes:
            if labels.shape[1] > shape.classes:
                raise InputError(
                    f"data.num_classes: {shape.classes} is fewer than the labels of {one.entry.name!r} have, "
                    f"{labels.shape[1]}. Raise it."
                )
            labels = np.pad(labels, ((0, 0), (0, shape.classes - labels.shape[1])))
        new = [name for name in fields_of(laid) if name not in shape.extra]
        if new:
            raise InputError(
                f"{one.entry.field}: {one.entry.name!r} has {new[0]!r} in records far from its beginning, and none "
                "there. Give all records the same columns."
            )
        sources = (one.entry.number,) * len(stores) if shape.by_source else ()
        return dataclasses.replace(laid, stores=stores, labels=labels, extra=shape.extra, sources=sources)

    def _store(self, one: Input, found: list[Example], counts: Counter[str]) -> Store | None:
        skip = one.how.on_bad_record == "skip"
        made = store.in_memory(found, self.tokenizer, one.template, counts, skip) if found else None
        if made is None or one.view is None:
            return made
        return store.seen_in_memory(made, one.view, f"data.sources.{one.entry.name}.view")

    def _is_held_out(self, example: Example) -> bool:
        key = np.uint64(example.key)
        i = np.searchsorted(self.held_out, key)
        return bool(i < len(self.held_out) and self.held_out[i] == key)


class _Records:
    """The records of an entry from a place on, as many as are asked for.

    Args:
      one: the entry.
      cursor: the place.
      counts: takes up what is read.
    """

    def __init__(self, one: Input, cursor: Cursor, counts: Counter[str]):
        self._one, self._cursor, self._counts = one, cursor, counts
        self._stream = one.origin.stream(cursor["at"])
        self._at, self._records = cursor["at"], cursor["records"]
        self._chars = 0
        self.ended = False

    def take(self, chars: int) -> tuple[list[Example], int]:
        """The examples of the records that come next, of about so many characters; and how many were read so far."""
        found: list[Example] = []
        most, enough = self._one.entry.options.max_records, self._chars + chars
        while self._chars < enough:
            record = None if most and self._records >= most else next(self._stream, None)
            if record is None:
                self.ended = True
                break
            self._at, where, raw = record
            self._records += 1
            these, _ = examples.of_record(where, raw, self._one.how, self._counts)
            found += these
            self._chars += sum(len(turn.text) for e in these for turns in e.documents for turn in turns) or 1
        return found, self._chars

    def after(self, entries: int) -> Cursor:
        """Where the next block begins, of so many entries."""
        begun = {**self._cursor, "block": self._cursor["block"] + 1}
        if not self.ended:
            return begun | {"at": self._at, "records": self._records}
        last = self._cursor["entry"] + 1 == entries
        return begun | {
            "epoch": self._cursor["epoch"] + last,
            "entry": 0 if last else self._cursor["entry"] + 1,
            "at": [],
            "records": 0,
        }


def _rows_needed(made: Store, spec: DataSpec, virtual: int) -> float:
    """About how many rows the examples of a store take."""
    room = spec.seq_len - virtual
    long = made.length > room
    length = made.length if made.mask is None else np.where(long & (spec.on_long == "drop"), 0, made.length)
    if not spec.pack:
        return float(np.sum(-(-length // room)))
    pieces = -(-length // room)
    return float(np.sum(length + pieces * virtual)) / spec.seq_len


def fields_of(laid: Rows) -> dict[str, tuple[int, ...]]:
    """The further fields that the stores of some rows give, and what is said of answers."""
    extra = {name: values.shape[1:] for each in laid.stores for name, values in each.fields.items()}
    said = [each.answers for each in laid.stores if each.answers is not None]
    return extra | {name: () for each in said for name in answers.field_names(each)}


def with_prompts(made: Store) -> Store:
    """The store, with what stands before the first token to be predicted of each example as its prefix; as it is where
    it has prefixes, or no prompts."""
    if "prefix" in made.fields or made.mask is None:
        return made
    prefix = np.zeros(len(made.tokens), bool)
    ends = np.cumsum(made.length)
    for start, end in zip(ends - made.length, ends, strict=True):
        prefix[start : start + int(np.argmax(made.mask[start:end]))] = True
    return dataclasses.replace(made, fields={**made.fields, "prefix": prefix})


def first_block(stream: Stream) -> Block:
    """The first block of a stream that has rows; of a stream of which all was read, one that has none."""
    block = stream.block(START)
    while not len(block.order) and not block.after["epoch"]:
        block = stream.block(block.after)
    return block


def first_records(one: Input, count: int, counts: Counter[str]) -> Iterator[Example]:
    """The examples of an entry's first records, to be held out."""
    for number, (_, where, raw) in enumerate(one.origin.stream([])):
        if number == count:
            return
        yield from examples.of_record(where, raw, one.how, counts)[0]


class _Blocks:
    """The block that each part is in, and the next one, which is made in a thread meanwhile.

    Args:
      streams: the parts.
    """

    def __init__(self, streams: Sequence[Stream]):
        self._streams = streams
        self._made: list[dict[str, concurrent.futures.Future]] = [{} for _ in streams]
        self._pool = concurrent.futures.ThreadPoolExecutor(1, "tokenise")
        self._lock = threading.Lock()

    def find(self, part: int, cursor: Cursor) -> Block:
        """The block of a part that begins there. Raises what went wrong as it was made."""
        with self._lock:
            ahead = self._begun(part, cursor)
            block = ahead.result()
            self._made[part] = {_name(cursor): ahead, _name(block.after): self._begun(part, block.after)}
        return block

    def _begun(self, part: int, cursor: Cursor) -> concurrent.futures.Future:
        return self._made[part].get(_name(cursor)) or self._pool.submit(self._streams[part].block, cursor)


def _name(cursor: Cursor) -> str:
    return json.dumps(cursor, sort_keys=True)


def make_source(
    streams: Sequence[Stream],
    weights: Sequence[float],
    spec: fields.Spec,
    *,
    batch_size: int,
    mine: Sequence[int] | None = None,
) -> Source:
    """Returns a source of endless batches. Its state has how many rows were drawn, and of each part where the block
    begins that it is in: a batch depends on the data and the state alone.

    Args:
      streams: the parts.
      weights: rows of the parts are drawn in proportion to them.
      spec: of the batches.
      batch_size: B of the global batch.
      mine: numbers of the rows of the global batch that batches hold; by default all. Every process reads all of the
        data, and holds its own rows.
    """
    sizes, wanted = fields.sizes(spec), range(batch_size) if mine is None else mine
    blocks = _Blocks(streams)
    several = mixture.row_order([_ENDLESS] * len(streams), weights, None) if len(streams) > 1 else None
    place = (lambda n: (0, n)) if several is None else several

    def init() -> State:
        part = {"cursor": dict(START), "first": 0, "content": "", "records": 0, "skipped": 0}
        return {"row": 0, "parts": [dict(part) for _ in streams]}

    def next_batch(state: State) -> tuple[dict[str, np.ndarray], State]:
        parts = [dict(part) for part in state["parts"]]
        held = {number: i for i, number in enumerate(wanted)}
        batch = fields.empty(spec, len(held), sizes)
        drawn = [place(state["row"] + i) for i in range(batch_size)]
        for k, part in enumerate(parts):
            block = _checked(blocks, k, part, streams[k])
            own = [(i, n) for i, (p, n) in enumerate(drawn) if p == k]
            while own:
                here = [(i, n) for i, n in own if n < part["first"] + len(block.order)]
                mine_here = [(held[i], block.order[n - part["first"]]) for i, n in here if i in held]
                if mine_here:
                    at, numbers = np.array(mine_here).T
                    for name, value in block.rows.batch(numbers).items():
                        batch[name][at] = value
                own = own[len(here) :]
                if own:
                    block = _advance(blocks, k, part, block, streams[k])
        return batch, {"row": state["row"] + batch_size, "parts": parts}

    return Source(spec, init, next_batch)


def _checked(blocks: _Blocks, k: int, part: dict[str, Any], stream: Stream) -> Block:
    """The block that a part is in. Raises InputError where it isn't what it was."""
    block = blocks.find(k, part["cursor"])
    if part["content"] not in ("", block.content):
        one = stream.inputs[part["cursor"]["entry"]]
        raise InputError(
            f"{one.entry.field}: {one.entry.name!r} isn't what it was when the run's checkpoint was written, from its "
            f"record {part['cursor']['records'] + 1:,} on. Put it back, or start in a new --workdir, with "
            "model.init_from to take the parameters along."
        )
    part["content"] = block.content
    return block


def _advance(blocks: _Blocks, k: int, part: dict[str, Any], block: Block, stream: Stream) -> Block:
    """Goes on to a part's next block that has rows."""
    epoch = part["cursor"]["epoch"]
    while True:
        part["first"] += len(block.order)
        part["records"] += block.counts["records"]
        part["skipped"] += sum(n for name, n in block.counts.items() if name.startswith("bad: "))
        part["cursor"], part["content"] = block.after, ""
        block = blocks.find(k, part["cursor"])
        if len(block.order):
            part["content"] = block.content
            return block
        if part["cursor"]["epoch"] > epoch + 1:
            name = stream.inputs[0].entry.name
            raise InputError(f"data: a whole pass over {name!r} gives nothing to train on. Give other data.")


def passed(state: State) -> dict[str, float]:
    """What a log says of the place in streams: how often all parts were read whole, the records that were read before
    the blocks that the parts are in, and how many of them were skipped; {} of other sources."""
    if "parts" not in state:
        return {}
    parts = state["parts"]
    return {
        "passes": float(min(part["cursor"]["epoch"] for part in parts)),
        "records": float(sum(part["records"] for part in parts)),
        "records_skipped": float(sum(part["skipped"] for part in parts)),
    }
