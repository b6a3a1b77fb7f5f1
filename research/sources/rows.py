"""Rows of tokens: which stretches of which stores lie in them, and the batches that they give."""

import dataclasses
import functools
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from research.errors import InputError
from research.sources import annotations, answers, fields, packing, parallel
from research.sources.annotations import Annotations
from research.sources.spec import DataSpec
from research.sources.store import Store


@dataclasses.dataclass(frozen=True, eq=False)
class Rows:
    """Rows of `seq_len` tokens, each made of segments of the stores; only `batch` copies any.

    Attributes:
      stores: whose tokens, one after the other, are addressed by `start`.
      start: [S] int64, address of each segment's first token.
      length: [S] int64, tokens of each segment.
      splits: [R + 1] int64, row r has the segments splits[r] to splits[r + 1].
      seq_len: T.
      labels: [S, C] float32, the probability of each class; None where there are no labels.
      answers: [S] answers.DTYPE, what is said of answers to prompts; None where nothing is.
      annotations: what a teacher says of the tokens; None for none.
      teacher: the same rows in the tokens of a teacher's tokenizer; None where it reads these.
      token_sizes: with it, bytes of each token of either tokenizer.
      sources: the number of each store's source, for the batch field `source`; () where batches don't say it.
      extra: further fields that views or answers give to some of the stores: name -> the sizes of their axes after
        "time".
      virtual: ids of the tokens in front of each segment, which stand for no text (models.virtual).
    """

    stores: tuple[Store, ...]
    start: np.ndarray
    length: np.ndarray
    splits: np.ndarray
    seq_len: int
    labels: np.ndarray | None = None
    answers: np.ndarray | None = None
    annotations: Annotations | None = None
    teacher: "Rows | None" = None
    token_sizes: tuple[np.ndarray, np.ndarray] | None = None
    sources: tuple[int, ...] = ()
    extra: Mapping[str, tuple[int, ...]] = dataclasses.field(default_factory=dict)
    virtual: range = range(0)

    def __len__(self) -> int:
        return len(self.splits) - 1

    def spec(self, batch_size: int) -> fields.Spec:
        """Shapes and dtypes of a batch of so many rows."""
        return fields.spec(self._names, batch_size, self._sizes)

    def batch(self, rows: np.ndarray) -> dict[str, np.ndarray]:
        """Returns rows by number, [B] int64; number -1 is a row of padding alone.

        Returns:
          the fields of `spec`: name -> [B, ...]. Labels lie at the last token of each segment.
        """
        first = np.where(rows < 0, 0, self.splits[rows])
        count = np.where(rows < 0, 0, self.splits[rows + 1] - first)
        segment, row, nth = _ranges(first, count)
        ahead = len(self.virtual)
        length = self.length[segment] + ahead
        before = np.cumsum(length) - length
        in_row = before - before[(np.cumsum(count) - count)[row]]
        address, which, position = _ranges(self.start[segment] - ahead, length)
        place = (row * self.seq_len + in_row)[which] + position

        batch = fields.empty(self._names, len(rows), self._sizes)
        _put(batch, "segment_ids", place, nth[which] + 1)
        _put(batch, "positions", place, position)
        real, token_place = position >= ahead, place
        if self.answers is not None and "mismatched" in batch:
            said, start = self.answers[segment][which[real]], self.start[segment][which[real]]
            address[real] = answers.addresses(said, start, position[real] - ahead)
        virtual, position, address, place = place[~real], position[~real], address[real], place[real]
        for store, number, here, local in self._by_store(address):
            _put(batch, "tokens", place[here], store.tokens[local])
            _put(batch, "loss_mask", place[here], 1 if store.mask is None else store.mask[local])
            for name, values in store.fields.items():
                _put(batch, name, place[here], values[local])
            if self.sources:
                _put(batch, "source", place[here], self.sources[number])
        if ahead:
            self._put_virtual(batch, virtual, position)
        if self.answers is not None:
            for name, values in answers.field_values(self.answers[segment], row).items():
                if name in self.extra:
                    _put(batch, name, token_place, values[which])
            if "mismatched" in batch:
                self._move_mismatched(batch, token_place[(self.answers["tail"][segment] >= 0)[which]])
        if self.labels is not None:
            _put(batch, "label_probs", row * self.seq_len + in_row + length - 1, self.labels[segment])
        if self.annotations is not None:
            batch |= self.annotations.fields(address, place, batch["tokens"].shape)
        if self.teacher is not None:
            batch |= parallel.fields(batch, self.teacher.batch(rows), self.token_sizes)
        return batch

    def _move_mismatched(self, batch: Mapping[str, np.ndarray], place: np.ndarray) -> None:
        """Has the answers at these places, which are to other prompts, in the field of their own in place of the
        mask of what is learned."""
        _put(batch, "mismatched", place, batch["loss_mask"].reshape(-1)[place])
        _put(batch, "loss_mask", place, 0)

    def _put_virtual(self, batch: Mapping[str, np.ndarray], place: np.ndarray, position: np.ndarray) -> None:
        """Writes virtual tokens, which are of their document's source, and of its prefix where it begins with one."""
        _put(batch, "tokens", place, self.virtual.start + position)
        _put(batch, "virtual", place, 1)
        first = place - position + len(self.virtual)
        for name in ("source", "prefix"):
            if name in batch:
                _put(batch, name, place, batch[name].reshape(-1)[first])

    @functools.cached_property
    def _names(self) -> list[str]:
        groups = {
            "text": True,
            "labels": self.labels is not None,
            **({} if self.annotations is None else {self.annotations.group: True}),
            "parallel": self.teacher is not None,
            "source": bool(self.sources),
            "virtual": bool(self.virtual),
        }
        return [name for group, there in groups.items() if there for name in fields.group(group)] + list(self.extra)

    @functools.cached_property
    def _sizes(self) -> dict[str, int]:
        sizes = {"time": self.seq_len}
        if self.labels is not None:
            sizes["labels"] = self.labels.shape[1]
        if self.annotations is not None and self.annotations.k:
            sizes["candidates"] = self.annotations.k
        for name, shape in self.extra.items():
            sizes |= dict(zip(fields.find(name).axes[1:], shape, strict=True))
        return sizes

    def _by_store(self, address: np.ndarray) -> Iterator[tuple[Store, int, np.ndarray, np.ndarray]]:
        """Yields (store, its number, which of the addresses [N] lie in it, their places there)."""
        base = 0
        for number, store in enumerate(self.stores):
            end = base + len(store.tokens)
            here = np.flatnonzero((address >= base) & (address < end))
            yield store, number, here, address[here] - base
            base = end


def _put(batch: Mapping[str, np.ndarray], name: str, place: np.ndarray, values: np.ndarray | int) -> None:
    """Writes values to places of the flat batch [B * T, ...]."""
    array = batch[name]
    array.reshape(-1, *array.shape[2:])[place] = values


def _ranges(first: np.ndarray, count: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Each [sum(count)]: the numbers first[i], first[i] + 1, ... of all ranges i; i; the place in the range."""
    which = np.repeat(np.arange(len(count)), count)
    nth = np.arange(len(which)) - (np.cumsum(count) - count)[which]
    return first[which] + nth, which, nth


class Part(NamedTuple):
    """Examples that are to be laid into rows.

    Attributes:
      store: that has them.
      examples: [E] bool, which of the store's.
      teacher: the same store in a teacher's tokens; None where it reads these.
    """

    store: Store
    examples: np.ndarray
    teacher: Store | None = None


@dataclasses.dataclass(frozen=True, eq=False)
class Segments:
    """Documents, or pieces of them, that rows are to hold. All arrays are in one order.

    Attributes:
      start, length: [S] int64, first token (over all stores, one after the other) and number of tokens.
      labels: [S, C] float32; None where there are no labels.
      answers: [S] answers.DTYPE; None where nothing is said of answers.
      teacher: [S, 2] int64, start and length in a teacher's tokens; None where it reads these.
    """

    start: np.ndarray
    length: np.ndarray
    labels: np.ndarray | None = None
    answers: np.ndarray | None = None
    teacher: np.ndarray | None = None

    def __getitem__(self, index: np.ndarray) -> "Segments":
        values = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        return Segments(**{name: None if value is None else value[index] for name, value in values.items()})

    def shifted(self, base: int, teacher_base: int) -> "Segments":
        """The same segments, with addresses that count from before the stores of others."""
        teacher = None if self.teacher is None else self.teacher + np.array([teacher_base, 0])
        said = self.answers
        if said is not None:
            said = said.copy()
            said["tail"][said["tail"] >= 0] += base
        return dataclasses.replace(self, start=self.start + base, answers=said, teacher=teacher)

    def in_units(self) -> tuple[np.ndarray, np.ndarray]:
        """[U] int64: the first segment of each unit, and how many it has: what a row holds whole."""
        if self.answers is None:
            return np.arange(len(self.start)), np.ones(len(self.start), np.int64)
        first = answers.starts(self.answers["unit"])
        return first, np.diff(first, append=len(self.start))

    def longest(self, virtual: int = 0) -> np.ndarray:
        """[S] int64: how many tokens of a row each takes, with so many in front, in the tokens of which it has most."""
        length = self.length + virtual
        return length if self.teacher is None else np.maximum(length, self.teacher[:, 1])

    @staticmethod
    def join(parts: Sequence["Segments"]) -> "Segments":
        """The segments of all parts, one after the other. Where something is said of the answers of one, nothing is
        said of those of the others."""
        if any(part.answers is not None for part in parts):
            parts = _numbered(parts)
        columns = {field.name: [getattr(part, field.name) for part in parts] for field in dataclasses.fields(Segments)}
        joined = {name: [value for value in values if value is not None] for name, values in columns.items()}
        empty = {"start": np.zeros(0, np.int64), "length": np.zeros(0, np.int64)}
        return Segments(**{k: np.concatenate(values) if values else empty.get(k) for k, values in joined.items()})


def _numbered(parts: Sequence[Segments]) -> list[Segments]:
    """The parts, each with answers, whose units have numbers of their own."""
    result, base = [], 0
    for part in parts:
        said = answers.nothing(len(part.start)) if part.answers is None else part.answers.copy()
        said["unit"] += base
        base = said["unit"].max(initial=base - 1) + 1
        result.append(dataclasses.replace(part, answers=said))
    return result


def lay_out(
    parts: Sequence[Part], spec: DataSpec, rng: np.random.Generator | None, virtual: range = range(0)
) -> tuple[Rows, list[Counter[str]]]:
    """Lays examples into rows.

    Args:
      parts: the examples, by store.
      spec: says how long rows are, and what may share one.
      rng: puts segments in an order by chance; None keeps theirs.
      virtual: ids of the tokens to put in front of each segment, which then is so much shorter.

    Returns:
      the rows, without annotations, sizes of tokens and fields of views; and what became of the examples of each part.

    Raises:
      InputError: a text would be cut, and a teacher's tokens elsewhere.
    """
    segments, counts = [], []
    base = teacher_base = 0
    for part in parts:
        each, count = _segments(part, spec, len(virtual))
        segments.append(each.shifted(base, teacher_base))
        counts.append(count)
        base += len(part.store.tokens)
        teacher_base += len(part.teacher.tokens) if part.teacher else 0
    joined = Segments.join(segments)
    order, splits = _in_rows(joined, spec, rng, len(virtual))
    joined = joined[order]
    stores = tuple(part.store for part in parts)
    rows = Rows(stores, joined.start, joined.length, splits, spec.seq_len, virtual=virtual)
    rows = dataclasses.replace(rows, labels=joined.labels, answers=joined.answers)
    if joined.teacher is not None:
        stores = tuple(part.teacher for part in parts)
        rows = dataclasses.replace(rows, teacher=Rows(stores, *joined.teacher.T, splits, spec.seq_len))
    return rows, counts


def _in_rows(
    segments: Segments, spec: DataSpec, rng: np.random.Generator | None, virtual: int
) -> tuple[np.ndarray, np.ndarray]:
    """Lays units of segments into rows. Returns the order of the segments [S] int64, and the splits [R + 1] of rows."""
    first, count = segments.in_units()
    shuffled = np.arange(len(first)) if rng is None else rng.permutation(len(first))
    sizes = np.add.reduceat(segments.longest(virtual), first) if len(first) else first
    order, splits = packing.rows_of(sizes[shuffled], spec.seq_len, spec.pack, spec.in_order)
    units = shuffled[order]
    order, _, _ = _ranges(first[units], count[units])
    return order, np.concatenate([[0], np.cumsum(count[units])])[splits]


def _segments(part: Part, spec: DataSpec, virtual: int) -> tuple[Segments, Counter[str]]:
    """The segments of one store, with addresses from its first token, and what became of its examples. Each is to leave
    room for so many virtual tokens."""
    room = spec.seq_len - virtual
    store, example = part.store, np.flatnonzero(part.examples)
    start, length = (np.cumsum(store.length) - store.length)[example], store.length[example]
    counts: Counter[str] = Counter()
    if store.mask is None:
        if part.teacher is not None and np.any(length > room):
            raise InputError(
                f"data.seq_len: {spec.seq_len} cuts texts of up to {length.max()} tokens, and a teacher's "
                "tokenizer would cut them elsewhere. Give shorter texts, raise it, or use a teacher with the same "
                "tokenizer."
            )
        start, length = packing.cut(start, length, room)
        counts["supervised_tokens"] = int(length.sum()) - (
            0 if virtual else len(length)
        )  # a piece's first follows nothing
    else:
        units = np.arange(len(example)) if store.answers is None else store.answers["unit"][example]
        size = answers.fitted(length, units, spec.seq_len, virtual)
        supervised, long = store.supervised[example], ~answers.whole(size == length, units)
        if store.labels is not None:  # the last token is where the label is read
            start = start + length - size
        for i in np.flatnonzero(size < length):
            supervised[i] = store.mask[start[i] : start[i] + size[i]].sum()
        fits = ~long if spec.on_long == "drop" else np.ones(len(long), bool)
        useful = answers.whole(fits & (supervised > 0), units)
        counts["too_long"] = int(long.sum())
        counts["nothing_supervised"] = int(np.sum(fits & ~useful))
        counts["supervised_tokens"] = int(supervised[useful].sum())
        example, start, length = example[useful], start[useful], size[useful]
    counts["examples"] = len(example)
    counts["bytes"] = int(store.bytes[example].sum())
    teacher = None
    if part.teacher is not None:
        sizes = part.teacher.length
        teacher = np.stack([(np.cumsum(sizes) - sizes)[example], np.minimum(sizes[example], spec.seq_len)], axis=1)
    labels = None if store.labels is None else store.labels[example]
    segments = Segments(start, length, labels, None if store.answers is None else store.answers[example], teacher)
    if spec.mismatches and store.answers is not None:
        segments = _with_mismatches(segments, store, store.key[example], spec, virtual)
    counts["tokens"] = int(segments.length.sum())
    return segments, counts


def _with_mismatches(segments: Segments, store: Store, key: np.ndarray, spec: DataSpec, virtual: int) -> Segments:
    """Puts behind each document with a verdict its prompt with the answer to another prompt, of a document with a
    verdict. That answer is cut where it doesn't fit. The two share a row where they fit into one together.

    Args:
      segments: whole documents, with addresses from the store's first token.
      store: of these.
      key: [S] uint64, equal for equal prompts.
      spec: says how long rows are.
      virtual: tokens that stand in front of each document.

    Raises:
      InputError: see answers.partners.
    """
    judged = np.flatnonzero(segments.answers["desirable"] >= 0)
    if not len(judged):
        return segments
    start, length = segments.start[judged], segments.length[judged]
    head = np.array([int(np.argmax(store.mask[i : i + n])) for i, n in zip(start, length, strict=True)])
    partner = answers.partners(key[judged])
    size = np.minimum(head + (length - head)[partner], spec.seq_len - virtual)
    said = answers.nothing(len(judged))
    said["unit"] = segments.answers["unit"][judged]
    said["head"], said["tail"] = head, (start + head)[partner]
    apart = length + size + 2 * virtual > spec.seq_len

    order = np.argsort(np.concatenate([np.arange(len(segments.start)), judged]), kind="stable")
    joined = Segments(
        np.concatenate([segments.start, start])[order],
        np.concatenate([segments.length, size])[order],
        answers=np.concatenate([segments.answers, said])[order],
    )
    begins = np.concatenate([np.zeros(len(segments.start), bool), apart])[order]
    joined.answers["unit"] = np.cumsum(begins | (np.diff(joined.answers["unit"], prepend=-1) != 0)) - 1
    return joined


def annotated(rows: Rows, folder: str, settings: Mapping[str, object]) -> Rows:
    """The rows with a teacher's annotations of their tokens. For `settings` and errors see annotations.attach."""
    values = annotations.attach(folder, rows.stores, rows.start, rows.length, settings)
    return dataclasses.replace(rows, annotations=values)


def report(counts: Sequence[Counter[str]], size: int, parts: Sequence[Part], spec: DataSpec) -> dict[str, Any]:
    """What is said of `size` rows; supervised_tokens counts those that are targets; bytes are of the examples' whole
    text; 99 % of what could be too long, which texts can't, have at most length_99 tokens."""
    total = sum(counts, Counter()) + Counter({"rows": size})
    names = ("examples", "rows", "tokens", "supervised_tokens", "bytes", "nothing_supervised")
    cut = "too_long_dropped" if spec.on_long == "drop" else "too_long_truncated"
    return {name: total[name] for name in names} | {
        cut: total["too_long"],
        "length_99": _length_of_most(parts),
        "packing_efficiency": total["tokens"] / max(size * spec.seq_len, 1),
    }


def _length_of_most(parts: Sequence[Part]) -> int:
    """The length that 99 % of the examples don't exceed, texts left out; 0 where there are none. Answers that are
    compared count together."""
    lengths = []
    for part in parts:
        if part.store.mask is None:
            continue
        length = np.maximum(part.store.length, 0 if part.teacher is None else part.teacher.length)[part.examples]
        if part.store.answers is not None and len(length):
            length = np.add.reduceat(length, answers.starts(part.store.answers["unit"][part.examples]))
        lengths.append(length)
    joined = np.sort(np.concatenate(lengths)) if lengths else np.zeros(0, np.int64)
    return int(joined[-(-99 * len(joined) // 100) - 1]) if len(joined) else 0
