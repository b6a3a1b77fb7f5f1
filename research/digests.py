"""Digests of what is on disk, so that damage is noticed where a file is read, and by its name.

A file has one for each of its blocks: XXH3 of 64 bits, by the library xxhash, as fast as the file can be read. It is no
signature. What was written before there were digests has none, and is read as it is; of what had those of another kind,
the sizes are compared.
"""

import concurrent.futures
import json
import os
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import xxhash

BLOCK = 2**18  # bytes; more would leave the processor's cache between being read and being looked at
SEAL = "digest"  # the field of a JSON object that has the digest of the others
_KIND = "xxh3_64"  # the field of an entry that has the digests of the blocks
_HEX = 16  # digits of a block's
_TASK = 2**25  # bytes that a thread checks at once
_THREADS = max(1, min(8, (os.cpu_count() or 1) // 2))  # the other half is for what reads the files meanwhile

Entry = Mapping[str, Any]  # of a file: {"size": bytes, "xxh3_64": the digests of its blocks, one after the other}


def of_files(folder: Path, names: Iterable[str]) -> dict[str, dict[str, Any]]:
    """Name -> entry of files below a folder."""
    sizes = {name: (folder / name).stat().st_size for name in names}
    parts: dict[str, list[str]] = {name: [] for name in sizes}
    with concurrent.futures.ThreadPoolExecutor(_THREADS) as pool:
        ranges = [(name, start, stop) for name, size in sizes.items() for start, stop in _tasks(size)]
        for (name, _, _), part in zip(
            ranges, pool.map(lambda r: _of_range(folder / r[0], *r[1:]), ranges), strict=True
        ):
            parts[name].append(part)
    return {name: {"size": sizes[name], _KIND: "".join(parts[name])} for name in sizes}


def of_folder(folder: Path, without: Iterable[str] = ()) -> dict[str, dict[str, Any]]:
    """Name -> entry of all files in a folder and below it, but for those of some names."""
    names = (str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())
    return of_files(folder, sorted(set(names) - set(without)))


def first_fault(folder: Path, entries: Mapping[str, Entry]) -> str:
    """What is wrong with the files of a folder: the first that is gone, has another size or other bytes; "" if none."""
    for name, entry in entries.items():
        if fault := _fault_of_size(folder / name, entry["size"]):
            return f"{name} {fault}"
    known = {name: entry for name, entry in entries.items() if _KIND in entry}
    ranges = [(name, start, stop) for name, entry in known.items() for start, stop in _tasks(entry["size"])]

    def check(task: tuple[str, int, int]) -> str:
        name, start, stop = task
        first, last = start // BLOCK * _HEX, -(-stop // BLOCK) * _HEX
        wanted = entries[name][_KIND][first:last]
        there = _of_range(folder / name, start, stop)
        if there == wanted:
            return ""
        block = next((i for i in range(0, len(wanted), _HEX) if there[i : i + _HEX] != wanted[i : i + _HEX]), 0)
        at = start + block // _HEX * BLOCK
        return f"{name} {other_bytes(at, entries[name]['size'])}"

    with concurrent.futures.ThreadPoolExecutor(_THREADS) as pool:
        return next(filter(None, pool.map(check, ranges)), "")


def other_bytes(start: int, size: int) -> str:
    """Says which bytes of a file of `size` aren't what was written, of the block that begins at `start`."""
    return f"has other bytes than were written, between {start:,} and {min(start + BLOCK, size):,}"


def _fault_of_size(path: Path, size: int) -> str:
    try:
        there = path.stat().st_size
    except OSError as error:
        return f"can't be read ({error.strerror})"
    return "" if there == size else f"has {there:,} bytes, and had {size:,}"


def _tasks(size: int) -> Iterator[tuple[int, int]]:
    return ((start, min(start + _TASK, size)) for start in range(0, size, _TASK))


def _of_range(path: Path, start: int, stop: int) -> str:
    """The digests of the blocks of a file from `start`, which begins one, to `stop`; fewer where it is shorter."""
    buffer, parts = memoryview(bytearray(min(BLOCK, stop - start))), []
    with open(path, "rb", buffering=0) as file:
        file.seek(start)
        for at in range(start, stop, BLOCK):
            wanted, got = min(BLOCK, stop - at), 0
            while got < wanted and (n := file.readinto(buffer[got:wanted])):
                got += n
            parts += [xxhash.xxh3_64_hexdigest(buffer[:got])] if got else []
    return "".join(parts)


class Checked:
    """An array mapped from a file, whose blocks are checked when they are first read; by its methods, all of them.

    Args:
      array: [N, ...], of np.memmap.
      entry: of its file.
      damaged: (what is wrong) -> the error to raise.
    """

    def __init__(self, array: np.ndarray, entry: Entry, damaged: Callable[[str], Exception]):
        self._array, self._damaged, self._size = array, damaged, entry["size"]
        self._bytes = array.reshape(-1).view(np.uint8) if array.size else np.zeros(0, np.uint8)
        self._row = self._bytes.size // max(len(array), 1)  # bytes of a row
        self._wanted = np.frombuffer(bytes.fromhex(entry[_KIND]), ">u8")
        self._left = np.ones(len(self._wanted), bool)  # blocks that haven't been read

    dtype = property(lambda self: self._array.dtype)
    shape = property(lambda self: self._array.shape)
    ndim = property(lambda self: self._array.ndim)
    size = property(lambda self: self._array.size)
    nbytes = property(lambda self: self._array.nbytes)

    def __len__(self) -> int:
        return len(self._array)

    def __getitem__(self, index: Any) -> np.ndarray:
        if self._left.any():
            self._check(index)
        return self._array[index]

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        return np.array(self[:], dtype) if copy else np.asarray(self[:], dtype)

    def __getattr__(self, name: str) -> Any:
        return getattr(self[:], name)

    def _check(self, index: Any) -> None:
        rows = np.asarray(index[0] if isinstance(index, tuple) else index) if not isinstance(index, slice) else index
        if isinstance(rows, slice):
            start, stop, step = rows.indices(len(self))
            start, stop = (start, stop) if step > 0 else (stop + 1, start + 1)
            blocks = np.arange(start * self._row // BLOCK, -(-stop * self._row // BLOCK) if stop > start else 0)
        else:
            rows = np.flatnonzero(rows) if rows.dtype == bool else np.where(rows < 0, rows + len(self), rows).ravel()
            first = rows * self._row
            blocks = np.concatenate([first // BLOCK, (first + self._row - 1) // BLOCK])
        for block in np.unique(blocks[self._left[blocks]]).tolist():
            start = block * BLOCK
            if xxhash.xxh3_64_intdigest(self._bytes[start : start + BLOCK]) != self._wanted[block]:
                raise self._damaged(other_bytes(start, self._size))
            self._left[block] = False


def mapped(
    path: Path, dtype: Any, shape: tuple[int, ...] | None, entry: Entry | None, damaged: Callable[[str], Exception]
) -> Any:
    """Maps an array from a file, with its blocks checked when they are first read.

    Args:
      path: of the file.
      dtype: of the array.
      shape: of the array; None for one axis of as many as there are.
      entry: of the file; None of one from before there were digests.
      damaged: (what is wrong) -> the error to raise.

    Raises:
      what `damaged` gives: the file is gone or has another size.
    """
    dtype = np.dtype(dtype)
    size = None if shape is None else dtype.itemsize * int(np.prod(shape, dtype=np.int64))
    if fault := _fault_of_size(path, entry["size"] if entry else path.stat().st_size if size is None else size):
        raise damaged(fault)
    if size is not None and entry is not None and entry["size"] != size:
        raise damaged(f"has {entry['size']:,} bytes, and should have {size:,}")
    if not path.stat().st_size:  # nothing that could be mapped
        return np.zeros(shape or (0,), dtype)
    array = np.memmap(path, dtype, "r", shape=shape)
    return Checked(array, entry, damaged) if entry and _KIND in entry else array


def seal(value: Mapping[str, Any]) -> dict[str, Any]:
    """A JSON object with the digest of its other fields; see `is_whole`."""
    rest = {name: each for name, each in json.loads(json.dumps(value)).items() if name != SEAL}
    return {**rest, SEAL: of_json(rest)}


def is_whole(value: Mapping[str, Any]) -> bool:
    """Whether a JSON object is what was sealed; True of one without a seal."""
    return SEAL not in value or value[SEAL] == of_json({name: each for name, each in value.items() if name != SEAL})


def of_json(value: Any) -> str:
    """A digest of a value of JSON's types, whatever the order of its fields."""
    return f"{zlib.crc32(json.dumps(value, sort_keys=True).encode()):08x}"
