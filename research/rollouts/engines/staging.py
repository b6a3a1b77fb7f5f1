"""Versions of the policy's weights in a folder that the run and its servers see, each whole or absent.

A version is FOLDER/VERSION-DIGEST: files of safetensors with what describes them, manifest.json (`version`, and
`tensors`: name -> {file, dtype, shape, digest}), and COMMIT, written last, which holds the digest of manifest.json.
Digests are BLAKE2b of 16 bytes, in hexadecimal. launch/vllm_plugin reads it, and imports nothing from here.
"""

import hashlib
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np

from research import files
from research.pretrained import safetensors_file

MANIFEST, COMMIT = "manifest.json", "COMMIT"
_WRITING = ".writing"
_NAME = re.compile(r"(\d+)-([0-9a-f]{12})")
_DTYPES = {"float64": "F64", "float32": "F32", "float16": "F16", "bfloat16": "BF16"}


class Staging:
    """The versions in a folder.

    Args:
      folder: made where it isn't there.
      kept: how many versions stay: at least the newest, and the one that servers answer with until they have it.
    """

    def __init__(self, folder: Path, kept: int = 2):
        self.folder, self._kept = Path(folder).absolute(), kept

    def put(self, version: int, write: Callable[[Path], None]) -> Path:
        """The folder of a version, in which `write` has written files of safetensors. The oldest versions are removed.

        A version whose tensors are there already, as after a restart of the run, is taken as it is.

        Args:
          version: its number.
          write: is called with a folder that doesn't exist yet, and makes it.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        writing = self.folder / _WRITING
        shutil.rmtree(writing, ignore_errors=True)
        write(writing)
        tensors = describe(writing)
        files.write_json(writing / MANIFEST, {"version": version, "tensors": tensors})
        files.write_text(writing / COMMIT, digest((writing / MANIFEST).read_bytes()) + "\n")
        path = self.folder / f"{version}-{digest(json.dumps(tensors, sort_keys=True).encode())[:12]}"
        if path.exists():
            shutil.rmtree(writing)
        else:
            writing.rename(path)
        path.touch()
        for old in sorted(self._whole(), key=lambda each: each.stat().st_mtime_ns)[: -self._kept]:
            shutil.rmtree(old)
        return path

    def path(self, version: int) -> Path:
        """The folder of a version, the last one that was written where there are several.

        Raises:
          KeyError: it isn't there.
        """
        paths = [path for path in self._whole() if path.name.startswith(f"{version}-")]
        if not paths:
            raise KeyError(f"{self.folder}: version {version} isn't there")
        return max(paths, key=lambda path: path.stat().st_mtime_ns)

    def version(self, stamp: str) -> int | None:
        """The version that a folder's name stands for; None where it isn't one of this folder."""
        match = _NAME.fullmatch(stamp)
        return int(match[1]) if match and (self.folder / stamp).is_dir() else None

    def _whole(self) -> list[Path]:
        return [path for path in self.folder.iterdir() if _NAME.fullmatch(path.name)]


def describe(folder: Path) -> dict[str, dict[str, object]]:
    """Of each tensor in a folder the file, dtype, shape and digest, as read back from the disk.

    Raises:
      InputError: a file is cut short.
    """
    return {
        name: {
            "file": file.name,
            "dtype": _DTYPES[entry.dtype.name],
            "shape": list(entry.shape),
            "digest": digest(np.ascontiguousarray(entry.read()).view(np.uint8)),
        }
        for file in sorted(folder.glob("*.safetensors"))
        for name, entry in safetensors_file.open_file(file).items()
    }


def digest(data: bytes | np.ndarray) -> str:
    """Of bytes."""
    return hashlib.blake2b(data, digest_size=16).hexdigest()
