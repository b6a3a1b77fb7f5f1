"""Files that are whole or absent, whoever is killed while writing: JSON, texts, folders, outputs that grow by lines."""

import contextlib
import glob
import hashlib
import json
import os
import shutil
import stat
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import IO, Any, BinaryIO, TypeVar

from research.errors import InputError

_SAMPLES, _SAMPLE_BYTES = 256, 4096  # of a file that is too big to read for a fingerprint
_MOST_JSON = 2**28  # bytes of a file that says what something is
_BELOW = 256  # bytes of the names of files below a folder, such as those of a checkpoint's arrays
_D = TypeVar("_D")
_REQUIRED: Any = object()


def cache_root(cache_dir: str = "") -> Path:
    """Returns `cache_dir`, else $UNDERSTUDY_CACHE, else ~/.cache/understudy."""
    return Path(cache_dir or os.environ.get("UNDERSTUDY_CACHE") or "~/.cache/understudy").expanduser()


def read_json(
    path: str | Path, default: _D = _REQUIRED, *, name: str = "", remedy: str = "Repair it, or delete it."
) -> dict[str, Any] | _D:
    """Reads a JSON object; a byte-order mark before it is dropped.

    Args:
      path: the file.
      default: what to return where there is no such file; without it, a missing file is an error.
      name: what an error calls the file: a field or flag, as "data.annotations = 'x'"; by default its path.
      remedy: the end of the error about a file that isn't a JSON object.

    Raises:
      InputError: the file can't be read, or holds no JSON object.
    """
    name = f"{name}: {str(path)!r}" if name else f"{path}:"
    try:
        status = os.stat(path)
        if not (stat.S_ISREG(status.st_mode) or stat.S_ISDIR(status.st_mode)):  # to open a pipe would wait for ever
            raise InputError(f"{name} is no file, but a device or a pipe. {remedy}")
        if status.st_size > _MOST_JSON:
            raise InputError(f"{name} has {status.st_size:,} bytes, and {_MOST_JSON:,} is the most. {remedy}")
        value = json.loads(Path(path).read_text(encoding="utf-8-sig"), object_pairs_hook=unique_names)
    except (FileNotFoundError, NotADirectoryError) as error:
        if default is not _REQUIRED:
            return default
        raise InputError(f"{name} can't be read ({error.strerror}).") from error
    except OSError as error:
        raise InputError(f"{name} can't be read ({error.strerror}).") from error
    except InputError:
        raise
    except (ValueError, RecursionError) as error:
        raise InputError(f"{name} is no JSON ({error!s:.200}). {remedy}") from error
    if not isinstance(value, dict):
        raise InputError(f"{name} is no JSON object, but {str(value)[:40]!r}. {remedy}")
    return value


def unique_names(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """The object_pairs_hook of json.loads that takes no object with a name twice, of which a reader would take either.

    Raises:
      ValueError: an object has one.
    """
    values = dict(pairs)
    if len(values) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"{next(name for name in names if names.count(name) > 1)!r:.80} is there twice")
    return values


def read_json_lines(path: str | Path, remedy: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yields (file:line, object) of each line that isn't blank.

    Raises:
      InputError: the file can't be read, or a line is no JSON object; it ends with `remedy`.
    """
    try:
        with open(path, "rb") as lines:
            for number, line in enumerate(lines, start=1):
                if not line.strip():
                    continue
                try:
                    value = json.loads(line, object_pairs_hook=unique_names)
                except (ValueError, RecursionError) as error:
                    raise InputError(f"{path}:{number}: is no JSON ({error!s:.200}). {remedy}") from error
                if not isinstance(value, dict):
                    raise InputError(f"{path}:{number}: is no JSON object. {remedy}")
                yield f"{path}:{number}", value
    except OSError as error:
        raise InputError(f"{path}: can't be read ({error.strerror}). {remedy}") from error


def json_line(value: Any, default: Callable[[Any], Any] | None = None) -> bytes:
    """A line of JSON. Half of a surrogate pair, which UTF-8 can't hold and JSON can, is written as its escape.

    Args:
      value: of JSON's types, or what `default` makes such of.
      default: see json.dumps.
    """
    return json.dumps(value, ensure_ascii=False, default=default).encode(errors="backslashreplace") + b"\n"


def write_json(path: str | Path, value: Any, *, indent: int | None = 2) -> None:
    """Writes JSON and a newline. A kill leaves the old file or the new one."""
    write_text(path, json.dumps(value, indent=indent) + "\n")


def write_text(path: str | Path, text: str) -> None:
    """Writes text in UTF-8. A kill leaves the old file or the new one."""
    write_bytes(path, text.encode())


def write_bytes(path: str | Path, data: bytes) -> None:
    """Writes bytes. A kill leaves the old file or the new one."""
    with replacing(path) as file:
        file.write(data)


@contextlib.contextmanager
def replacing(path: str | Path) -> Iterator[BinaryIO]:
    """Opens a file beside `path`, which takes its place where the block ends without an exception.

    Several processes may write the same `path`: the last one wins.
    """
    path = Path(path)
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            yield file
            sync(file)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def whole_folder(path: str | Path) -> Iterator[Path]:
    """Gives an empty folder PATH.partial, which becomes `path` where the block ends without an exception.

    After an exception it is gone; after a kill it is not.
    """
    path = Path(path)
    partial = partial_path(path)
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        yield partial
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    partial.rename(path)


def fingerprint(folder: Path, paths: Iterable[Path]) -> str:
    """A hash of some files: of their names below `folder`, their sizes, and what is in them.

    Of a file of more than 1 MiB it is that of 256 samples from its beginning to its end, so that a model of any size
    takes no time: what differs in a stretch of more than a 256th of it is seen.
    """
    result = hashlib.blake2b(digest_size=16)
    for path in sorted(paths):
        size = path.stat().st_size
        result.update(f"{path.relative_to(folder)}\0{size}\0".encode())
        with open(path, "rb") as file:
            if size <= _SAMPLES * _SAMPLE_BYTES:
                result.update(file.read())
                continue
            for i in range(_SAMPLES):
                file.seek(i * (size - _SAMPLE_BYTES) // (_SAMPLES - 1))
                result.update(file.read(_SAMPLE_BYTES))
    return result.hexdigest()


def sync(file: IO[Any]) -> None:
    """Flushes a file down to the disk."""
    file.flush()
    os.fsync(file.fileno())


def whole_lines(path: Path, group: int = 1) -> int:
    """Drops a torn line at the end of a file, or a torn group of so many lines, and returns how many lines it has."""
    lines = end = kept = 0
    with open(path, "rb") as file:
        for line in file:
            if line.endswith(b"\n"):
                lines, end = lines + 1, end + len(line)
                kept = end if lines % group == 0 else kept
    os.truncate(path, kept)
    return lines - lines % group


def check_output(
    path: str | Path,
    *,
    overwrite: bool = False,
    folder: bool = False,
    flag: str = "--output",
) -> None:
    """Refuses an output that is there already, or that can't be written.

    Args:
      path: the file or folder to be written.
      overwrite: it may be a file that is there.
      folder: it is to be a folder, and isn't to be there.
      flag: what names the output.

    Raises:
      InputError: it is there, or is no file; or it has no folder to lie in, or none where a file can be written.
    """
    path = Path(path)
    check_place(path, flag)
    if path.is_dir() and not folder:
        raise InputError(f"{flag} = {path}: is a folder. Name a file in it.")
    if path.exists() and not path.is_file() and not folder:
        raise InputError(f"{flag} = {path}: is no file, but a device or a pipe. Name a file.")
    if os.path.lexists(path) and not overwrite:
        remedy = "Remove it" if folder else "Give --overwrite to replace it"
        raise InputError(f"{flag} = {path}: is there already. {remedy}, or name another.")
    if not path.parent.is_dir():
        raise InputError(f"{flag} = {path}: there is no folder {str(path.parent)!r}. Make it first.")
    _check_writable(path.parent, path, flag)


def check_appended(path: str | Path, flag: str = "--output") -> None:
    """Raises InputError where a file can't be appended to, or made with its folders."""
    path = Path(path)
    if path.is_dir():
        raise InputError(f"{flag} = {path}: is a folder. Name a file in it.")
    if not path.exists():
        check_folder(path.parent, flag)
        check_place(path, flag)
    elif not os.access(path, os.W_OK):
        raise InputError(f"{flag} = {path}: can't be written to. Name another.")


def check_apart(output: str | Path, inputs: Iterable[str | Path], flag: str = "--output") -> None:
    """Refuses an output that would take the place of something that is read.

    Args:
      output: the file or folder to be written.
      inputs: files, folders, and patterns such as DIR/*.jsonl; names of what isn't on the disk are passed over.
      flag: what names the output.

    Raises:
      InputError: the output, or what it is called until it is complete, is one of the inputs, or it is there already in
        a folder of data; or its name is too long.
    """
    path = Path(output)
    check_place(path, flag)
    written = [each for each in (path, partial_path(path)) if each.is_file()]
    for entry in inputs:
        for read in map(Path, (entry, *glob.glob(str(entry), recursive=True))):
            same = any(read.samefile(each) for each in written) if os.path.isfile(read) else False
            if same or (os.path.isdir(read) and path.is_file() and _is_data_of(read, path)):
                raise InputError(f"{flag} = {output}: is read by this command, as {entry}. Name another file.")


def _is_data_of(folder: Path, file: Path) -> bool:
    """Whether a file lies in a folder that is no model's, which has a config.json, but one of data."""
    return not (folder / "config.json").exists() and file.resolve().is_relative_to(folder.resolve())


def check_folder(path: str | Path, flag: str) -> None:
    """Raises InputError where there can't be a folder with files in it, before anything is written.

    A file or a broken link is in the way, the name is too long, or nothing can be written there.
    """
    check_place(Path(path), flag)
    whole = Path(path).absolute()
    there = next(each for each in (whole, *whole.parents) if os.path.lexists(each))
    if not there.is_dir():
        what = "a file" if there.exists() else "a link that leads nowhere"
        raise InputError(f"{flag} = {path}: {there} is {what}. Name a folder.")
    _check_writable(there, path, flag)


def check_place(path: Path, flag: str) -> None:
    """Raises InputError where a name, or the path with what is written below or beside it, is too long; or where it
    lies in the checkpoints of a run, which removes them."""
    whole = path.absolute()
    for above in whole.parents:
        if above.name == "checkpoints" and (above.parent / "config.json").is_file():
            raise InputError(
                f"{flag} = {path}: lies in the checkpoints of a run, which removes them. Name another place."
            )
    longest = max(len(os.fsencode(name)) for name in whole.parts)
    room = os.pathconf("/", "PC_NAME_MAX") - len(f".partial.json.{os.getpid()}.tmp")
    if longest > room:
        raise InputError(f"{flag} = {path}: has a name of {longest} bytes, and there is room for {room}. Shorten it.")
    size, room = len(os.fsencode(whole)), os.pathconf("/", "PC_PATH_MAX") - _BELOW
    if size > room:
        raise InputError(f"{flag} = {path}: is {size} bytes long, and there is room for {room}. Shorten it.")


def _check_writable(folder: Path, path: str | Path, flag: str) -> None:
    """Raises InputError where nothing can be made in a folder: permissions don't tell all of it, as in /proc."""
    try:
        os.rmdir(tempfile.mkdtemp(prefix=".understudy-", dir=folder))
    except OSError as error:
        raise InputError(
            f"{flag} = {path}: {folder} can't be written to ({error.strerror}). Name another place."
        ) from error


def partial_path(path: Path) -> Path:
    """Where an output lies until it is complete."""
    return path.with_name(f"{path.name}.partial")


def check_identity(
    path: Path, before: Mapping[str, Any], now: Mapping[str, Any], reasons: Mapping[str, str] | None = None
) -> None:
    """Compares what decides an output now with what decided it when it was begun.

    Args:
      path: the unfinished output, for the error.
      before: name -> value, read from JSON.
      now: name -> value, plain enough for JSON.
      reasons: name -> what the error says where that one differs; {} in it stands for the value before.

    Raises:
      InputError: a value differs. The message names the first that does.
    """
    for name, value in json.loads(json.dumps(dict(now))).items():
        if before.get(name) != value:
            reason = (reasons or {}).get(name, f"{name} was {{}}, and is {value!r} now").format(repr(before.get(name)))
            raise InputError(
                f"{path}: was begun by another command: {reason}. Give that command again, or remove this to begin "
                "anew."
            )


class SteadyFile:
    """A file that grows by pieces, each whole. What there is no room for is kept, and written with what follows.

    Args:
      path: of the file, which is made where it is missing.
      say: prints a line when a piece can't be written for the first time.
    """

    def __init__(self, path: str | Path, say: Callable[[str], None]):
        self._path, self._say = path, say
        self._file = open(path, "ab", buffering=0)  # noqa: SIM115
        self._end = self._file.tell()
        self._waiting: list[bytes] = []

    def write(self, piece: bytes) -> None:
        self._waiting.append(bytes(piece))
        if (fault := self._write()) and len(self._waiting) == 1:
            self._say(f"{self._path}: can't be written ({fault}); what is to be there is kept until it can")

    def flush(self) -> None:
        """Nothing waits here that could be written."""

    def close(self) -> None:
        """Says what there is still no room for, which is lost."""
        fault = self._write() if self._waiting else ""
        try:
            self._file.close()
        except OSError as error:  # storage on a network may say only now that it is full
            fault = fault or str(error.strerror)
        if fault:
            self._say(f"{self._path}: can't be written ({fault}); the end of it is lost")

    def _write(self) -> str:
        """Writes what waits. Returns why it can't; "" where it could."""
        data = b"".join(self._waiting)
        try:
            written = 0
            while written < len(data):
                written += self._file.write(data[written:])
        except OSError as error:
            with contextlib.suppress(OSError):
                self._file.truncate(self._end)
            return str(error.strerror)
        self._end += len(data)
        self._waiting.clear()
        return ""


class ResumableLines:
    """An output of lines that a killed run leaves in part. The same command goes on from there.

    Until it is complete, the lines lie in OUTPUT.partial, and what decides them in OUTPUT.partial.json.

    Attributes:
      done: how many whole lines an earlier run left.
    """

    def __init__(
        self,
        output: Path,
        identity: Mapping[str, Any],
        reasons: Mapping[str, str] | None = None,
        group: int = 1,
    ):
        """Creates OUTPUT.partial, or drops what is torn at the end of the one that is there.

        Args:
          output: where the lines are to be in the end.
          identity: all that decides the lines, plain enough for JSON.
          reasons: see check_identity.
          group: so many lines are made together, and would be others in the last bits if they weren't.

        Raises:
          InputError: it can't be written, or is the work of another command.
        """
        self._output, self._partial = output, partial_path(output)
        self._identity = self._partial.with_name(f"{self._partial.name}.json")
        try:
            if self._partial.exists():
                check_identity(self._partial, read_json(self._identity, {}), identity, reasons)
            else:
                write_json(self._identity, dict(identity))
                self._partial.touch()
            self.done = whole_lines(self._partial, group)
            self._file = open(self._partial, "ab")  # noqa: SIM115
        except OSError as error:
            raise InputError(f"{output}: can't be written ({error.strerror}). Name another file.") from error

    def append(self, lines: Iterable[bytes]) -> None:
        """Adds lines, each with its newline. When it returns, a kill leaves them all."""
        self._file.writelines(lines)
        self._file.flush()

    def finish(self, select: Callable[[list[bytes]], Iterable[bytes]] | None = None) -> None:
        """Gives the output its name; with `select`, it holds what that returns for all of the lines."""
        sync(self._file)
        self.close()
        if select is None:
            self._partial.replace(self._output)
        else:
            write_bytes(self._output, b"".join(select(self._lines())))
            self._partial.unlink()
        self._identity.unlink()

    def _lines(self) -> list[bytes]:
        with open(self._partial, "rb") as file:
            return list(file)

    def close(self) -> None:
        """Leaves the lines where they are, for the next run."""
        self._file.close()

    def __enter__(self) -> "ResumableLines":
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()
