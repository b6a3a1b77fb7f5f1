"""Scores of records, in a file beside the data: `understudy score --with` writes it, `understudy select` reads it.

The file has one JSON object a line, for each record of the data, in the data's order:

  {"file": "a.jsonl", "number": 17, "digest": "9f86d081884c7d65", "tokens": 212, "supervised": 40, "ifd": 0.83,
   "of": 300, "check": "da62528c"}

  file        the file that the record is in, as the data's entry reads it; of generated data the entry
  number      of the record in that file, from 0 on; blank lines aren't counted
  digest      a hash of the record's texts, so that scores of other data under the same name are known (`digest`)
  tokens      how many it has as a training example, under the tokenizer and template that the scores were made with
  supervised  how many of them are learned
  of          how many records that file has, so that rows that are gone are noticed
  check       a digest of the row's other values, so that damage is noticed
  all others  scores: numbers, true or false, or null where the score isn't defined for that record

A file may be put together of several: rows of other files are told apart by `file`. A row that was changed on purpose
is read once its `check` is taken out, and part of a file's rows once their `of` is.
"""

import array
import dataclasses
import hashlib
import json
import math
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from research import digests, files
from research.errors import InputError, did_you_mean, located

ROW = ("file", "number", "digest", "tokens", "supervised")  # fields of a row that are no scores
OF, CHECK = "of", "check"
_TEXTS = ("text", "prompt", "response", "messages", "chosen", "rejected", "responses", "tokens")
_PLACE = re.compile(r"(?s)(.*?)(?::\d+|: (?:record|row) \d+)?")


def digest(record: Mapping[str, Any]) -> str:
    """A hash of a record's texts as 16 hexadecimal digits: of the fields that say what is learned, whatever other
    columns it has. A record with none of these is hashed whole."""
    texts = {name: record[name] for name in _TEXTS if name in record} or dict(record)
    content = json.dumps(texts, sort_keys=True, ensure_ascii=False, default=_decoded)
    return hashlib.blake2b(content.encode(errors="backslashreplace"), digest_size=8).hexdigest()


def _decoded(value: Any) -> str:
    return value.decode(errors="backslashreplace") if isinstance(value, bytes) else str(value)


def file_of(where: str) -> str:
    """The file of a record, from where it stands ("a.jsonl:7", "a.json: record 7", "a.md"); see sources.entries."""
    return _PLACE.fullmatch(where)[1]


@dataclasses.dataclass
class Numbers:
    """Numbers records within their files, in the order in which they are read."""

    file: str = ""
    count: int = 0

    def next(self, where: str) -> tuple[str, int]:
        """(file, number) of the record that is read next."""
        file = file_of(where)
        self.file, self.count = file, self.count + 1 if file == self.file else 1
        return file, self.count - 1


def row(
    place: tuple[str, int], digest: str, counts: tuple[int, int], scores: Mapping[str, Any], of: int | None = None
) -> bytes:
    """A line of a file of scores.

    Args:
      place: (file, number) of the record.
      digest: of it.
      counts: its tokens, and those that are learned.
      scores: name -> value; a number that isn't finite is written as null.
      of: how many records its file has; None where that isn't known.
    """
    fixed = zip(ROW, (*place, digest, *counts), strict=True)
    values = {**dict(fixed), **{name: _plain(value) for name, value in scores.items()}, **({OF: of} if of else {})}
    return files.json_line(values | {CHECK: digests.of_json(values)})


def _plain(value: Any) -> Any:
    if isinstance(value, bool | np.bool_):
        return bool(value)
    if isinstance(value, int | np.integer):
        return int(value)
    return float(value) if value is not None and math.isfinite(value) else None


@dataclasses.dataclass(frozen=True)
class Table:
    """Scores by column, N records in the order of the file.

    Attributes:
      files: names of the files.
      file: [N] int32, the place of each record's file in `files`.
      number: [N] int64, of the record in its file, from 0 on.
      digest: [N] uint64, of its texts.
      tokens, supervised: [N] int64.
      columns: score -> [N] float64; NaN for null, and 0 or 1 for false and true.
    """

    files: tuple[str, ...]
    file: np.ndarray
    number: np.ndarray
    digest: np.ndarray
    tokens: np.ndarray
    supervised: np.ndarray
    columns: Mapping[str, np.ndarray]

    def __len__(self) -> int:
        return len(self.number)

    def column(self, name: str, field: str) -> np.ndarray:
        """A score, or `tokens` or `supervised`. Raises InputError, which begins with `field`, where there is none."""
        known = {"tokens": self.tokens, "supervised": self.supervised, **self.columns}
        if name not in known:
            raise InputError(f"{field} = {name}: there is no such score.{did_you_mean(name, known)}")
        return known[name].astype(np.float64)


def read(path: str | Path, flag: str = "--scores") -> Table:
    """Reads a file of scores; it takes some 40 bytes of memory a record and 8 for each score.

    Args:
      path: of the file.
      flag: what names it.

    Raises:
      InputError: it can't be read, a line is no row, rows have different scores, a record has two, or rows are gone.
    """
    names: dict[str, int] = {}
    wanted: dict[str, int] = {}
    fixed = {name: array.array("Q" if name == "digest" else "q") for name in ROW}
    columns: dict[str, array.array] = {}
    for where, line in _lines(path, flag):
        with located(where):
            values = _parse(line)
            if (of := values.pop(OF, None)) != wanted.setdefault(values["file"], of):
                raise InputError(f"says that {values['file']} has {of} records, and rows before that it has others.")
            scores = {name: value for name, value in values.items() if name not in ROW}
            if not fixed["file"]:
                columns = {name: array.array("d") for name in scores}
            if scores.keys() != columns.keys():
                name = sorted(scores.keys() ^ columns.keys())[0]
                raise InputError(f"has other scores than the first row: {name!r}. Score all records alike.")
            for name, value in scores.items():
                columns[name].append(_number(name, value))
            fixed["file"].append(names.setdefault(values["file"], len(names)))
            for name in ("number", "tokens", "supervised"):
                fixed[name].append(values[name])
            fixed["digest"].append(int(values["digest"], 16))
    if not fixed["file"]:
        raise InputError(f"{flag} = {path}: holds no row. Give what understudy score --with has written.")
    arrays = {name: np.array(values) for name, values in fixed.items()}
    arrays["file"] = arrays["file"].astype(np.int32)
    _check_once(arrays["file"], arrays["number"], tuple(names), f"{flag} = {path}")
    for name, there in zip(names, np.bincount(arrays["file"]).tolist(), strict=True):
        if wanted[name] not in (None, there):
            raise InputError(
                f"{flag} = {path}: has {there:,} rows of {name}, and had {wanted[name]:,}: it is damaged. Score anew; "
                f"if rows were taken out on purpose, take the field {OF!r} out too, and {CHECK!r} with it."
            )
    return Table(files=tuple(names), **arrays, columns={name: np.array(values) for name, values in columns.items()})


def _check_once(file: np.ndarray, number: np.ndarray, names: tuple[str, ...], where: str) -> None:
    """Raises InputError, which begins with `where`, if a record has two rows."""
    order = np.lexsort((number, file))
    same = (np.diff(file[order]) == 0) & (np.diff(number[order]) == 0)
    if same.any():
        first = order[np.argmax(same)]
        raise InputError(
            f"{where}: has two rows for record {number[first]} of {names[file[first]]}. Put together scores of "
            "different files."
        )


def _lines(path: str | Path, flag: str) -> Iterator[tuple[str, bytes]]:
    try:
        with open(path, "rb") as lines:
            yield from ((f"{path}:{number}", line) for number, line in enumerate(lines, start=1) if line.strip())
    except OSError as error:
        raise InputError(f"{flag} = {path}: can't be read ({error.strerror}).") from error


def _parse(line: bytes) -> dict[str, Any]:
    try:
        values = json.loads(line)
        counts = (*(values[name] for name in ("number", "tokens", "supervised")), values.get(OF, 0))
        whole = all(type(count) is int and 0 <= count < 2**63 for count in counts)
        good = whole and isinstance(values["file"], str) and re.fullmatch("[0-9a-f]{16}", values["digest"])
        check = values.pop(CHECK, None)
    except (ValueError, KeyError, TypeError):
        good = None
    if not good:
        raise InputError("is no row of scores. Give what understudy score --with has written.")
    if check not in (None, digests.of_json(values)):
        raise InputError(
            "isn't what was written: it is damaged. Score anew; if it was changed on purpose, take its field "
            f"{CHECK!r} out."
        )
    return values


def _number(name: str, value: Any) -> float:
    if value is None:
        return math.nan
    if not isinstance(value, int | float):
        raise InputError(f"{name} = {value!r:.40}: is no score: must be a number, true, false or null. Mend it.")
    try:
        return float(value)
    except OverflowError:
        return math.copysign(math.inf, value)
