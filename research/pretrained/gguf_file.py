"""What a .gguf file says of itself (https://github.com/ggml-org/ggml/blob/master/docs/gguf.md)."""

import math
import mmap
import struct
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

from research.errors import InputError

_NUMBERS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9
_MOST_AXES, _MOST_NESTED = 4, 8  # axes of a tensor, as in ggml; arrays in arrays


class Stored(NamedTuple):
    """A tensor of a file: its shape (rows first), the number of its type in ggml, and its first byte in the file."""

    shape: tuple[int, ...]
    type: int
    start: int


class Header(NamedTuple):
    """What a file says before its tensors: key -> number, text or list; and the tensors by name."""

    metadata: dict[str, Any]
    tensors: dict[str, Stored]


def read_header(path: str | Path) -> Header:
    """Reads all but the tensors. (The reader of the package gguf takes ten seconds for a vocabulary of 262 144.)

    Nothing is believed of how much follows: what a file can't hold, for its size, isn't made room for.

    Raises:
      InputError: it is no GGUF file of version 2 or 3, or is cut short or damaged.
    """
    try:
        with open(path, "rb") as file:
            magic = file.read(4)
            if len(magic) < 4:
                raise EOFError("it ends too soon")
            if magic != b"GGUF":
                raise InputError(f"{path}: is no little-endian GGUF file of version 2 or 3. Convert the model anew.")
            with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
                return _Reader(str(path), data).header()
    except (OSError, EOFError, KeyError, ValueError, OverflowError, MemoryError, RecursionError) as e:
        if isinstance(e, InputError):
            raise
        raise InputError(
            f"{path}: its metadata can't be read ({type(e).__name__}: {e!s:.200}). Copy the file anew."
        ) from e


class _Reader:
    """Reads a file's parts in turn. Raises EOFError where it ends, ValueError and KeyError where it is damaged.

    Args:
      path: for errors.
      data: the file.
    """

    def __init__(self, path: str, data: mmap.mmap):
        self.path, self._data, self._at = path, data, 4

    def header(self) -> Header:
        version, tensors, count = self._numbers("IQQ")
        if version not in (2, 3):
            raise InputError(f"{self.path}: is no little-endian GGUF file of version 2 or 3. Convert the model anew.")
        metadata = _named((self._string(), self._value(*self._numbers("I"))) for _ in self._times(count, 12))
        infos = [self._tensor() for _ in self._times(tensors, 24)]
        unit = metadata.get("general.alignment", 32)
        if isinstance(unit, bool) or not isinstance(unit, int) or unit < 8 or unit % 8:
            raise ValueError(f"general.alignment = {unit!r:.40} isn't a multiple of 8")
        first = -(-self._at // unit) * unit
        for name, _, start in infos:
            if start % unit or first + start > len(self._data):
                raise ValueError(f"tensor {name!r:.80} begins at {start:,}, where none can")
        return Header(metadata, _named((name, Stored(*rest, first + start)) for name, rest, start in infos))

    def _tensor(self) -> tuple[str, tuple[tuple[int, ...], int], int]:
        name, (rank,) = self._string(), self._numbers("I")
        if not 0 < rank <= _MOST_AXES:
            raise ValueError(f"tensor {name!r:.80} has {rank} axes")
        *sizes, kind, start = self._numbers(f"{rank}QIQ")
        if not 0 < math.prod(sizes) < 2**48:
            raise ValueError(f"tensor {name!r:.80} has the shape {sizes[::-1]}")
        return name, (tuple(reversed(sizes)), kind), start

    def _value(self, kind: int, depth: int = 0) -> Any:
        if kind == _STRING:
            return self._string()
        if kind != _ARRAY:
            return self._numbers(_NUMBERS[kind])[0]
        if depth == _MOST_NESTED:
            raise ValueError("arrays lie too deep in each other")
        kind, length = self._numbers("IQ")
        if kind in _NUMBERS:
            self._times(length, struct.calcsize(_NUMBERS[kind]))
            return list(self._numbers(f"{length}{_NUMBERS[kind]}"))
        return [self._value(kind, depth + 1) for _ in self._times(length, 8)]

    def _times(self, count: int, least: int) -> range:
        """`count`, of things that take at least so many bytes each."""
        if count * least > len(self._data) - self._at:
            raise EOFError(f"it speaks of {count:,} entries and ends too soon")
        return range(count)

    def _string(self) -> str:
        return self._bytes(*self._numbers("Q")).decode()

    def _numbers(self, form: str) -> tuple[Any, ...]:
        return struct.unpack(f"<{form}", self._bytes(struct.calcsize(f"<{form}")))

    def _bytes(self, size: int) -> bytes:
        if size > len(self._data) - self._at:
            raise EOFError("it ends too soon")
        start, self._at = self._at, self._at + size
        return self._data[start : self._at]


def _named(pairs: Iterable[tuple[str, Any]]) -> dict[str, Any]:
    """Values by name. Raises ValueError where a name is there twice."""
    values: dict[str, Any] = {}
    for name, value in pairs:
        if name in values:
            raise ValueError(f"{name!r:.80} is there twice")
        values[name] = value
    return values
