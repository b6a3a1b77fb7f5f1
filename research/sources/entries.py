"""What an entry of data.path names: found, with an identity that changes with it, and read record by record."""

import functools
import gzip
import itertools
import json
import pickle
import re
import sys
import zlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any, BinaryIO, NamedTuple

from research.errors import InputError, did_you_mean, printable
from research.sources import folders, grammar, json_limits, preferences, reasoning, stdlib_text, tasks
from research.sources.cache import code_digest
from research.sources.records import Raw, kind_of

TXT_DOCUMENT_BYTES = 16 * 1024
LONGEST_LINE, LARGEST_JSON = 2**27, 2**29  # bytes: of a line; of a file that is read as a whole
_COUNTED = 2**34  # bytes of files whose lines are counted
_BOM = b"\xef\xbb\xbf"


Position = list[int]  # where to read on, of JSON types: of files the number of the file, bytes and records before


class Origin(NamedTuple):
    """One entry of a mixture, found and not yet read.

    Attributes:
      name: the entry as the user wrote it.
      identity: of JSON types; differs whenever what `read` gives may differ.
      read: () -> (where, raw record) pairs; `where` is file:line or the like.
      generated: made by a program, so that a record that comes twice is of no use.
      summary: which files were found where the entry names several: "3 .jsonl files"; else "".
      count: () -> how many records it has, as far as that is known before they are read: 0 where it isn't.
      stream: where to begin, [] for the first record -> (where to go on, where, raw record), of each record as it is
        read; None where what it holds isn't read record by record.
      size: bytes of its files; 0 where that isn't known.
    """

    name: str
    identity: Any
    read: Callable[[], Iterator[tuple[str, Raw]]]
    generated: bool = False
    summary: str = ""
    count: Callable[[], int] = lambda: 0
    stream: Callable[[Position], Iterator[tuple[Position, str, Raw]]] | None = None
    size: int = 0


def locate(entry: str, *, count: int, seed: int, streaming: bool = False) -> Origin:
    """Finds what one entry of data.path names.

    Args:
      entry: a file, folder or glob of files (jsonl, jsonl.gz, json, parquet, txt; by name or glob also those of
        folders.TEXTS); a folder written by
        `datasets.save_to_disk`; hf:NAME[:CONFIG][:SPLIT]; tasks:NAME[/LEVEL]; grammar:NAME[/SIZE];
        preferences:TASK[/LEVEL][/FLIP][/subtle]; reasoning_gym:NAME; builtin:python_docs or builtin:python_topics.
      count, seed: how many records to generate, and from which seed, where the entry names a generator.
      streaming: of hf:, nothing is downloaded before it is read.

    Raises:
      InputError: there is no such thing; a missing file's message names the nearest that is there.
    """
    scheme, _, rest = entry.partition(":")
    if scheme == "tasks":
        return _generated(entry, tasks, lambda: tasks.records(rest, count, seed), [count, seed], count)
    if scheme == "preferences":
        code = code_digest(tasks.__file__)
        return _generated(
            entry, preferences, lambda: preferences.records(rest, count, seed), [count, seed, code], count
        )
    if scheme == "grammar":
        return _generated(entry, grammar, lambda: grammar.records(rest, count, seed), [count, seed], count)
    if scheme == "reasoning_gym":
        return _generated(entry, reasoning, lambda: reasoning.records(rest, count, seed), [count, seed], count)
    if scheme == "builtin":
        known = {
            "python_docs": stdlib_text.records,
            "python_topics": stdlib_text.topics,
        }
        if rest not in known:
            raise InputError(f"there is no {entry!r}.{did_you_mean(rest, known)}")
        return _generated(entry, stdlib_text, known[rest], [sys.version])
    if scheme == "hf":
        return _hub(entry, rest, streaming)
    return _files(entry)


def locate_flag(entry: str, *, count: int = 0, seed: int = 0) -> Origin:
    """Finds what --data of a command names, and says on stderr which files a folder or glob held.

    Args: see `locate`.

    Raises:
      InputError: see `locate`; it begins with --data.
    """
    try:
        origin = locate(entry, count=count, seed=seed)
    except InputError as error:
        raise InputError(f"--data: {error}") from error
    say_files("--data", origin)
    return origin


def say_files(where: str, origin: Origin) -> None:
    """Says on stderr which files an entry held, where it may be several; `where` is what names the entry."""
    if origin.summary:
        print(printable(f"{where}: {origin.name} holds {origin.summary}"), file=sys.stderr)


def _generated(
    name: str, module: ModuleType, records: Callable[[], Iterator[dict]], identity: list[Any], count: int = 0
) -> Origin:
    def read() -> Iterator[tuple[str, Raw]]:
        return ((f"{name}: record {i}", record) for i, record in enumerate(records(), start=1))

    return Origin(name, [name, code_digest(module.__file__), *identity], read, generated=True, count=lambda: count)


def _hub(entry: str, rest: str, streaming: bool = False) -> Origin:
    parts = re.fullmatch(r"(?P<name>[^:]+)(:(?P<config>[^:\[]+))??(:(?P<split>[^:\[]+(\[.*\])?))?", rest)
    if parts is None:
        raise InputError(f"{entry!r} is not of the form hf:NAME, hf:NAME:SPLIT or hf:NAME:CONFIG:SPLIT.")
    datasets = _import_datasets(entry)
    try:
        loaded = datasets.load_dataset(
            parts["name"], parts["config"], split=parts["split"] or "train", streaming=streaming
        )
    except Exception as e:  # the network, the hub and each data set's files fail in their own ways
        raise InputError(
            f"{entry!r} could not be loaded ({type(e).__name__}: {e}). Check the name, the split "
            f"(hf:NAME:SPLIT) and the network, or save it with datasets.save_to_disk and give that folder."
        ) from e
    if streaming:
        return _unread_rows(entry, loaded)
    return _rows_of(entry, loaded, [Path(file["filename"]) for file in loaded.cache_files])


def _unread_rows(entry: str, dataset: Any) -> Origin:
    """The rows of a data set of the hub that are downloaded as they are read."""
    fresh = pickle.dumps(dataset)  # iterators of one object share a state, and several threads may read

    def stream(position: Position) -> Iterator[tuple[Position, str, Raw]]:
        before = position[0] if position else 0
        try:
            own = pickle.loads(fresh)
            for i, row in enumerate(own.skip(before) if before else own, start=before + 1):
                yield [i], f"{entry}: row {i}", row
        except InputError:
            raise
        except Exception as e:  # as above
            raise InputError(
                f"{entry}: can't be read ({type(e).__name__}: {e}). The same command goes on from the last checkpoint."
            ) from e

    def read() -> Iterator[tuple[str, Raw]]:
        return ((where, row) for _, where, row in stream([]))

    return Origin(entry, [entry, "unread"], read, stream=stream)


def _rows_of(entry: str, dataset: Any, files: list[Path]) -> Origin:
    def read() -> Iterator[tuple[str, Raw]]:
        return ((f"{entry}: row {i}", row) for i, row in enumerate(dataset, start=1))

    def stream(position: Position) -> Iterator[tuple[Position, str, Raw]]:
        for i in range(position[0] if position else 0, len(dataset)):
            yield [i + 1], f"{entry}: row {i + 1}", dataset[i]

    identity = [entry, len(dataset), [_stamp(file) for file in files]]
    size = sum(file.stat().st_size for file in files)
    return Origin(entry, identity, read, count=lambda: len(dataset), stream=stream, size=size)


def _import_datasets(entry: str) -> ModuleType:
    try:  # here, since it is an extra, and takes seconds to import
        import datasets
    except ImportError as e:
        raise InputError(f"{entry!r} needs the package 'datasets': pip install -e '.[datasets]'.") from e
    return datasets


def _files(entry: str) -> Origin:
    path = Path(entry).expanduser()
    if path.is_dir():
        if (path / "dataset_dict.json").is_file():
            splits = sorted(str(path / child.name) for child in path.iterdir() if child.is_dir())
            raise InputError(f"{entry!r} holds several splits. Give one of: {', '.join(splits)}.")
        if (path / "state.json").is_file() and (path / "dataset_info.json").is_file():
            parts = sorted(file for file in path.iterdir() if file.is_file())
            return _rows_of(entry, _import_datasets(entry).load_from_disk(str(path)), parts)
        files = folders.of_folder(path)
    elif path.is_file():
        folders.check_kind(path)
        files = folders.Files([path], {})
    elif any(char in entry for char in "*?["):
        files = folders.of_glob(str(path))
    elif path.exists():
        raise InputError(f"{entry!r} is neither a file nor a folder. Write its contents to a file, and name that.")
    elif path.is_symlink():
        raise InputError(f"{entry!r} is a link that leads nowhere. Mend it.")
    else:
        raise InputError(f"there is no {entry!r}.{_nearest(path)}")

    def stream(position: Position) -> Iterator[tuple[Position, str, Raw]]:
        first, *within = position or [0, 0, 0]
        for number, file in enumerate(files.paths[first:], start=first):
            try:
                for *after, where, raw in _records_from(file, *(within if number == first else [0, 0])):
                    yield [number, *after], where, raw
            except (OSError, EOFError, zlib.error) as e:
                raise InputError(f"{file}: can't be read, it may be cut short or damaged ({e}). Copy it anew.") from e

    def read() -> Iterator[tuple[str, Raw]]:
        return ((where, raw) for _, where, raw in stream([]))

    summary = "" if path.is_file() else files.summary()
    count = functools.partial(_count_lines, files.paths)
    stamps = [_stamp(file) for file in files.paths]
    whole = any(folders.suffix(file) == ".json" for file in files.paths)
    return Origin(
        entry, stamps, read, summary=summary, count=count, stream=None if whole else stream,
        size=sum(size for _, size, *_ in stamps),
    )  # fmt: skip


def _records_from(file: Path, offset: int, before: int) -> Iterator[tuple[int, int, str, Raw]]:
    """Yields (bytes read, lines or records read, where, raw record) of what follows so many bytes and lines of a
    .jsonl, or so many records of another file."""
    if folders.suffix(file) == ".jsonl":
        with open(file, "rb") as stream:
            stream.seek(offset)
            for number, line in _lines(file, stream, before):
                offset += len(line)
                line = line.removeprefix(_BOM) if number == 1 else line
                if line.strip():
                    yield offset, number, f"{file}:{number}", line
        return
    records = itertools.islice(_READERS[folders.suffix(file)](file), before, None)
    for number, (where, raw) in enumerate(records, start=before + 1):
        yield 0, number, where, raw


def _count_lines(files: Sequence[Path]) -> int:
    """The lines of .jsonl files, which are counted in a hundredth of the time that tokenising them takes; 0 of others,
    and where they are huge."""
    if {folders.suffix(file) for file in files} != {".jsonl"} or sum(f.stat().st_size for f in files) > _COUNTED:
        return 0
    total = 0
    for file in files:
        with open(file, "rb") as stream:
            total += sum(chunk.count(b"\n") for chunk in iter(functools.partial(stream.read, 2**24), b""))
    return total


def _stamp(file: Path) -> list[Any]:
    """What tells a file from others: the time of its last change too, which no program can set back."""
    stat = file.stat()
    return [str(file.resolve()), stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns]


def _nearest(path: Path) -> str:
    missing = path
    while not missing.parent.is_dir():
        missing = missing.parent
    if missing != path:
        return f" There is no folder {str(missing)!r} either.{_nearest(missing)}"
    names = sorted(
        child.name for child in path.parent.iterdir() if child.is_dir() or folders.suffix(child) in folders.SUFFIXES
    )
    return did_you_mean(path.name, names[:1000]) if names else f" The folder {str(path.parent)!r} holds no data file."


def _lines(file: Path, stream: BinaryIO, before: int = 0) -> Iterator[tuple[int, bytes]]:
    """The lines of a file with their numbers, after so many before. Raises InputError for one that is longer than a
    line may be."""
    for number in itertools.count(before + 1):
        line = stream.readline(LONGEST_LINE + 1)
        if len(line) > LONGEST_LINE:
            raise InputError(
                f"{file}:{number}: is longer than {LONGEST_LINE // 2**20} MiB. Cut it into several records."
            )
        if not line:
            return
        yield number, line


def _check_size(file: Path, remedy: str) -> None:
    """Raises InputError where a file that is read as a whole is too large for that."""
    if (size := file.stat().st_size) > LARGEST_JSON:
        raise InputError(f"{file}: has {size / 2**20:,.0f} MiB, and {LARGEST_JSON // 2**20} is the most. {remedy}")


def _read_jsonl_gz(file: Path) -> Iterator[tuple[str, Raw]]:
    with gzip.open(file) as stream:
        for number, line in _lines(file, stream):
            line = line.removeprefix(_BOM) if number == 1 else line
            if line.strip():
                yield f"{file}:{number}", line


def _read_json(file: Path) -> Iterator[tuple[str, Raw]]:
    _check_size(file, "Write a .jsonl, with one record a line.")
    data = file.read_bytes()
    try:
        records = json.loads(data)
    except json.JSONDecodeError as e:
        raise InputError(
            f"{file}:{e.lineno}: invalid JSON ({e.msg}). A .json file holds one list of records; "
            f"name it .jsonl if it has one record a line."
        ) from e
    except UnicodeDecodeError as e:
        raise InputError(f"{file}: not valid UTF-8 at byte {e.start}. Save it as UTF-8.") from e
    except (ValueError, RecursionError):  # one of the records can't be read
        records = json_limits.elements(data)
        if records is None:
            raise InputError(
                f"{file}: holds an object that can't be read, not a list of records. Write [{{...}}, {{...}}]."
            ) from None
    if not isinstance(records, list):
        raise InputError(f"{file}: holds {kind_of(records)}, not a list of records. Write [{{...}}, {{...}}].")
    for i, record in enumerate(records, start=1):
        yield f"{file}: record {i}", record


def _read_parquet(file: Path) -> Iterator[tuple[str, Raw]]:
    try:  # here, since it is an extra
        import pyarrow
        import pyarrow.parquet
    except ImportError as e:
        raise InputError(f"{file}: needs the package 'pyarrow': pip install -e '.[datasets]'.") from e
    number = 0
    try:
        for batch in pyarrow.parquet.ParquetFile(file).iter_batches(batch_size=1024):
            for record in batch.to_pylist():
                number += 1
                yield f"{file}: row {number}", record
    except pyarrow.ArrowException as e:
        raise InputError(f"{file}: not a parquet file that can be read ({e}). Write it anew.") from e


def _read_txt(file: Path) -> Iterator[tuple[str, Raw]]:
    """Cuts a file into documents at the first blank line after 16 KiB, or at a line's end after 32 KiB.

    So a single long file can be shuffled, and split into training and held-out text.
    """
    start, held, size = 1, [], 0
    with open(file, "rb") as stream:
        for number, line in _lines(file, stream):
            line = line.removeprefix(_BOM) if number == 1 else line
            held.append(line)
            size += len(line)
            if size >= 2 * TXT_DOCUMENT_BYTES or (size >= TXT_DOCUMENT_BYTES and not line.strip()):
                yield f"{file}:{start}", {"text": b"".join(held)}
                start, held, size = number + 1, [], 0
    if b"".join(held).strip() or start == 1:
        yield f"{file}:{start}", {"text": b"".join(held)}


def _read_text(file: Path) -> Iterator[tuple[str, Raw]]:
    """A file that is one document. An empty one, as many __init__.py are, is none."""
    _check_size(file, "Name it .txt, which is cut into documents, or cut it.")
    text = file.read_bytes().removeprefix(_BOM)
    if text.strip():
        yield str(file), {"text": text}


_READERS: dict[str, Callable[[Path], Iterator[tuple[str, Raw]]]] = {
    **dict.fromkeys(folders.TEXTS, _read_text),
    ".jsonl.gz": _read_jsonl_gz,
    ".json": _read_json,
    ".parquet": _read_parquet,
    ".txt": _read_txt,
}
