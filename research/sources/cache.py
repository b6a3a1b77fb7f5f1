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

from research import digests
from research.errors import InputError

MANIFEST = "manifest.json"  # name of a file -> its digests
_STALE_SECONDS = 24 * 3600


def cached(folder: Path, build: Callable[[Path], None], later: tuple[str, ...] = ()) -> bool:
    """Makes `folder` by calling `build(temporary folder)`, unless it is there and whole.

    The temporary folder is renamed when it is complete, so that a killed process leaves no half-made
    `folder`; one whose files aren't what they were when it was made is made again. Of processes that race, one wins.

    Args:
      folder: to be made.
      build: makes it.
      later: ends of the names of files of which the size alone is checked here: who reads them checks the rest
        (`entries`, digests.mapped).

    Returns:
      True if `folder` was there already.

    Raises:
      InputError: the cache's place can't be written to.
    """
    if not fault(folder, later):
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
        (partial / MANIFEST).write_text(json.dumps(digests.seal(digests.of_folder(partial))))
        _publish(partial, folder, later)
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


def fault(folder: Path, later: tuple[str, ...] = ()) -> str:
    """What is wrong with a folder that `cached` has made; "" if nothing. Of files whose names end with one of `later`
    the size alone is checked."""
    try:
        manifest = json.loads((folder / MANIFEST).read_text())
        if not digests.is_whole(manifest):
            return f"{MANIFEST} isn't what was written"
        own = {name: entry for name, entry in manifest.items() if name != digests.SEAL}
        for name in [name for name in own if name.endswith(later)] if later else ():
            if (folder / name).stat().st_size != own.pop(name)["size"]:
                return f"{name} has another size than was written"
        return digests.first_fault(folder, own)
    except OSError as error:
        return f"{MANIFEST} can't be read ({error.strerror})"
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        return f"{MANIFEST} isn't what was written"


def entries(folder: Path) -> dict[str, digests.Entry]:
    """Name of a file -> its digests, of a whole folder that `cached` has made."""
    return json.loads((folder / MANIFEST).read_text())


def damaged(path: Path, fault: str) -> InputError:
    """The error for a file whose digests were found to differ as it was read; its folder is made anew next time."""
    with contextlib.suppress(OSError):
        (path.parent / MANIFEST).unlink()
    return InputError(f"{path}: {fault}. It is a cache: the same command makes it anew.")


def _note_use(folder: Path) -> None:
    """Gives the manifest the time of now, so that `understudy cache` knows what is still used."""
    with contextlib.suppress(OSError):  # a cache that others own is read all the same
        os.utime(folder / MANIFEST)


def _publish(partial: Path, folder: Path, later: tuple[str, ...]) -> None:
    """Renames `partial` to `folder`. A broken folder there goes; a whole one, by a faster process, stays."""
    for path in partial.iterdir():
        with open(path, "rb") as file:
            os.fsync(file.fileno())
    while fault(folder, later):
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
