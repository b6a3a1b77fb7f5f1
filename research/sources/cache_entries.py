"""What lies in the cache: tokens of data, trained tokenizers and compiled programs. All of it is made anew at need."""

import dataclasses
import json
import os
import re
import shutil
import time
import uuid
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from research.sources.cache import MANIFEST, fault

FOLDERS = ("tokens", "tokenizers")  # of entries that are folders with a manifest
PROGRAMS = "xla"  # of entries that are files, which JAX names
KINDS = (*FOLDERS, PROGRAMS)
_PROGRAM = re.compile(r"(.+)-(cache|atime)")
_DAY = 24 * 3600


@dataclasses.dataclass(frozen=True)
class CacheEntry:
    """Something that was made once and is kept.

    Attributes:
      kind: of KINDS.
      paths: the folder, or the files of a compiled program.
      size: bytes.
      used: when it was made or read last, in seconds since 1970.
      about: what it was made of, where it says so.
    """

    kind: str
    paths: tuple[Path, ...]
    size: int
    used: float
    about: str = ""

    @property
    def days(self) -> float:
        """Since it was used last."""
        return max(time.time() - self.used, 0) / _DAY

    @property
    def fault(self) -> str:
        """What is wrong with its files, all of which are read; "" if nothing. Compiled programs have no digests."""
        return fault(self.paths[0]) if self.kind in FOLDERS else ""

    def remove(self) -> None:
        """Removes it. A folder gets another name first, so that no process sees half of it as whole."""
        for path in self.paths:
            if path.is_dir() and not path.is_symlink():
                gone = path.with_name(f".making-{uuid.uuid4().hex}")
                os.rename(path, gone)
                shutil.rmtree(gone, ignore_errors=True)
            else:
                path.unlink(missing_ok=True)


def read_entries(root: Path, kinds: Sequence[str] = KINDS) -> list[CacheEntry]:
    """The entries of these kinds below a cache's folder, those that were used last in front. What is none isn't listed:
    half-made folders, which the next to make one removes after a day, and files of other programs."""
    entries = [entry for kind in kinds for entry in _of_kind(kind, root / kind)]
    return sorted(entries, key=lambda entry: -entry.used)


def unused(entries: Iterable[CacheEntry], days: float) -> list[CacheEntry]:
    """Those that nobody used for so many days."""
    return [entry for entry in entries if entry.days >= days]


def _of_kind(kind: str, folder: Path) -> Iterator[CacheEntry]:
    if not folder.is_dir():
        return
    if kind in FOLDERS:
        for path in folder.iterdir():
            if (path / MANIFEST).is_file() or (path / "meta.json").is_file():  # without a manifest: was found damaged
                stats = _stats(path.iterdir())
                used = max((each.st_mtime for each in stats), default=0)  # `cached` gives the manifest a new time
                yield CacheEntry(kind, (path,), sum(each.st_size for each in stats), used, _about(path))
        return
    programs: dict[str, list[Path]] = {}
    for path in folder.iterdir():
        if match := _PROGRAM.fullmatch(path.name):
            programs.setdefault(match[1], []).append(path)
    for name, paths in programs.items():
        stats = _stats(paths)
        used = max((max(each.st_mtime, each.st_atime) for each in stats), default=0)
        yield CacheEntry(kind, tuple(paths), sum(each.st_size for each in stats), used, name.rpartition("-")[0])


def _stats(paths: Iterable[Path]) -> list[os.stat_result]:
    """Those of files; one that another process has just removed isn't counted."""
    stats = []
    for path in paths:
        try:
            stats.append(path.stat())
        except OSError:
            continue
    return stats


def _about(folder: Path) -> str:
    """What an entry's tokens are of; "" where it doesn't say."""
    try:
        about = json.loads((folder / "meta.json").read_text(encoding="utf-8")).get("of", "")
    except (OSError, ValueError, AttributeError, RecursionError):
        return ""
    return about if isinstance(about, str) else ""
