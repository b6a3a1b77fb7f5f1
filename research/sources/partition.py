"""Disjoint parts of a data set, drawn by chance: no record, and no prompt, is in two of them."""

import itertools
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from research import files
from research.errors import InputError
from research.sources import comparisons, formats, records
from research.sources.entries import locate_flag

Parts = Mapping[str, int | None]  # name -> number of records; None, at most once and last, is the rest


def read_parts(text: str) -> dict[str, int | None]:
    """Reads NAME:COUNT,...; the part without a number comes last.

    Raises:
      ValueError: the text isn't of this form.
    """
    parts: dict[str, int | None] = {}
    for entry in text.split(","):
        name, colon, count = entry.partition(":")
        if not name or name in parts or (colon and not (count.isdecimal() and int(count))):
            raise ValueError(f"{entry!r} isn't NAME:COUNT with a name of its own.")
        if not re.fullmatch(r"\w[\w.-]*", name):
            raise ValueError(f"{name!r} is no name of a file in --output. Use letters, digits, '_', '-' and '.'.")
        parts[name] = int(count) if colon else None
    if list(parts.values()).count(None) > 1:
        raise ValueError("only one part can get the rest. Give the others a number.")
    return dict(sorted(parts.items(), key=lambda part: part[1] is None))


def read_distinct(entries: Sequence[str], fields: Mapping[str, str], *, examples: int, seed: int) -> list[dict]:
    """Reads the records of some entries of data.path. Of those with the same text, or prompt, the first is taken.

    Args:
      entries: files, folders, builtin:NAME, tasks:NAME, ...
      fields: field -> the column that it has in the data.
      examples, seed: how many records a generator makes, and from which seed.

    Raises:
      InputError: an entry can't be found, or a record is at fault.
    """
    records.check_columns(fields)
    origins = [locate_flag(entry, count=examples, seed=seed) for entry in entries]
    distinct: dict[Any, dict] = {}
    for where, raw in itertools.chain.from_iterable(origin.read() for origin in origins):
        try:
            record = records.canonical(records.parse(raw), fields)
            kind = "text" if "text" in record else comparisons.detect(record, {}) or records.detect_format(record, {})
            compared = kind in comparisons.FORMATS
            turns = comparisons.best_turns(record, kind) if compared else records.check(record, kind, {})
        except records.BadRecord as error:
            raise error.at(where, fields="--fields") from error
        distinct.setdefault(formats.split_key(turns), record)
    return list(distinct.values())


def check_parts(parts: Parts, folder: Path, data: Sequence[str], *, overwrite: bool) -> None:
    """Raises InputError where a file that `write_parts` writes is one of the data, or is there already."""
    for name in parts:
        path = folder / f"{name}.jsonl"
        files.check_apart(path, data)
        if folder.is_dir():
            files.check_output(path, overwrite=overwrite)


def write_parts(distinct: Sequence[Mapping[str, Any]], parts: Parts, folder: Path, seed: int) -> dict[Path, int]:
    """Writes FOLDER/NAME.jsonl for each part, and returns how many records each file got.

    Raises:
      InputError: there are too few records.
    """
    total = sum(count or 0 for count in parts.values())
    if total > len(distinct) or (None in parts.values() and total == len(distinct)):
        more = " and more" if None in parts.values() else ""
        raise InputError(
            f"--parts: asks for {total:,} records{more}, and --data holds {len(distinct):,} different ones. Ask for "
            "fewer."
        )
    order = iter(np.random.default_rng(seed).permutation(len(distinct)).tolist())
    folder.mkdir(parents=True, exist_ok=True)
    sizes = {}
    for name, count in parts.items():
        lines = [files.json_line(distinct[i]) for i in itertools.islice(order, count)]
        path = folder / f"{name}.jsonl"
        files.write_bytes(path, b"".join(lines))
        sizes[path] = len(lines)
    return sizes
