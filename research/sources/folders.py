"""The data files that a folder or a glob names: each real file once, of one kind, and how many of which kind."""

import fnmatch
import glob
import os
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from research.errors import InputError

SUFFIXES = (".jsonl", ".jsonl.gz", ".json", ".parquet", ".txt")
# Text and code, a document each. Beside data they are most often none, so that a folder leaves them out.
TEXTS = (".c", ".cc", ".cpp", ".cu", ".go", ".h", ".hpp", ".hs", ".html", ".java", ".jl", ".js", ".lua", ".md", ".ml")
TEXTS += (".php", ".pl", ".py", ".r", ".rb", ".rs", ".rst", ".scala", ".sh", ".sql", ".swift", ".tex", ".ts")
_KINDS = {".jsonl.gz": ".jsonl"}  # suffixes whose files hold the same as those of another


class Files(NamedTuple):
    """Data files, and what was left out beside them.

    Attributes:
      paths: of the files, in their order.
      left_out: suffix -> how many files of no known kind lie beside them.
    """

    paths: list[Path]
    left_out: Mapping[str, int]

    def summary(self) -> str:
        """Says what they are: "3 .jsonl files, left out: 2 .csv, 1 .md"."""
        counts = Counter(suffix(path) for path in self.paths)
        kinds = ", ".join(f"{n:,} {kind} file{'s' * (n > 1)}" for kind, n in sorted(counts.items()))
        rest = ", ".join(f"{n:,} {kind or 'without a suffix'}" for kind, n in sorted(self.left_out.items()))
        return kinds + (f", left out: {rest}" if rest else "")


def suffix(path: Path) -> str:
    """The one of SUFFIXES or TEXTS that a file's name ends in, or ""."""
    return next((each for each in (*SUFFIXES, *TEXTS) if path.name.endswith(each)), "")


def of_folder(folder: Path) -> Files:
    """All files of SUFFIXES below a folder, in the order of their names.

    Names with a dot in front are left out at every level, links are followed, and what is reached in several ways is
    read once.

    Raises:
      InputError: there is none, they are of several kinds, or a link leads nowhere.
    """
    known: list[Path] = []
    left_out: Counter[str] = Counter()
    for path in _walk(folder):
        if suffix(path) not in SUFFIXES:
            left_out[path.suffix] += 1
        elif path.is_file():
            known.append(path)
        elif not path.exists():
            raise InputError(f"{str(path)!r} is a link that leads nowhere. Mend it, or remove it.")
    if not known:
        texts = [kind for kind, _ in left_out.most_common() if kind in TEXTS]
        asked = f" Ask for other text by a pattern: {os.path.join(folder, '**', '*' + texts[0])!r}." if texts else ""
        raise InputError(
            f"the folder {str(folder)!r} holds no file of a known kind ({', '.join(SUFFIXES)}). Names with a dot in "
            f"front don't count.{asked}"
        )
    return Files(_of_one_kind(str(folder), _once(known), f"{folder}/**"), left_out)


def of_glob(pattern: str) -> Files:
    """The files that match a pattern, in the order of their names; what is reached in several ways is read once.

    Raises:
      InputError: there is none, they are of several kinds, or of one that isn't known.
    """
    parts = Path(pattern).parts
    paths = [path for path in _matches(parts) if path.is_file()]
    if not paths:
        raise InputError(f"no file matches {pattern!r}.")
    for path in sorted(paths):
        check_kind(path)
    return Files(_of_one_kind(pattern, _once(paths), os.path.dirname(pattern)), {})


def check_kind(path: Path) -> None:
    """Raises InputError where a file is of no known kind."""
    if not suffix(path):
        raise InputError(
            f"{str(path)!r} is of no known kind. Use one of {', '.join(SUFFIXES)}; or text or code, as .md and .py."
        )


def _walk(folder: Path) -> Iterator[Path]:
    """Files below a folder. Each real folder is entered once: under its own name, or by a link that leads there."""
    entered: set[str] = set()
    waiting = [str(folder)]
    for start in waiting:
        for parent, folders, names in os.walk(start):
            real = os.path.realpath(parent)
            if real in entered:
                folders.clear()
                continue
            entered.add(real)
            folders[:] = sorted(name for name in folders if not name.startswith("."))
            waiting.extend(path for name in folders if os.path.islink(path := os.path.join(parent, name)))
            yield from (Path(parent, name) for name in names if not name.startswith("."))


def _matches(pattern: Sequence[str]) -> Iterator[Path]:
    """What a pattern names, by its parts. ** goes through folders as `_walk` does, where glob would follow loops."""
    if "**" not in pattern:
        yield from map(Path, glob.glob(os.path.join(*pattern)))
        return
    first = pattern.index("**")
    for folder in glob.glob(os.path.join(*pattern[:first], "")) if first else [""]:
        for path in _walk(Path(folder)):
            if _fits(path.relative_to(folder).parts, pattern[first:]):
                yield path


def _fits(parts: Sequence[str], pattern: Sequence[str]) -> bool:
    if not pattern:
        return not parts
    if pattern[0] == "**":
        return any(_fits(parts[i:], pattern[1:]) for i in range(len(parts) + 1))
    return bool(parts) and fnmatch.fnmatchcase(parts[0], pattern[0]) and _fits(parts[1:], pattern[1:])


def _once(paths: Iterable[Path]) -> list[Path]:
    """Each real file under one of its names: the one with the fewest links and folders."""
    by_file: dict[str, Path] = {}
    for path in sorted(paths, key=lambda path: (len(path.parts), path.is_symlink(), path)):
        by_file.setdefault(os.path.realpath(path), path)
    return sorted(by_file.values())


def _of_one_kind(name: str, paths: Sequence[Path], folder: str) -> list[Path]:
    """Raises InputError where files are of several kinds: one of them is most likely no data."""
    kinds: dict[str, list[Path]] = {}
    for path in paths:
        kinds.setdefault(_KINDS.get(suffix(path), suffix(path)), []).append(path)
    if len(kinds) > 1:
        seen = " and ".join(f"{len(of_kind):,} {kind} ({of_kind[0].name})" for kind, of_kind in sorted(kinds.items()))
        most = max(kinds, key=lambda kind: len(kinds[kind]))
        pattern = os.path.join(folder, f"*{most}")
        raise InputError(
            f"{name!r} holds files of several kinds: {seen}. Say which are data, as in {pattern!r}, or name each kind "
            "in an entry of its own."
        )
    return list(paths)
