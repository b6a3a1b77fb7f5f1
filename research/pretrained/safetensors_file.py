"""Tensors of safetensors files by name, one at a time; a model's lie in one file or in several."""

import functools
import json
import math
import struct
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np
import safetensors

from research import files
from research.errors import InputError

_DTYPES = {
    "F64": np.dtype("<f8"),
    "F32": np.dtype("<f4"),
    "F16": np.dtype("<f2"),
    "BF16": np.dtype(ml_dtypes.bfloat16),
}
_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
_MOST_HEADER = 100_000_000  # bytes, as in the library


class Entry(NamedTuple):
    """A tensor in a file.

    Attributes:
      shape: its dimensions.
      dtype: as stored; of a quantised tensor, as `read` gives it.
      position: (file, byte): to read tensors in the order in which they lie on the disk.
      read: () -> the array. It maps the file anew, so that its pages are given back with the array.
    """

    shape: tuple[int, ...]
    dtype: np.dtype
    position: tuple[str, int]
    read: Callable[[], np.ndarray]


def open_safetensors(folder: Path) -> dict[str, Entry]:
    """Name -> entry, of all tensors of a folder.

    Raises:
      InputError: there is no safetensors file, a shard is missing, or a file is cut short or damaged.
    """
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        return _indexed(index)
    entries: dict[str, Entry] = {}
    for file in _safetensors_files(folder):
        of_file = open_file(file)
        if twice := entries.keys() & of_file.keys():
            raise InputError(
                f"{folder}: the tensor {min(twice)!r} is in several files, {file.name} among them, and no {index.name} "
                "says which counts. Remove the files that don't belong to the model."
            )
        entries |= of_file
    return entries


def open_file(file: Path) -> dict[str, Entry]:
    """Name -> entry, of all tensors of a safetensors file (https://github.com/huggingface/safetensors#format).

    What the library refuses is refused: offsets that overlap or leave holes, a name twice, bytes of no tensor.

    Raises:
      InputError: there is no such file, or it is cut short or damaged.
    """
    if not file.is_file():
        raise InputError(f"{file}: there is no such file. Copy it, as safetensors.")
    start, infos = _read_header(file)
    entries = {}
    for name, (kind, shape, first, last) in infos.items():
        if kind not in _DTYPES:
            raise InputError(
                f"{file}: tensor {name!r:.80} is of dtype {kind!s:.40}, and only {', '.join(_DTYPES)} are read. Take a "
                "copy of the model that isn't quantised."
            )
        dtype = _DTYPES[kind]
        if last - first != dtype.itemsize * math.prod(shape):
            raise InputError(f"{file}: tensor {name!r:.80}: its bytes aren't those of {kind} {shape}. Copy it anew.")
        read = functools.partial(_read, file, dtype, start + first, tuple(shape))
        entries[name] = Entry(tuple(shape), dtype, (file.name, start + first), read)
    try:
        with safetensors.safe_open(file, framework="np"):
            pass
    except Exception as error:  # the library has its own class for some faults, and the system's for others
        raise InputError(f"{file}: is no valid safetensors file ({error}). Copy it anew.") from error
    return entries


def _read_header(file: Path) -> tuple[int, dict[str, tuple[str, list[int], int, int]]]:
    """Where a file's tensors begin; and of each its dtype, shape, and its first byte and the one after the last."""
    size = file.stat().st_size
    with open(file, "rb") as f:
        head = f.read(8)
        length = struct.unpack("<Q", head)[0] if len(head) == 8 else 0
        if not 0 < length <= min(size - 8, _MOST_HEADER):
            raise InputError(f"{file}: is no safetensors file, or is cut short ({size:,} bytes). Copy it anew.")
        text = f.read(length)
    try:
        header = json.loads(text, object_pairs_hook=files.unique_names)
        header.pop("__metadata__", None)
        infos = {name: _read_info(info) for name, info in header.items()}
    except (ArithmeticError, LookupError, TypeError, ValueError, AttributeError, RecursionError) as error:
        raise InputError(f"{file}: its header is damaged ({error!r:.200}). Copy it anew.") from error
    end = 8 + length + max((last for _, _, _, last in infos.values()), default=0)
    if size < end:
        raise InputError(f"{file}: is cut short: {size:,} bytes, and its header speaks of {end:,}. Copy it anew.")
    return 8 + length, infos


def _read_info(info: Any) -> tuple[str, list[int], int, int]:
    """What a header says of a tensor. Raises ValueError, or what comes of other types, where it is something else."""
    kind, shape, (first, last) = info["dtype"], info["shape"], info["data_offsets"]
    whole = isinstance(shape, list) and all(type(n) is int and 0 <= n < 2**48 for n in (*shape, first, last))
    if not whole or not isinstance(kind, str):
        raise ValueError(f"a tensor of {kind!r} {shape!r} at {first!r}")
    return kind, shape, first, last


def _read(file: Path, dtype: np.dtype, start: int, shape: tuple[int, ...]) -> np.ndarray:
    if not shape or not math.prod(shape):
        return np.fromfile(file, dtype, math.prod(shape), offset=start).reshape(shape)
    return np.memmap(file, dtype, "r", start, shape)


def _indexed(index: Path) -> dict[str, Entry]:
    """The tensors of the files that an index names, each from the file that it says."""
    names = _weight_map(index)
    entries: dict[str, Entry] = {}
    for shard in sorted(set(names.values())):
        file = index.parent / shard
        if not file.is_file():
            lost = sum(name == shard for name in names.values())
            raise InputError(f"{file}: this shard, of {lost} tensors, is missing. {index.name} names it: copy it too.")
        of_file = open_file(file)
        lost = next((name for name, where in names.items() if where == shard and name not in of_file), None)
        if lost is not None:
            raise InputError(f"{file}: lacks the tensor {lost!r}, which {index.name} says is there. Copy both anew.")
        entries |= {name: entry for name, entry in of_file.items() if names.get(name, shard) == shard}
    return entries


def _weight_map(index: Path) -> Mapping[str, str]:
    """Tensor -> the name of its file, which lies beside the index."""
    names = files.read_json(index, remedy="Copy it anew.").get("weight_map")
    if not names:
        raise InputError(f"{index}: lacks the field 'weight_map'. Copy it anew.")
    if not isinstance(names, dict) or not all(isinstance(name, str) for name in names.values()):
        raise InputError(f"{index}: weight_map isn't an object of tensors and the names of their files. Copy it anew.")
    for tensor, name in names.items():
        if Path(name).name != name or not name.endswith(".safetensors"):
            raise InputError(
                f"{index}: weight_map: {tensor!r} is in {name!r}, which isn't the name of a .safetensors file beside "
                "the index. Nothing else is opened: copy the model anew."
            )
    return names


def _safetensors_files(folder: Path) -> list[Path]:
    """All .safetensors files of a folder that has no index."""
    shards = sorted(folder.glob("*.safetensors"))
    if shards:
        return shards
    pickles = sorted(p.name for p in folder.iterdir() if p.suffix in _PICKLES)
    if pickles:
        raise InputError(
            f"{folder}: holds its weights as pickle ({pickles[0]}), which can run any code when read, and is refused. "
            "Take a copy in safetensors, or convert it with transformers' save_pretrained."
        )
    raise InputError(f"{folder}: holds no .safetensors file.")
