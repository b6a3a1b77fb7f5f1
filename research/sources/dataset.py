"""From what a config says of its data to batches: find, tokenise, split, pack, order."""

import dataclasses
import functools
import itertools
import json
import math
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from research.errors import InputError, did_you_mean
from research.sources import annotations, fields, packing, parallel
from research.sources.annotations import Annotations
from research.sources.cache import digest
from research.sources.formats import TEMPLATES
from research.sources.records import FIELDS, FORMATS, Classes, Origin, locate
from research.sources.store import READING, SAMPLES, Example, Store, open_store, read_examples
from research.sources.tokenizers import Tokenizer, TokenizerSpec, make_tokenizer
from research.sources.types import Source, State

_TOKENIZER_CHARS = 100_000_000  # a trained tokenizer sees at most so much text, shared among the sources
_KEYS = 2**64
_OF_ROWS = ("pack", "shuffle", "eval_fraction", "annotations", "cache_dir")


@dataclasses.dataclass(frozen=True)
class DataSpec:
    """What data a run uses.

    Attributes:
      path: a mixture, its entries parted by commas. `0.7*a.jsonl,0.3*tasks:copy` draws 7 rows of the first
        for 3 of the second; without weights every row comes once an epoch. See records.locate for what an
        entry may be.
      eval_path: the same, without weights, for evaluation; "" holds out a part of `path`. What it holds is taken out
        of training; generated records come from another seed.
      eval_fraction: how much of `path` to hold out, by a hash of each document or prompt; at least one where
        that is not 0.
      format: "auto" (by the first record's fields), "text", "prompt_response", "messages" or "labelled", which has to
        be asked for: text with a class, `label`, or the probabilities of the classes, `probs`.
      fields: field -> the column that holds it: {"prompt": "question", "response": "answer"}.
      template: "auto", "model", "chat" or "plain"; see formats.
      seq_len: T, tokens in a row.
      pack: several examples share a row; else each has its own.
      shuffle: a new order each epoch, and chance neighbours within a row; else the order of the data.
      on_bad_record: "error", or "skip" and count.
      on_long: "drop" or "truncate" a conversation longer than seq_len; what has a label is cut at its beginning, and
        long texts are always cut into pieces.
      labels: names of the classes in their order, where a label is a name.
      num_classes: C; 0 is as many as the data and `labels` have.
      prompt: what a classifier reads, with {text} where the text goes.
      examples: how many records to generate, for tasks: and reasoning_gym:.
      max_records: read at most so many records of each entry; 0 reads all.
      annotations: a folder that understudy annotate made of the same data; batches then hold what a teacher says.
      cache_dir: where tokens are kept; "" is $UNDERSTUDY_CACHE, else ~/.cache/understudy.
    """

    path: str
    eval_path: str = ""
    eval_fraction: float = 0.05
    format: str = "auto"
    fields: Mapping[str, str] = dataclasses.field(default_factory=dict)
    template: str = "auto"
    seq_len: int = 1024
    pack: bool = True
    shuffle: bool = True
    on_bad_record: str = "error"
    on_long: str = "drop"
    labels: tuple[str, ...] = ()
    num_classes: int = 0
    prompt: str = "{text}"
    examples: int = 10_000
    max_records: int = 0
    annotations: str = ""
    cache_dir: str = ""


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
      annotations: what a teacher says of the tokens; None for none.
      teacher: the same rows in the tokens of a teacher's tokenizer; None where it reads these.
      sizes: with it, bytes of each token of either tokenizer.
    """

    stores: tuple[Store, ...]
    start: np.ndarray
    length: np.ndarray
    splits: np.ndarray
    seq_len: int
    labels: np.ndarray | None = None
    annotations: Annotations | None = None
    teacher: "Rows | None" = None
    sizes: tuple[np.ndarray, np.ndarray] | None = None

    def __len__(self) -> int:
        return len(self.splits) - 1

    def batch(self, rows: np.ndarray) -> dict[str, np.ndarray]:
        """Returns rows by number, [B] int64; number -1 is a row of padding alone.

        Returns:
          tokens, segment_ids, positions: [B, T] int32, and loss_mask: [B, T] float32; with labels, label_probs:
          [B, T, C] float32, at the last token of each segment, and 0 elsewhere; with annotations or a teacher's
          rows, those fields.
        """
        first = np.where(rows < 0, 0, self.splits[rows])
        count = np.where(rows < 0, 0, self.splits[rows + 1] - first)
        segment, row, nth = _ranges(first, count)
        length = self.length[segment]
        before = np.cumsum(length) - length
        in_row = before - before[(np.cumsum(count) - count)[row]]
        address, which, position = _ranges(self.start[segment], length)
        at = (row * self.seq_len + in_row)[which] + position

        shape = (len(rows), self.seq_len)
        batch = {name: np.zeros(shape, np.int32) for name in ("tokens", "segment_ids", "positions")}
        batch["loss_mask"] = np.zeros(shape, np.float32)
        tokens, mask = self._read(address)
        values = {"tokens": tokens, "segment_ids": nth[which] + 1, "positions": position, "loss_mask": mask}
        for name, value in values.items():
            batch[name].reshape(-1)[at] = value
        if self.labels is not None:
            C = self.labels.shape[1]
            batch["label_probs"] = np.zeros((*shape, C), np.float32)
            batch["label_probs"].reshape(-1, C)[row * self.seq_len + in_row + length - 1] = self.labels[segment]
        if self.annotations is not None:
            batch |= self.annotations.fields(address, at, shape)
        if self.teacher is not None:
            batch |= parallel.fields(batch, self.teacher.batch(rows), self.sizes)
        return batch

    def _read(self, address: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        tokens, mask = np.zeros(len(address), np.int32), np.ones(len(address), bool)
        base = 0
        for store in self.stores:
            end = base + len(store.tokens)
            here = np.flatnonzero((address >= base) & (address < end))
            tokens[here] = store.tokens[address[here] - base]
            if store.mask is not None:
                mask[here] = store.mask[address[here] - base]
            base = end
        return tokens, mask


def _ranges(first: np.ndarray, count: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Each [sum(count)]: the numbers first[i], first[i] + 1, ... of all ranges i; i; the place in the range."""
    which = np.repeat(np.arange(len(count)), count)
    nth = np.arange(len(which)) - (np.cumsum(count) - count)[which]
    return first[which] + nth, which, nth


@dataclasses.dataclass(frozen=True, eq=False)
class Data:
    """A run's data, ready to be batched.

    Attributes:
      tokenizer: the one that made the tokens.
      train: (rows, weight) of each part of a weighted mixture; one part, of weight 1, where there are no
        weights.
      held_out: rows for evaluation; none where eval_fraction is 0 and there is no eval_path.
      held_out_records: at most 256 held-out records with prompts (prompt, response or messages, and whatever
        else they held), one a prompt, in random order: for evaluations that generate.
      report: counts of all that was read, dropped, cut and packed.
    """

    tokenizer: Tokenizer
    train: list[tuple[Rows, float]]
    held_out: Rows
    held_out_records: list[dict[str, Any]]
    report: dict[str, Any]


def load(
    spec: DataSpec,
    tokenizer_spec: TokenizerSpec,
    tokenizer: Tokenizer | None = None,
    seed: int = 0,
    teacher: Tokenizer | None = None,
) -> Data:
    """Reads, tokenises, splits and packs what `spec` names.

    Args:
      spec: the data.
      tokenizer_spec: the tokenizer to make; not looked at where one is given.
      tokenizer: one made before, so that ids stay those of a checkpoint.
      seed: of generated records, and of which examples share a row.
      teacher: another tokenizer; batches then hold the same documents in its tokens too (parallel.fields).

    Raises:
      InputError: an option, an entry or a record is at fault, or nothing is left to train on.
    """
    _check(spec)
    paths, weights = _mixture("data.path", spec.path)
    eval_paths, eval_weights = _mixture("data.eval_path", spec.eval_path) if spec.eval_path else ([], None)
    if eval_weights:
        raise InputError(f"data.eval_path: {spec.eval_path!r} has weights, but all of it is evaluated. Leave them out.")
    origins = [_locate("data.path", path, spec, seed) for path in paths]
    eval_origins = [_locate("data.eval_path", path, spec, seed + 1) for path in eval_paths]
    if tokenizer is None:
        tokenizer = _make_tokenizer(tokenizer_spec, origins, eval_origins, spec)
    stores = [_open(origin, tokenizer, spec) for origin in origins]
    eval_stores = [_open(origin, tokenizer, spec) for origin in eval_origins]
    stores, eval_stores = _same_classes(stores, eval_stores, spec)

    others = {}
    if teacher is not None:
        stores_of = zip([*origins, *eval_origins], [*stores, *eval_stores], strict=True)
        others = {id(store): _open(origin, teacher, spec) for origin, store in stores_of}

    to_train, to_eval, samples = _split(stores, eval_stores, spec.eval_fraction)

    rng = np.random.default_rng(seed) if spec.shuffle else None
    parts = list(zip(stores, to_train, strict=True))
    groups = [parts] if weights is None else [[part] for part in parts]
    laid_out = [_lay_out(group, spec, rng, others) for group in groups]
    for (rows, counts), name in zip(laid_out, [spec.path] if weights is None else paths, strict=True):
        if not len(rows):
            raise InputError(
                f"data.path: nothing of {name!r} is left to train on ({_dropped(counts, spec)}). "
                f"Raise data.seq_len, set data.on_long='truncate', or give more data."
            )
    held_out, eval_counts = _lay_out(list(zip(eval_stores or stores, to_eval, strict=True)), spec, None, others)
    if teacher is not None:
        sizes = tokenizer.token_bytes(), teacher.token_bytes()
        laid_out = [(dataclasses.replace(rows, sizes=sizes), counts) for rows, counts in laid_out]
        held_out = dataclasses.replace(held_out, sizes=sizes)
    if spec.annotations:
        made_of = settings(spec, tokenizer, seed)
        laid_out = [(_annotate(rows, spec.annotations, made_of), counts) for rows, counts in laid_out]
        held_out = _annotate(held_out, spec.annotations, made_of)
    report = {
        "tokenizer_size": tokenizer.size,
        "sources": [
            {"name": origin.name, **store.counts, "was_cached": store.was_cached}
            for origin, store in zip([*origins, *eval_origins], [*stores, *eval_stores], strict=True)
        ],
        "train": _report(sum((counts for _, counts in laid_out), Counter()), spec),
        "held_out": _report(eval_counts, spec),
    }
    if eval_stores:
        report["train"]["dropped_as_in_eval_path"] = sum(int(np.sum(~chosen)) for chosen in to_train)
    return Data(
        tokenizer=tokenizer,
        train=[(rows, weight) for (rows, _), weight in zip(laid_out, weights or [1.0], strict=True)],
        held_out=held_out,
        held_out_records=_records(samples, spec),
        report=report,
    )


def settings(spec: DataSpec, tokenizer: Tokenizer, seed: int) -> dict[str, Any]:
    """What decides the tokens of a run, and where documents are cut; not how they are packed and ordered."""
    told = dataclasses.asdict(spec)
    fields = {f"data.{name}": told[name] for name in told if name not in ("seq_len", *_OF_ROWS)}
    known = {"tokenizer": f"{tokenizer.fingerprint()} ({tokenizer.size} tokens)", "seq_len": spec.seq_len}
    return known | fields | {"seed": seed}


def _annotate(rows: Rows, folder: str, made_of: Mapping[str, Any]) -> Rows:
    found = annotations.attach(folder, rows.stores, rows.start, rows.length, made_of)
    return dataclasses.replace(rows, annotations=found)


def make_source(
    train: Sequence[tuple[Rows, float]],
    *,
    batch_size: int,
    seed: int,
    shuffle: bool = True,
    mine: Sequence[int] | None = None,
) -> Source:
    """Returns a source of endless batches. Its state is the step: batch i depends on (seed, i) alone.

    Args:
      train: (rows, weight) parts, as Data.train: rows are drawn in proportion to the weights, those of each
        part in a new order each epoch.
      batch_size: B of the global batch.
      seed: of the order.
      shuffle: else each part keeps its own order.
      mine: numbers of the rows of the global batch that batches hold, for one process of several; by default all.
    """
    mine = range(batch_size) if mine is None else mine
    spec = _batch_spec(batch_size, train[0][0])

    @functools.cache
    def order() -> Any:
        """Place in the run -> (part, row). Made for the first batch, as the import of Grain takes a while."""
        import grain

        return grain.MapDataset.mix(
            [_row_order(k, len(rows), seed if shuffle else None) for k, (rows, _) in enumerate(train)],
            [weight for _, weight in train],
        )

    def init() -> State:
        return {"step": 0}

    def next_batch(state: State, models: Any = None, key: Any = None) -> tuple[dict[str, np.ndarray], State]:
        step = state["step"]
        drawn = np.array([order()[step * batch_size + int(i)] for i in mine])
        part, row = drawn[:, 0], drawn[:, 1]
        batch = {name: np.zeros((len(drawn), *s.shape[1:]), s.dtype) for name, s in spec.items()}
        for k in np.unique(part):
            for name, value in train[k][0].batch(row[part == k]).items():
                batch[name][part == k] = value
        return batch, {"step": step + 1}

    return Source(spec, init, next_batch)


def eval_batches(
    rows: Rows,
    batch_size: int,
    max_batches: int | None = None,
    *,
    mine: Sequence[int] | None = None,
) -> Iterator[dict[str, np.ndarray]]:
    """Yields batches that hold every row once; padding rows fill up the last. `mine`: see `make_source`.

    Where `max_batches` leaves some out, the rows taken lie evenly over all of them.
    """
    taken = len(rows) if max_batches is None else min(len(rows), max_batches * batch_size)
    index = np.arange(taken) * len(rows) // max(taken, 1)
    index = np.concatenate([index, np.full(-taken % batch_size, -1)])
    return (rows.batch(batch if mine is None else batch[np.asarray(mine)]) for batch in index.reshape(-1, batch_size))


def _row_order(part: int, n_rows: int, seed: int | None) -> Any:
    """Endless (part, row) pairs, every row once an epoch, as a grain.MapDataset; `seed` None keeps the rows' order."""
    import grain

    order = grain.MapDataset.range(n_rows)
    if seed is not None and n_rows < 4096:
        # Grain's shuffle tries about 2^16 / n_rows numbers for each that it gives: 10 ms a row where there are two.
        rng = np.random.default_rng([seed, part])
        epochs = rng.permuted(np.tile(np.arange(n_rows), (2**16 // n_rows, 1)), axis=1)
        order = grain.MapDataset.source(epochs.reshape(-1))
    elif seed is not None:
        order = order.shuffle(seed=int(np.random.SeedSequence([seed, part]).generate_state(1)[0]))
    return order.repeat().map(lambda row: (part, row))


def _batch_spec(batch_size: int, rows: Rows) -> fields.Spec:
    names, sizes = list(fields.group("text")), {"time": rows.seq_len}
    if rows.labels is not None:
        names, sizes = [*names, "label_probs"], {**sizes, "labels": rows.labels.shape[1]}
    if rows.annotations is not None:
        names, sizes = [*names, *fields.group("annotations")], {**sizes, "candidates": rows.annotations.k}
    if rows.teacher is not None:
        names += fields.group("parallel")
    return fields.spec(names, batch_size, sizes)


def _check(spec: DataSpec) -> None:
    choices = {
        "format": ("auto", *FORMATS),
        "template": TEMPLATES,
        "on_bad_record": ("error", "skip"),
        "on_long": ("drop", "truncate"),
    }
    for name, allowed in choices.items():
        value = getattr(spec, name)
        if value not in allowed:
            raise InputError(f"data.{name}: {value!r} is not known.{did_you_mean(str(value), allowed)}")
    for name in spec.fields:
        if name not in FIELDS:
            raise InputError(
                f"data.fields: there is no field {name!r} to rename a column to.{did_you_mean(name, FIELDS)}"
            )
    if spec.seq_len < 2:
        raise InputError(f"data.seq_len: {spec.seq_len} leaves nothing to predict. Use at least 2.")
    if not 0 <= spec.eval_fraction < 1:
        raise InputError(f"data.eval_fraction: {spec.eval_fraction} is not a part of the data. Use 0 <= fraction < 1.")
    if spec.max_records < 0:
        raise InputError(f"data.max_records: {spec.max_records} is not a number of records. Use 0 to read all.")
    if "{text}" not in spec.prompt:
        raise InputError(f"data.prompt: {spec.prompt!r} has no {{text}}, which stands for what is to be classified.")
    if spec.num_classes < len(spec.labels) and spec.num_classes:
        raise InputError(f"data.num_classes: {spec.num_classes} is fewer than data.labels names, {len(spec.labels)}.")
    if spec.examples < 1:
        raise InputError(f"data.examples: {spec.examples} is not a number of records. Use at least 1.")


def _mixture(field: str, path: str) -> tuple[list[str], list[float] | None]:
    """Parses "0.7*a,0.3*b" into the entries and their weights, None where none has one."""
    paths, weights = [], []
    for entry in (entry.strip() for entry in path.split(",")):
        weighted = re.fullmatch(r"([-+]?(?:\d+\.?\d*|\.\d+)(?:[eE][-+]?\d+)?)\*(.+)", entry)
        weight = float(weighted[1]) if weighted else None
        if weighted and not 0 < weight < math.inf:
            raise InputError(f"{field}: the weight of {entry!r} must be greater than 0. Leave the entry out instead.")
        paths.append(weighted[2] if weighted else entry)
        weights.append(weight)
    if not all(paths):
        raise InputError(f"{field}: {path!r} has an empty entry. Name a file, or tasks:NAME, or another source.")
    if None in weights and any(weights):
        raise InputError(f"{field}: in {path!r} some entries have a weight and some have none. Weigh all or none.")
    return paths, None if None in weights else weights


def _locate(field: str, path: str, spec: DataSpec, seed: int) -> Origin:
    try:
        origin = locate(path, count=spec.examples, seed=seed)
    except InputError as e:
        raise InputError(f"{field}: {e}") from e
    most = spec.max_records or None
    return origin._replace(made_of=[origin.made_of, most], read=lambda: itertools.islice(origin.read(), most))


def _classes(spec: DataSpec) -> Classes:
    return Classes(tuple(spec.labels), spec.prompt)


def _same_classes(stores: list[Store], eval_stores: list[Store], spec: DataSpec) -> tuple[list[Store], list[Store]]:
    """The stores with labels over the same number of classes."""
    every = [*stores, *eval_stores]
    labelled = [store.labels is not None for store in every]
    if not any(labelled):
        return stores, eval_stores
    if not all(labelled):
        raise InputError("data.path: some entries have labels, and others none. Train on them in runs of their own.")
    seen = max(store.labels.shape[1] for store in every)
    C = spec.num_classes or max(seen, len(spec.labels))
    if seen > C:
        raise InputError(f"data.num_classes: {C} is fewer than the labels have, {seen}. Set it to 0 to follow them.")
    every = [
        dataclasses.replace(store, labels=np.pad(store.labels, ((0, 0), (0, C - store.labels.shape[1]))))
        for store in every
    ]
    return every[: len(stores)], every[len(stores) :]


def _open(origin: Origin, tokenizer: Tokenizer, spec: DataSpec) -> Store:
    return open_store(
        origin,
        tokenizer,
        format=spec.format,
        fields=spec.fields,
        template=spec.template,
        on_bad_record=spec.on_bad_record,
        classes=_classes(spec),
        cache_dir=spec.cache_dir,
    )


def _make_tokenizer(
    tokenizer_spec: TokenizerSpec, origins: list[Origin], eval_origins: list[Origin], spec: DataSpec
) -> Tokenizer:
    # Of so few records that the split must force one out, this may let the tokenizer see that one.
    limit = 0 if eval_origins else int(spec.eval_fraction * _KEYS)

    def examples(origin: Origin) -> Iterator[Example]:
        return read_examples(origin, spec.format, spec.fields, spec.on_bad_record, Counter(), _classes(spec))

    def texts() -> Iterator[str]:
        held_out = {example.key for origin in eval_origins for example in examples(origin)}
        for origin in origins:
            room = _TOKENIZER_CHARS // len(origins)
            for example in examples(origin):
                if example.key >= limit and example.key not in held_out:
                    yield from (text for _, text in example.turns)
                    room -= sum(len(text) for _, text in example.turns)
                if room <= 0:
                    break

    read = [origin.made_of for origin in [*origins, *eval_origins]]
    made_of = [read, spec.format, sorted(spec.fields.items()), spec.on_bad_record, limit, *_classes(spec), READING]
    return make_tokenizer(tokenizer_spec, texts, texts_id=digest([json.dumps(made_of)]), cache_dir=spec.cache_dir)


def _split(stores: list[Store], eval_stores: list[Store], fraction: float):
    """Returns which examples of each store to train on, which of each of `eval_stores or stores` to hold out, as
    lists of [E] bool, and the held-out samples."""
    if eval_stores:
        eval_keys = np.concatenate([store.key for store in eval_stores])
        to_train = [~np.isin(store.key, eval_keys) for store in stores]
        to_eval = [np.ones(len(store.key), bool) for store in eval_stores]
        return to_train, to_eval, [sample for store in eval_stores for sample in store.samples]
    limit = _held_out_below(np.concatenate([store.key for store in stores]), fraction)
    to_eval = [store.key < np.uint64(limit) for store in stores]
    samples = [sample for store in stores for sample in store.samples if sample["key"] < limit]
    return [~chosen for chosen in to_eval], to_eval, samples


def _held_out_below(keys: np.ndarray, fraction: float) -> int:
    """The records with keys below this are held out: equal ones together, and one at least on either side."""
    least, greatest = int(keys.min()), int(keys.max())
    if fraction == 0 or least == greatest:
        return 0
    return min(max(int(fraction * _KEYS), least + 1), greatest)


def _lay_out(
    parts: list[tuple[Store, np.ndarray]], spec: DataSpec, rng: np.random.Generator | None, others: Mapping[int, Store]
):
    """Lays the chosen examples ([E] bool beside each store) into rows; counts what becomes of them. `others` has the
    same examples in a teacher's tokens, by the id of a store."""
    counts: Counter[str] = Counter()
    starts, lengths, labels, other_starts, other_lengths = [], [], [], [], []
    base = other_base = 0
    for store, chosen in parts:
        example = np.flatnonzero(chosen)
        start, length = (np.cumsum(store.length) - store.length)[example], store.length[example]
        if store.mask is None:
            if others and np.any(length > spec.seq_len):
                raise InputError(
                    f"data.seq_len: {spec.seq_len} cuts texts of up to {length.max()} tokens, and a teacher's "
                    "tokenizer would cut them elsewhere. Give shorter texts, raise it, or use a teacher with the same "
                    "tokenizer."
                )
            start, length = packing.cut(start, length, spec.seq_len)
            counts["supervised_tokens"] += int(length.sum()) - len(length)  # a piece's first token follows nothing
        else:
            supervised, long = store.supervised[example], length > spec.seq_len
            if store.labels is not None:  # the last token is where the label is read
                start = start + np.where(long, length - spec.seq_len, 0)
            for i in np.flatnonzero(long):
                supervised[i] = store.mask[start[i] : start[i] + spec.seq_len].sum()
            fits = ~long if spec.on_long == "drop" else np.ones(len(long), bool)
            useful = fits & (supervised > 0)
            counts["too_long"] += int(long.sum())
            counts["nothing_supervised"] += int(np.sum(fits & ~useful))
            counts["supervised_tokens"] += int(supervised[useful].sum())
            example, start, length = example[useful], start[useful], np.minimum(length[useful], spec.seq_len)
        counts["examples"] += len(example)
        counts["bytes"] += int(store.bytes[example].sum())
        starts.append(base + start)
        lengths.append(length)
        if store.labels is not None:
            labels.append(store.labels[example])
        base += len(store.tokens)
        if others:
            other = others[id(store)]
            other_starts.append(other_base + (np.cumsum(other.length) - other.length)[example])
            other_lengths.append(np.minimum(other.length[example], spec.seq_len))
            other_base += len(other.tokens)
    start, length = np.concatenate(starts), np.concatenate(lengths)
    other = np.stack([np.concatenate(x) for x in (other_starts, other_lengths)]) if others else None
    target = np.concatenate(labels) if labels else None
    if rng is not None:
        chance = rng.permutation(len(start))
        start, length = start[chance], length[chance]
        target = None if target is None else target[chance]
        other = None if other is None else other[:, chance]
    longest = length if other is None else np.maximum(length, other[1])
    row = packing.best_fit_decreasing(longest, spec.seq_len) if spec.pack else np.arange(len(length))
    order = np.argsort(row, kind="stable")
    splits = np.concatenate([[0], np.cumsum(np.bincount(row))]).astype(np.int64)
    counts["rows"] = len(splits) - 1
    counts["tokens"] = int(length.sum())
    stores = tuple(store for store, _ in parts)
    target = None if target is None else target[order]
    rows = Rows(stores, start[order], length[order], splits, spec.seq_len, target)
    if other is not None:
        stores = tuple(others[id(store)] for store in stores)
        rows = dataclasses.replace(rows, teacher=Rows(stores, *other[:, order], splits, spec.seq_len))
    return rows, counts


def _dropped(counts: Counter[str], spec: DataSpec) -> str:
    faults = {
        f"{counts['too_long']} longer than data.seq_len={spec.seq_len}": counts["too_long"],
        f"{counts['nothing_supervised']} cut before their answer": counts["nothing_supervised"],
    }
    return ", ".join(text for text, n in faults.items() if n) or "all of it is held out or in data.eval_path"


def _report(counts: Counter[str], spec: DataSpec) -> dict[str, Any]:
    """supervised_tokens counts those that are targets; bytes are of the examples' whole text."""
    names = ("examples", "rows", "tokens", "supervised_tokens", "bytes", "nothing_supervised")
    cut = "too_long_dropped" if spec.on_long == "drop" else "too_long_truncated"
    efficiency = counts["tokens"] / max(counts["rows"] * spec.seq_len, 1)
    return {name: counts[name] for name in names} | {
        cut: counts["too_long"],
        "packing_efficiency": efficiency,
    }


def _records(samples: list[dict[str, Any]], spec: DataSpec) -> list[dict[str, Any]]:
    one_a_prompt = {sample["key"]: sample["record"] for sample in samples if sample["length"] <= spec.seq_len}
    return [one_a_prompt[key] for key in sorted(one_a_prompt)[:SAMPLES]]
