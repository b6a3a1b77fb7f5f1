"""What a .gguf file says of itself (https://github.com/ggml-org/ggml/blob/master/docs/gguf.md)."""

import struct
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from research.errors import InputError

_NUMBERS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9


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

    Raises:
      InputError: it is no GGUF file of version 2 or 3, or is cut short.
    """
    try:
        with open(path, "rb") as file:
            magic, version, tensors, count = _numbers(file, "4sIQQ")
            if magic != b"GGUF" or version not in (2, 3):
                raise InputError(f"{path}: is no little-endian GGUF file of version 2 or 3. Convert the model anew.")
            metadata = {_string(file): _value(file, *_numbers(file, "I")) for _ in range(count)}
            infos = [_tensor(file) for _ in range(tensors)]
            unit = metadata.get("general.alignment", 32)
            data = -(-file.tell() // unit) * unit
            return Header(metadata, {name: Stored(shape, type, data + start) for name, shape, type, start in infos})
    except (OSError, EOFError, KeyError, UnicodeDecodeError, OverflowError, MemoryError) as e:
        raise InputError(f"{path}: its metadata can't be read ({type(e).__name__}: {e}). Copy the file anew.") from e


def _tensor(file: BinaryIO) -> tuple[str, tuple[int, ...], int, int]:
    name, (rank,) = _string(file), _numbers(file, "I")
    *sizes, type, start = _numbers(file, f"{rank}QIQ")
    return name, tuple(reversed(sizes)), type, start


def _value(file: BinaryIO, kind: int) -> Any:
    if kind == _STRING:
        return _string(file)
    if kind != _ARRAY:
        return _numbers(file, _NUMBERS[kind])[0]
    kind, length = _numbers(file, "IQ")
    if kind in _NUMBERS:
        return list(_numbers(file, f"{length}{_NUMBERS[kind]}"))
    return [_value(file, kind) for _ in range(length)]


def _string(file: BinaryIO) -> str:
    return _bytes(file, *_numbers(file, "Q")).decode()


def _numbers(file: BinaryIO, form: str) -> tuple[Any, ...]:
    return struct.unpack(f"<{form}", _bytes(file, struct.calcsize(f"<{form}")))


def _bytes(file: BinaryIO, size: int) -> bytes:
    data = file.read(size)
    if len(data) < size:
        raise EOFError("it ends too soon")
    return data
