"""What a teacher or a reference says of each token of a store, on disk, for batches to take along.

A folder of annotations has one folder per store, and `meta.json`, which says what they were made with. Of a store:

  segments.npy    [S, 2] int64: first token and length of the pieces of documents that the teacher read, in order
  at.npy          [N] int64: the tokens that are annotated, by their place in the store, in order
  ids.bin         [N, K] uint16 or uint32: a teacher's likeliest next tokens
  log_probs.bin   [N, K] float32
  rest.bin        [N] float32: the log of the mass of all other tokens
  log_prob.bin    [N] float32: in their place, a reference's log-probability of the token that follows
  progress.json   how many of the N are written; once all are, the digests of the other files

As documents are read apart, what the teacher says at a token depends on its piece alone: neither on the packing of rows
nor on their order. float16 would save a third of the space, and cost 3 digits: -10 to within 0.004.
"""

import dataclasses
import functools
import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from research import digests, files
from research.errors import InputError
from research.sources import fields
from research.sources.store import Store

META, PROGRESS = "meta.json", "progress.json"
TEACHER, REFERENCE = "teacher", "reference"  # whose annotations they are
_GROUPS = {TEACHER: "annotations", REFERENCE: "reference"}  # of batch fields
_CONTENT = {TEACHER: "a teacher's likeliest tokens", REFERENCE: "a reference's log-probs"}
_REMEDY = "Set it to what it was, or make new annotations with understudy annotate."


class Pieces(NamedTuple):
    """What is to be annotated of one store; arrays as in the files."""

    segments: np.ndarray
    at: np.ndarray


class Part(NamedTuple):
    """The annotations of one store, mapped into memory."""

    pieces: Pieces
    columns: tuple[np.ndarray, ...]  # in the order of `layout`, which is that of the batch fields


@dataclasses.dataclass(frozen=True, eq=False)
class Annotations:
    """The annotations of several stores, whose tokens are addressed one after the other.

    Attributes:
      parts: of each store; None for one without.
      sizes: tokens of each store.
      k: K; 0 of a reference's.
    """

    parts: tuple[Part | None, ...]
    sizes: tuple[int, ...]
    k: int

    @property
    def group(self) -> str:
        """Of the batch fields."""
        return _GROUPS[TEACHER if self.k else REFERENCE]

    def fields(self, address: np.ndarray, at: np.ndarray, shape: tuple[int, int]) -> dict[str, np.ndarray]:
        """Batch fields of tokens that lie at `at` of a flat batch [B * T].

        Args:
          address: [N] int64, of each token in the stores.
          at: [N] int64.
          shape: (B, T).

        Returns:
          teacher_ids: [B, T, K] int32; teacher_log_probs: [B, T, K] float32, -inf where there is none; teacher_rest:
          [B, T] float32, 0 where there is none. Of a reference reference_log_prob: [B, T] float32, 0 where there is
          none.
        """
        batch = fields.empty(fields.group(self.group), shape[0], {"time": shape[1], "candidates": self.k})
        columns = {name: values.reshape(-1, *values.shape[2:]) for name, values in batch.items()}
        base = 0
        for part, size in zip(self.parts, self.sizes, strict=True):
            here = np.flatnonzero((address >= base) & (address < base + size))
            if part is not None and len(here) and len(part.pieces.at):
                row = np.minimum(np.searchsorted(part.pieces.at, address[here] - base), len(part.pieces.at) - 1)
                there = part.pieces.at[row] == address[here] - base
                for name, values in zip(columns, part.columns, strict=True):
                    columns[name][at[here[there]]] = values[row[there]]
            base += size
        return batch


def split(stores: Sequence[Store], start: np.ndarray, length: np.ndarray) -> list[tuple[np.ndarray, np.ndarray]]:
    """Segments by store: (first token in the store, length) of each, from addresses over all `stores`."""
    ends = np.cumsum([len(store.tokens) for store in stores])
    owner = np.searchsorted(ends, start, side="right")
    bases = ends - [len(store.tokens) for store in stores]
    return [(start[owner == i] - bases[i], length[owner == i]) for i in range(len(stores))]


def pieces(store: Store, start: np.ndarray, length: np.ndarray, on: str) -> Pieces:
    """What to annotate: all tokens but the last of each segment, or with `on` = "supervised" those before a token that
    is to be predicted."""
    segments = np.unique(np.stack([start, length], axis=1), axis=0)
    start, length = segments[:, 0], segments[:, 1] - 1
    first = np.cumsum(length) - length
    at = np.repeat(start - first, length) + np.arange(length.sum())
    if on == "supervised" and store.mask is not None:
        at = at[store.mask[at + 1]]
    return Pieces(segments, np.unique(at))


def content(store: Store) -> str:
    """A name for a store's tokens, wherever they lie."""
    result = hashlib.blake2b(digest_size=16)
    for array in (store.tokens, store.length, *([] if store.mask is None else [store.mask])):
        result.update(array.dtype.str.encode())
        for i in range(0, len(array), 2**24):
            result.update(np.ascontiguousarray(array[i : i + 2**24]).tobytes())
    return result.hexdigest()


def layout(n: int, k: int, vocab_size: int) -> dict[str, tuple[Any, tuple[int, ...]]]:
    """Files of a store's annotations: name -> (dtype, shape). `k` is 0 of a reference's."""
    if not k:
        return {"log_prob": (np.dtype("<f4"), (n,))}
    return {
        "ids": (np.dtype("<u2" if vocab_size <= 2**16 else "<u4"), (n, k)),
        "log_probs": (np.dtype("<f4"), (n, k)),
        "rest": (np.dtype("<f4"), (n,)),
    }


def damaged(path: Path, fault: str) -> InputError:
    """The error for a file of annotations that isn't what was written."""
    return InputError(
        f"data.annotations: {path} {fault}: it is damaged. Put it back from a copy, or make new annotations with "
        "understudy annotate and another --output."
    )


def read_sealed(path: Path, *default: Any) -> dict[str, Any]:
    """Reads a JSON object; raises InputError where it isn't what was written."""
    value = files.read_json(path, *default)
    if not digests.is_whole(value):
        raise damaged(path, "isn't what was written")
    return value


def read_meta(folder: str) -> dict[str, Any]:
    path = Path(folder) / META
    if not path.is_file():
        raise InputError(
            f"data.annotations = {folder!r}: holds no annotations. Make them: understudy annotate --config=... "
            f"--output={folder}"
        )
    return read_sealed(path)


def attach(
    folder: str, stores: Sequence[Store], start: np.ndarray, length: np.ndarray, settings: Mapping[str, Any]
) -> Annotations:
    """The annotations of the segments of some rows.

    Args:
      folder: of annotations.
      stores: whose tokens, one after the other, are addressed.
      start, length: [S] int64, address and length of each segment.
      settings: what decides the tokens and segments of this run, for the error where they differ.

    Raises:
      InputError: some of the segments aren't annotated; the message says which setting differs.
    """
    meta = read_meta(folder)
    by_content = {entry["content"]: entry for entry in meta["stores"]}
    parts: list[Part | None] = []
    for store, (first, n) in zip(stores, split(stores, start, length), strict=True):
        if not len(first):
            parts.append(None)
            continue
        entry = by_content.get(content(store))
        if entry is None:
            raise _mismatch(folder, meta, settings, "the tokens differ")
        part = _open(folder, entry, meta)
        pieces = part.pieces.segments
        # The piece of that first token, the longest where there are several.
        row = np.searchsorted(pieces[:, 0], first, side="right") - 1
        if not (len(pieces) and np.all((row >= 0) & (pieces[row, 0] == first) & (pieces[row, 1] >= n))):
            raise _mismatch(folder, meta, settings, "documents are cut into other pieces")
        parts.append(part)
    return Annotations(tuple(parts), tuple(len(store.tokens) for store in stores), meta["k"])


def _open(folder: str, entry: Mapping[str, Any], meta: Mapping[str, Any]) -> Part:
    path, n = Path(folder) / entry["folder"], entry["annotated"]
    progress = read_sealed(path / PROGRESS, {"done": 0})
    if progress["done"] < n:
        raise InputError(
            f"data.annotations = {folder!r}: is unfinished, {progress['done']:,} of {n:,} tokens of {entry['name']}. "
            "The command that began it goes on from there."
        )
    known = progress.get("files", {})
    arrays = [f"{name}.npy" for name in Pieces._fields]
    if fault := digests.first_fault(path, {name: known[name] for name in arrays if name in known}):
        raise damaged(path / fault.partition(" ")[0], fault.partition(" ")[2])
    columns = []
    for name, (dtype, shape) in layout(n, meta["k"], meta["vocab_size"]).items():
        file = path / f"{name}.bin"
        columns.append(digests.mapped(file, dtype, shape, known.get(file.name), functools.partial(damaged, file)))
    try:
        pieces = Pieces(np.load(path / arrays[0]), np.load(path / arrays[1], mmap_mode="r"))
    except (OSError, ValueError) as error:
        raise damaged(path / arrays[0], f"can't be read ({error})") from error
    return Part(pieces, tuple(columns))


def _mismatch(folder: str, meta: Mapping[str, Any], settings: Mapping[str, Any], what: str) -> InputError:
    before, now = meta["settings"], json.loads(json.dumps(settings))
    for name in (*now, *(n for n in before if n not in now)):
        if before.get(name) != now.get(name):
            return InputError(
                f"data.annotations = {folder!r}: was made with {name} = {before.get(name)!r}, and this run has "
                f"{now.get(name)!r}: {what}. {_REMEDY}"
            )
    names = now.get("data.sources") or now["data.path"]
    return InputError(
        f"data.annotations = {folder!r}: was made of other data under the same names, {names!r}: {what}. "
        "Make new annotations with understudy annotate."
    )


def check(folder: str, term: str, wanted: Mapping[str, Any]) -> None:
    """Raises InputError where annotations were made with other options than a term of the objective asks for; `term` is
    the config's section of its options."""
    if not wanted:
        return
    if not folder:
        raise InputError(
            f"{term}.cached = True: reads annotations. Name their folder in data.annotations; understudy annotate "
            "makes it."
        )
    meta, wanted = read_meta(folder), dict(wanted)
    kind, kind_wanted = meta.get("kind", TEACHER), wanted.pop("kind", TEACHER)
    if kind != kind_wanted:
        flag = "--reference" if kind_wanted == REFERENCE else "--teacher=MODEL"
        raise InputError(
            f"data.annotations = {folder!r}: holds {_CONTENT[kind]}, and {term} reads {_CONTENT[kind_wanted]}. Make "
            f"them: understudy annotate {flag}."
        )
    for name, value in wanted.items():
        if meta[name] != value:
            raise InputError(
                f"data.annotations = {folder!r}: was made with --{name}={meta[name]}, and {term} asks for "
                f"{name} = {value}. Change the one, or make new annotations with understudy annotate."
            )
