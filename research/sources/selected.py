"""A selection of records, in a file of its own: `understudy select` writes it, and `data.select` reads it, so that the
data isn't copied.

The first line says what was selected, and how. Each other line is a record that is kept, in the data's order:

  {"selection": {"records": 3, "tokens": 91, "ordered": false, "files": {"a.jsonl": 7}, ...}, "digest": "5e0c01aa"}
  {"file": "a.jsonl", "number": 17, "digest": "9f86d081884c7d65", "rank": 0, "check": "5948bb14"}

  file, number, digest, check   as in a file of scores (sources/scores.py); of the first line "digest" is its check
  rank                   its place in the order of preference of its stratum, from 0
  files                  of each file the number of records that it had when it was scored
  ordered                the order of preference is that of training: a curriculum
"""

import contextlib
import dataclasses
import functools
import hashlib
import json
import re
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from research import digests, files
from research.errors import InputError
from research.sources import entries as entries_lib
from research.sources import records, scores
from research.sources.choice import Choice
from research.sources.entries import Origin
from research.sources.spec import DataSpec, Entry

_HEAD = "selection"


@dataclasses.dataclass(frozen=True)
class OfFile:
    """What is kept of one file: K records, in the order of their numbers.

    Attributes:
      number: [K] int64.
      digest: [K] uint64.
      rank: [K] int64.
    """

    number: np.ndarray
    digest: np.ndarray
    rank: np.ndarray


@dataclasses.dataclass(frozen=True)
class Selection:
    """A selection, read.

    Attributes:
      path: of its file.
      about: its first line.
      by_file: name of a file, as it was scored -> what is kept of it.
      content: a hash of all of it.
    """

    path: str
    about: Mapping[str, Any]
    by_file: Mapping[str, OfFile]
    content: str

    @property
    def ordered(self) -> bool:
        return bool(self.about["ordered"])

    @functools.cached_property
    def _resolved(self) -> dict[str, str]:
        """Each file's real path -> its name: a run may call it otherwise than the command that scored it."""
        return {str(Path(name).expanduser().resolve()): name for name in self.about["files"]}

    def name_of(self, file: str) -> str:
        """What the selection calls a file; "" where it doesn't know it."""
        return file if file in self.about["files"] else self._resolved.get(str(Path(file).expanduser().resolve()), "")


def write(path: Path, choice: Choice) -> None:
    """Writes what was chosen as a selection."""
    table, keep = choice.table, choice.keep
    held = np.zeros(len(table.files), np.int64)
    np.maximum.at(held, table.file, table.number + 1)
    by_name = dict(zip(table.files, held.tolist(), strict=True))
    counts = {"records": int(keep.sum()), "tokens": int(table.tokens[keep].sum()), "files": by_name}
    with files.replacing(path) as file:
        file.write(files.json_line(digests.seal({_HEAD: counts | choice.request.about()})))
        for i in np.flatnonzero(keep).tolist():
            place = {"file": table.files[table.file[i]], "number": int(table.number[i])}
            row = place | {"digest": f"{int(table.digest[i]):016x}", "rank": int(choice.rank[i])}
            file.write(files.json_line(row | {scores.CHECK: digests.of_json(row)}))


def copy(choice: Choice, output: Path) -> None:
    """Writes the records that were chosen themselves, in the data's order.

    Raises:
      InputError: a file that was scored isn't there, or holds other records by now.
    """
    with tempfile.TemporaryDirectory() as folder, files.replacing(output) as file:
        path = Path(folder) / "selection.jsonl"
        write(path, choice)
        selection = read(str(path), "--scores")
        selection = dataclasses.replace(selection, path=choice.request.scores)
        for name, kept in selection.by_file.items():
            if len(kept.number):
                origin = _locate(name)
                for _, record in of_origin(origin, selection, ("--scores", "--scores")).read():
                    file.write(files.json_line(record, default=str))


def _locate(name: str) -> Origin:
    try:
        return entries_lib.locate(name, count=0, seed=0)
    except InputError as error:
        raise InputError(f"--scores: was made of {name}. {error}") from error


def read_about(path: str, field: str) -> dict[str, Any]:
    """Reads the first line of a selection. Args and errors: see `read`."""
    with _naming_faults(path, field), open(path, "rb") as file:
        return _about(file.readline(), f"{field} = {path!r}")


def read(path: str, field: str) -> Selection:
    """Reads a selection.

    Args:
      path: of the file.
      field: what names it, for errors: "data.select".

    Raises:
      InputError: it can't be read, or is none.
    """
    content = hashlib.blake2b(digest_size=16)
    with _naming_faults(path, field), open(path, "rb") as file:
        head = file.readline()
        content.update(head)
        about = _about(head, f"{field} = {path!r}")
        rows: dict[str, list[tuple[int, int, int]]] = {name: [] for name in about["files"]}
        for number, line in enumerate(file, start=2):
            content.update(line)
            name, *row = _row(f"{field} = {path}:{number}", line)
            rows[name].append(tuple(row))
    if (count := sum(map(len, rows.values()))) != about["records"]:
        raise InputError(
            f"{field} = {path!r}: says that it keeps {about['records']:,} records, and names {count:,}. Write it "
            "anew with understudy select."
        )
    return Selection(path, about, {name: _of_file(kept) for name, kept in rows.items()}, content.hexdigest())


def is_curriculum(entries: Sequence[Entry], data: DataSpec) -> bool:
    """Whether examples are to lie in rows as they are read: where the selection of an entry is in an order.

    Raises:
      InputError: it can't be read, or the order would be lost.
    """
    for entry in entries:
        name, field = entry.options.select, entry.select_field(data)
        if name and read_about(name, field)["ordered"]:
            if data.shuffle:
                raise InputError(
                    f"{field} = {name!r}: is in an order to train in, which data.shuffle = True loses. Set "
                    "data.shuffle to False, or select without --ordered."
                )
            return True
    return False


@contextlib.contextmanager
def _naming_faults(path: str, field: str) -> Iterator[None]:
    where = f"{field} = {path!r}"
    try:
        yield
    except InputError:
        raise
    except OSError as error:
        raise InputError(f"{where}: can't be read ({error.strerror}). Name what understudy select wrote.") from error
    except (ArithmeticError, AttributeError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise InputError(f"{where}: is no selection. Name what understudy select wrote.") from error


def _about(line: bytes, where: str) -> dict[str, Any]:
    head = json.loads(line)
    if not digests.is_whole(head):
        raise InputError(
            f"{where}: line 1 isn't what was written: it is damaged. Write it anew with understudy select."
        )
    about = head[_HEAD]
    about["ordered"], about["records"], dict(about["files"])
    return about


def _row(where: str, line: bytes) -> tuple[str, int, int, int]:
    """File, number, digest and rank of a line. Raises InputError, which begins with `where`, where it is none."""
    try:
        values = json.loads(line, object_pairs_hook=files.unique_names)
        whole = all(type(values[name]) is int and 0 <= values[name] < 2**63 for name in ("number", "rank"))
        if whole and re.fullmatch("[0-9a-f]{16}", values["digest"]):
            check = values.pop(scores.CHECK, None)
            if check in (None, digests.of_json(values)):
                return values["file"], values["number"], int(values["digest"], 16), values["rank"]
            where += ": isn't what was written: it is damaged"
    except (ValueError, KeyError, TypeError, RecursionError):
        pass
    raise InputError(f"{where}: is no row of a selection. Write it anew with understudy select.")


def _of_file(rows: Sequence[tuple[int, int, int]]) -> OfFile:
    number, digest, rank = zip(*sorted(rows), strict=True) if rows else ((), (), ())
    return OfFile(np.array(number, np.int64), np.array(digest, np.uint64), np.array(rank, np.int64))


def of_origin(origin: Origin, selection: Selection, fields: tuple[str, str]) -> Origin:
    """An entry of the data of which only the records of a selection are read.

    Args:
      origin: the entry.
      selection: what to keep of it.
      fields: what names the selection and the entry in the config, for errors: ("data.select", "data.path").
    """
    reading = _Reading(origin, selection, *fields)
    return origin._replace(
        identity=[origin.identity, "select", selection.content],
        read=reading.in_order if selection.ordered else reading.as_read,
    )


@dataclasses.dataclass(frozen=True)
class _Reading:
    """How the kept records of an entry are read. `select` and `path` name selection and entry in the config."""

    origin: Origin
    selection: Selection
    select: str
    path: str

    def as_read(self) -> Iterator[tuple[str, records.Raw]]:
        """In the data's order."""
        return ((where, raw) for where, raw, _ in self._ranked())

    def in_order(self) -> Iterator[tuple[str, records.Raw]]:
        """In the order of preference; the kept records are in memory until all are read."""
        for where, raw, _ in sorted(self._ranked(), key=lambda each: each[2]):
            yield where, raw

    def _ranked(self) -> Iterator[tuple[str, records.Raw, int]]:
        """(where, record, rank) of each kept record. Raises InputError where the data isn't what was scored."""
        numbers, name, place, number, count = scores.Numbers(), None, 0, -1, 0
        for where, raw in self.origin.read():
            file, following = numbers.next(where)
            if name is None or following == 0:
                self._check_end(name, place, number)
                name, place = self._name_of(file), 0
            number, kept = following, self.selection.by_file[name]
            if place == len(kept.number) or kept.number[place] != number:
                continue
            record = self._parse(where, raw, int(kept.digest[place]))
            yield where, record, int(kept.rank[place])
            place, count = place + 1, count + 1
        self._check_end(name, place, number)
        if not count:
            raise InputError(
                f"{self.select} = {self.selection.path!r}: keeps nothing of {self.origin.name!r}. Leave it out of "
                f"{self.path}, or select of each file: understudy select --stratify=file."
            )

    def _parse(self, where: str, raw: records.Raw, digest: int) -> dict[str, Any]:
        try:
            record = records.parse(raw)
        except records.BadRecord as error:
            raise error.at(where) from error
        if int(scores.digest(record), 16) != digest:
            raise self._other(f"{where} is another record than the one that was scored")
        return record

    def _name_of(self, file: str) -> str:
        name = self.selection.name_of(file)
        if not name:
            known = ", ".join(self.selection.about["files"])
            raise self._other(f"it says nothing of {file}, and was made of {known}")
        return name

    def _check_end(self, name: str | None, place: int, number: int) -> None:
        if name is None:
            return
        held = self.selection.about["files"][name]
        if number + 1 != held or place != len(self.selection.by_file[name].number):
            raise self._other(f"{name} had {held:,} records when they were scored, and has {number + 1:,}")

    def _other(self, fault: str) -> InputError:
        return InputError(
            f"{self.select} = {self.selection.path!r}: isn't of the data that {self.path} names: {fault}. Score and "
            "select anew, or name the data that it was made of."
        )
