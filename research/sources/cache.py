"""Folders that are made once: whole or absent, whoever dies or races while they are made."""

import contextlib
import hashlib
import json
import os
import shutil
import time
import uuid
from collections.abc import Callable, Iterable
from pathlib import Path

from research.errors import InputError

MANIFEST = "manifest.json"
_STALE_SECONDS = 24 * 3600


def cached(folder: Path, build: Callable[[Path], None]) -> bool:
    """Makes `folder` by calling `build(temporary folder)`, unless it is there and whole.

    The temporary folder is renamed when it is complete, so that a killed process leaves no half-made
    `folder`; a folder with a file missing or of another size than when it was made is made again. Of
    processes that race, one wins.

    Returns:
      True if `folder` was there already.

    Raises:
      InputError: the cache's place can't be written to.
    """
    if _whole(folder):
        _note_use(folder)
        return True
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        _remove_stale(folder.parent)
        partial = _new_folder(folder.parent)
    except OSError as e:
        raise InputError(
            f"data.cache_dir: {str(folder.parent)!r} can't be written to ({e.strerror}). "
            f"Set data.cache_dir or $UNDERSTUDY_CACHE to a folder that can."
        ) from e
    try:
        build(partial)
        sizes = {path.name: path.stat().st_size for path in partial.iterdir()}
        (partial / MANIFEST).write_text(json.dumps(sizes))
        _publish(partial, folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return False


def digest(parts: Iterable[object]) -> str:
    """Returns a hash of the parts' text, in order: a name for what was made from them."""
    result = hashlib.sha256()
    for part in parts:
        data = str(part).encode()
        result.update(len(data).to_bytes(8, "little") + data)
    return result.hexdigest()[:24]


def code_digest(*files: str) -> str:
    """Returns a hash of source files, so that what other code made is made again."""
    return digest(Path(file).read_text(encoding="utf-8") for file in files)


def _new_folder(parent: Path) -> Path:
    folder = parent / f".making-{uuid.uuid4().hex}"
    folder.mkdir()
    return folder


def _whole(folder: Path) -> bool:
    try:
        sizes = json.loads((folder / MANIFEST).read_text())
        return all((folder / name).stat().st_size == size for name, size in sizes.items())
    except (OSError, ValueError):
        return False


def _note_use(folder: Path) -> None:
    """Gives the manifest the time of now, so that `understudy cache` knows what is still used."""
    with contextlib.suppress(OSError):  # a cache that others own is read all the same
        os.utime(folder / MANIFEST)


def _publish(partial: Path, folder: Path) -> None:
    """Renames `partial` to `folder`. A broken folder there goes; a whole one, by a faster process, stays."""
    for path in partial.iterdir():
        with open(path, "rb") as file:
            os.fsync(file.fileno())
    while not _whole(folder):
        try:
            os.rename(partial, folder)
        except OSError:
            if not folder.exists():
                raise
            broken = _new_folder(folder.parent)
            try:
                os.rename(folder, broken / "broken")
            except FileNotFoundError:
                pass  # another process moved it first
            finally:
                shutil.rmtree(broken, ignore_errors=True)


def _remove_stale(parent: Path) -> None:
    """Removes what killed processes left half-made."""
    for path in parent.glob(".making-*"):
        if time.time() - path.stat().st_mtime > _STALE_SECONDS:
            shutil.rmtree(path, ignore_errors=True)
