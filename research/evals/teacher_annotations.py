"""Writes what a teacher or a reference says of a run's data; sources/annotations.py reads it."""

import dataclasses
import functools
import json
import os
import shutil
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import tqdm

from research import digests, files, params
from research.devices import sharding
from research.errors import InputError
from research.models.transformer import Model
from research.objectives.types import next_token_targets
from research.ops import divergences, losses
from research.sources import annotations, packing
from research.sources.annotations import META, PROGRESS, Pieces
from research.sources.dataset import Data
from research.sources.rows import Rows
from research.sources.store import Store

_GROUP_TOKENS = 2**18  # written, and packed into rows, together


class Job(NamedTuple):
    """What is to be annotated of one store, and where it goes."""

    store: Store
    pieces: Pieces
    folder: Path


@dataclasses.dataclass(frozen=True)
class Teacher:
    """A teacher and what is asked of it.

    Attributes:
      name: of its checkpoint.
      source: what its parameters are read from; see loading.source.
      model: what it computes.
      read: () -> its parameters, laid out on the mesh by `rules`; called once there is room on the disk.
      mesh: of the devices.
      rules: logical axis -> mesh axis.
      k: how many of the likeliest tokens are kept; 0 of a reference, of which the log-probability of the token that
        follows is kept alone.
      temperature: divides the logits.
      on: "supervised" or "all": which tokens.
      vocab_size: of the tokenizer.
      rows: of a batch.
      seq_len: of a row.
    """

    name: str
    source: Mapping[str, Any]
    model: Model
    read: Callable[[], Any]
    mesh: jax.sharding.Mesh
    rules: Mapping[str, Any]
    k: int
    temperature: float
    on: str
    vocab_size: int
    rows: int
    seq_len: int

    def annotate(self, data: Data, settings: Mapping[str, Any], output: Path) -> int:
        """Annotates a run's data, train and held-out, and returns how many tokens.

        Args:
          data: of the run.
          settings: what the data was made with; see sources.opening.settings.
          output: a folder: a new one, or what an earlier call with the same arguments left.

        Raises:
          InputError: the disk has no room, `output` holds something else, or the teacher is a prefix LM and the data
            doesn't say what a prefix is.
        """
        if self.model.config.prefix and "prefix" not in data.train[0][0].extra:
            raise InputError(
                f"roles.{self.kind} = {self.name}: is a prefix LM, and nothing says what a document's prefix is. Give "
                "the data a view that marks prefixes: data.sources.NAME.view = {'kind': 'prompt'}."
            )
        jobs = plan(data, output, self.on)
        _check_room(output, jobs, self.k, self.vocab_size)
        with jax.set_mesh(self.mesh):
            _begin(output, self._meta(jobs, settings), jobs)
            total = sum(len(job.pieces.at) for job in jobs)
            with tqdm.tqdm(total=total, unit=" tokens", unit_scale=True, disable=None) as bar:
                for job in jobs:
                    for done in self._write(job):
                        bar.update(done)
        return total

    def _meta(self, jobs: Sequence[Job], settings: Mapping[str, Any]) -> dict[str, Any]:
        stores = [
            {
                "name": f"part {i + 1} of {len(jobs)}",
                "folder": job.folder.name,
                "content": annotations.content(job.store),
                "annotated": len(job.pieces.at),
            }
            for i, job in enumerate(jobs)
        ]
        return {
            "kind": self.kind,
            "teacher": self.name,
            "source": dict(self.source),
            "weights": params.checksum(self.weights),
            "k": self.k,
            "temperature": self.temperature,
            "on": self.on,
            "vocab_size": self.vocab_size,
            "dtype": self.model.config.dtype,
            **({"prefix": True} if self.model.config.prefix else {}),
            "rows": self.rows,
            "settings": dict(settings),
            "stores": stores,
        }

    @property
    def kind(self) -> str:
        """Whose annotations they are."""
        return annotations.TEACHER if self.k else annotations.REFERENCE

    def _said(self, batch: Mapping[str, np.ndarray]) -> tuple[jax.Array, ...]:
        """What it says after each token of a batch, in the order of annotations.layout."""
        rows = sharding.named(self.mesh, ("batch", "time"), self.rules)
        names = [name for name in ("tokens", "segment_ids", "positions", "prefix") if name in batch]
        fields = {name: jax.device_put(batch[name], rows) for name in names}
        return self._predict(self.weights, fields)

    @functools.cached_property
    def weights(self) -> Any:
        return self.read()

    @functools.cached_property
    def _predict(self) -> Callable[[Any, Mapping[str, jax.Array]], tuple[jax.Array, ...]]:
        def predict(weights: Any, batch: Mapping[str, jax.Array]) -> tuple[jax.Array, ...]:
            hidden, head = self.model.hidden(weights, batch), self.model.unembed(weights)
            if not self.k:
                targets, _ = next_token_targets(batch)
                return (losses.target_log_probs(hidden, head, targets, frozen=True).target,)
            return divergences.top_k(hidden, head, self.k, temperature=self.temperature, vocab_size=self.vocab_size)

        return jax.jit(predict, out_shardings=sharding.named(self.mesh, ("batch", "time"), self.rules))

    def _write(self, job: Job) -> Iterator[int]:
        """Fills a store's files from where they are. Yields how many more tokens are done."""
        pieces, progress = job.pieces, annotations.read_sealed(job.folder / PROGRESS)
        if progress["done"]:
            yield progress["done"]
        for first, stop in _groups(pieces.segments[:, 1], max(_GROUP_TOKENS, self.rows * self.seq_len)):
            if stop <= progress["segments"]:
                continue
            segments = pieces.segments[first:stop]
            low, high = np.searchsorted(pieces.at, [segments[0, 0], segments[-1].sum()])
            if low == high:
                continue
            for name, values in self._annotate(job, segments, pieces.at[low:high]).items():
                with open(job.folder / f"{name}.bin", "r+b") as file:
                    file.seek(int(low) * values[:1].nbytes)
                    file.write(values.tobytes())
                    files.sync(file)
            _mark(job.folder, int(high), int(stop))
            yield int(high - low)
        if "files" not in annotations.read_sealed(job.folder / PROGRESS):
            _mark(job.folder, len(pieces.at), len(pieces.segments), digests.of_folder(job.folder, [PROGRESS]))

    def _annotate(self, job: Job, segments: np.ndarray, at: np.ndarray) -> dict[str, np.ndarray]:
        """What it says at the tokens `at`, by file, from segments packed into rows."""
        layout = annotations.layout(len(job.pieces.at), self.k, self.vocab_size)
        said = {name: np.zeros((len(at), *shape[1:]), dtype) for name, (dtype, shape) in layout.items()}
        for address, where, batch in _batches(job.store, segments, self.seq_len, self.rows):
            row = np.minimum(np.searchsorted(at, address), len(at) - 1)
            wanted = at[row] == address
            for name, values in zip(layout, jax.device_get(self._said(batch)), strict=True):
                values = values.reshape(-1, *values.shape[2:])
                said[name][row[wanted]] = values[where[wanted]]
        return said


def plan(data: Data, output: Path, on: str) -> list[Job]:
    """What is to be annotated of each store of a run's data."""
    segments_of: dict[int, tuple[Store, list[np.ndarray]]] = {}
    for rows in (*(rows for rows, _ in data.train), data.held_out):
        parts = annotations.split(rows.stores, rows.start, rows.length)
        for store, segments in zip(rows.stores, parts, strict=True):
            segments_of.setdefault(id(store), (store, []))[1].append(np.stack(segments, axis=1))
    jobs, seen = [], set()
    for store, segments in segments_of.values():
        name = annotations.content(store)[:16]
        start, length = np.concatenate(segments).T
        if len(start) and name not in seen:  # an entry may be there twice
            seen.add(name)
            jobs.append(Job(store, annotations.pieces(store, start, length, on), output / name))
    return jobs


def _file_sizes(job: Job, k: int, vocab_size: int) -> dict[str, int]:
    """Bytes of each file that grows."""
    layout = annotations.layout(len(job.pieces.at), k, vocab_size)
    return {name: dtype.itemsize * int(np.prod(shape, dtype=np.int64)) for name, (dtype, shape) in layout.items()}


def _check_room(output: Path, jobs: Sequence[Job], k: int, vocab_size: int) -> None:
    """Says how much will be written; raises InputError where it doesn't fit."""
    sizes = [sum(_file_sizes(job, k, vocab_size).values()) + sum(x.nbytes for x in job.pieces) for job in jobs]
    there = sum(f.stat().st_blocks * 512 for f in output.rglob("*") if f.is_file()) if output.is_dir() else 0
    place = next(p for p in (output.resolve(), *output.resolve().parents) if p.is_dir())
    free = shutil.disk_usage(place).free
    tokens = sum(len(job.pieces.at) for job in jobs)
    print(
        f"{output}: {tokens:,} tokens x {sum(sizes) / max(tokens, 1):.0f} bytes = {sum(sizes):,} bytes on disk, "
        f"{there:,} of them there already; {free:,} are free",
        file=sys.stderr,
    )
    if sum(sizes) - there > free:
        raise InputError(
            f"--output={output}: needs {sum(sizes) - there:,} more bytes, and {free:,} are free. "
            f"{f'Lower --k={k}, g' if k else 'G'}ive less data, or name another disk."
        )


def _begin(output: Path, meta: Mapping[str, Any], jobs: Sequence[Job]) -> None:
    """Creates the files at their full size; or checks that those that are there were begun with the same arguments."""
    before = annotations.read_sealed(output / META, {})
    if before:
        files.check_identity(output, _flat(before), _flat(meta))
        return
    folders = {job.folder.name for job in jobs}
    if output.exists() and (not output.is_dir() or any(p.name not in folders for p in output.iterdir())):
        raise InputError(f"--output={output}: is there, and holds no annotations. Name a new folder.")
    for job in jobs:
        job.folder.mkdir(parents=True, exist_ok=True)
        np.save(job.folder / "segments.npy", job.pieces.segments)
        np.save(job.folder / "at.npy", job.pieces.at)
        for name, size in _file_sizes(job, meta["k"], meta["vocab_size"]).items():
            _reserve(job.folder / f"{name}.bin", size)
        _mark(job.folder, 0, 0)
    output.mkdir(parents=True, exist_ok=True)
    files.write_json(output / META, digests.seal(meta), indent=1)


def _flat(meta: Mapping[str, Any]) -> dict[str, Any]:
    """What annotations are made with, that of their data in the same row as the rest."""
    rest = {name: value for name, value in meta.items() if name not in ("settings", digests.SEAL)}
    return json.loads(json.dumps({**rest, **meta["settings"]}))


def _reserve(path: Path, size: int) -> None:
    """Creates a file with room for so many bytes."""
    with open(path, "wb") as file:
        try:
            file.truncate(size)
            if size and hasattr(os, "posix_fallocate"):
                os.posix_fallocate(file.fileno(), 0, size)
        except OSError as error:
            raise InputError(f"{path}: {size:,} bytes can't be reserved ({error.strerror}).") from error


def _groups(lengths: np.ndarray, tokens: int) -> Iterator[tuple[int, int]]:
    """Ranges of segments, in order, of about `tokens` tokens each."""
    ends = np.cumsum(lengths)
    bounds = np.unique(np.concatenate([np.searchsorted(ends, np.arange(0, ends[-1], tokens)), [len(lengths)]]))
    return zip(bounds[:-1].tolist(), bounds[1:].tolist(), strict=True)


def _batches(
    store: Store, segments: np.ndarray, seq_len: int, batch_size: int
) -> Iterator[tuple[np.ndarray, np.ndarray, dict[str, np.ndarray]]]:
    """Yields (addresses of the tokens, their places in the flat batch, the batch) of packed rows."""
    order, splits = packing.rows_of(segments[:, 1], seq_len)
    start, length = segments[order].T
    extra = {name: values.shape[1:] for name, values in store.fields.items()}
    rows = Rows((store,), start, length, splits, seq_len, extra=extra)
    for first in range(0, len(rows), batch_size):
        index = np.arange(first, first + batch_size)
        batch = rows.batch(np.where(index < len(rows), index, -1))
        here = slice(splits[first], splits[min(first + batch_size, len(rows))])
        before = np.cumsum(length[here]) - length[here]
        address = np.repeat(start[here] - before, length[here]) + np.arange(length[here].sum())
        yield address, np.flatnonzero(batch["segment_ids"]), batch


def _mark(folder: Path, done: int, segments: int, entries: Mapping[str, Any] | None = None) -> None:
    """Notes how many tokens are written, and of how many segments; once all are, with the digests of the files."""
    noted = {"done": done, "segments": segments} | ({} if entries is None else {"files": entries})
    files.write_json(folder / PROGRESS, digests.seal(noted), indent=1)
