"""A version of the weights in a folder: safetensors, a manifest of them, and the mark that it is whole.

manifest.json has `version`, and `tensors`: name -> {file, dtype, shape, digest}. COMMIT is written last and holds the
digest of manifest.json. Digests are BLAKE2b of 16 bytes, in hexadecimal. Nothing here needs torch.
"""

import hashlib
import json
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

MANIFEST, COMMIT = "manifest.json", "COMMIT"
_PIECE = 1 << 24  # bytes that are read at once


def check(folder: Path) -> dict[str, Any]:
    """The manifest of a version whose files are as it says.

    Raises:
      ValueError: the version isn't whole, or a tensor isn't what was written.
    """
    folder = Path(folder)
    try:
        mark, text = (folder / COMMIT).read_text().strip(), (folder / MANIFEST).read_bytes()
    except OSError as error:
        raise ValueError(f"{folder}: isn't there, or isn't complete ({error.strerror}: {error.filename})") from error
    if mark != digest([text]):
        raise ValueError(f"{folder}/{MANIFEST}: isn't the one that was committed")
    manifest = json.loads(text)
    entries = manifest["tensors"]
    seen = {}
    for file in sorted({entry["file"] for entry in entries.values()}):
        seen |= {name: {"file": file, **entry} for name, entry in describe(folder / file).items()}
    for name in sorted(entries.keys() | seen.keys()):
        if entries.get(name) != seen.get(name):
            raise ValueError(f"{folder}: the tensor {name} isn't the one that was written")
    return manifest


def describe(file: Path) -> dict[str, dict[str, Any]]:
    """Of each tensor in a file of safetensors its dtype, shape and digest.

    Raises:
      ValueError: the file can't be read, or ends too early.
    """
    try:
        with open(file, "rb") as opened:
            header, start = _header(opened)
            entries = {}
            for name, entry in header.items():
                first, stop = entry["data_offsets"]
                opened.seek(start + first)
                entries[name] = {
                    "dtype": entry["dtype"],
                    "shape": entry["shape"],
                    "digest": digest(_pieces(opened, stop - first)),
                }
            return entries
    except (OSError, ValueError, KeyError, struct.error) as error:
        raise ValueError(f"{file}: can't be read ({error})") from error


def shapes(file: Path) -> dict[str, list[int]]:
    """Of each tensor in a file of safetensors its shape."""
    with open(file, "rb") as opened:
        return {name: entry["shape"] for name, entry in _header(opened)[0].items()}


def check_like(manifest: dict[str, Any], served: Path) -> None:
    """Refuses a version of another model than the one in the folder that a server was started with.

    A head is passed over where one of the two has none: it is tied to the embedding.

    Raises:
      ValueError: a tensor is missing, is one too many, or has another shape.
    """
    known: dict[str, list[int]] = {}
    for file in sorted(Path(served).glob("*.safetensors")):
        known |= shapes(file)
    new = {name: entry["shape"] for name, entry in manifest["tensors"].items()}
    for name in sorted(known.keys() | new.keys()) if known else ():
        if name in known and name in new:
            if known[name] != new[name]:
                raise ValueError(f"{name} has the shape {new[name]}, and {known[name]} in {served}, which is served")
        elif name != "lm_head.weight" and not name.endswith(".inv_freq"):
            where = "the version" if name in known else served
            raise ValueError(f"{name}: isn't in {where}: the server has another model than the run")


def digest(pieces: Iterator[bytes] | list[bytes]) -> str:
    """Of bytes."""
    result = hashlib.blake2b(digest_size=16)
    for piece in pieces:
        result.update(piece)
    return result.hexdigest()


def _header(opened: Any) -> tuple[dict[str, Any], int]:
    """The header of a file of safetensors, and where its data begin."""
    (size,) = struct.unpack("<Q", opened.read(8))
    header = json.loads(opened.read(size))
    header.pop("__metadata__", None)
    return header, 8 + size


def _pieces(opened: Any, size: int) -> Iterator[bytes]:
    while size > 0:
        piece = opened.read(min(size, _PIECE))
        if not piece:
            raise ValueError("it ends too early")
        size -= len(piece)
        yield piece
