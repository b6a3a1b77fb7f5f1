"""Who writes to a place: a workdir or an output belongs to one process at a time.

A small file beside what is written says who: host, process, start and command. It is touched every few seconds. An
owner of this host is gone when its process is; one of another host, on storage that both share, when its file was left
alone for a minute by the storage's own clock, and while the next to come looks at it. That one takes over.
"""

import contextlib
import fcntl
import json
import os
import shlex
import sys
import threading
import time
import uuid
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from research import files
from research.errors import Exit, InputError, printable

BEAT_SECONDS = 5.0
STALE_SECONDS = 60.0
OF_FOLDER, OF_OUTPUT = "owner.json", ".owner"  # the name in a folder; what follows that of an output
_SETTLE_SECONDS = 1.0  # in which two hosts that take over at once come to see who was last
_SHOWN = 200  # letters of a command


@contextlib.contextmanager
def own_folder(folder: str | Path, flag: str) -> Iterator[None]:
    """Has a folder for the block. It is made where it is missing, and removed again if it stays empty.

    Args:
      folder: a workdir.
      flag: what names it, for errors.

    Raises:
      InputError: another process has it, or it can't be made.
    """
    files.check_folder(folder, flag)
    with _made(Path(folder)), _own(Path(folder).resolve() / OF_FOLDER, f"{flag} = {folder}"):
        yield


@contextlib.contextmanager
def own_output(path: str | Path, flag: str = "--output", *, parents: bool = False) -> Iterator[None]:
    """Has an output for the block: a file, or a folder that is written whole.

    Args:
      path: of the output.
      flag: what names it, for errors.
      parents: folders above it are made. Otherwise nothing is done where they are missing, which its own check says.

    Raises:
      InputError: another process has it, or nothing can be written there.
    """
    path = Path(path)
    if parents:
        files.check_folder(path.parent, flag)
    if not parents and not path.parent.is_dir():
        yield
        return
    files.check_place(path, flag)
    with _made(path.parent), _own(path.parent.resolve() / f"{path.name}{OF_OUTPUT}", f"{flag} = {path}"):
        yield


@contextlib.contextmanager
def new_folder(path: str | Path) -> Iterator[str]:
    """Makes a folder that no other process has: PATH, or PATH-2, PATH-3 ...; removed again if it stays empty."""
    path = Path(path)
    with _made(path.parent):
        for place in (path if i == 1 else path.with_name(f"{path.name}-{i}") for i in range(1, 10**6)):
            with contextlib.suppress(FileExistsError):
                place.mkdir()
                break
        try:
            yield str(place)
        finally:
            with contextlib.suppress(OSError):
                place.rmdir()


@contextlib.contextmanager
def _made(folder: Path) -> Iterator[None]:
    """Makes a folder and those above it; of these, the ones that are empty after the block are removed."""
    missing = [each for each in (folder, *folder.parents) if not each.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    try:
        yield
    finally:
        with contextlib.suppress(OSError):
            for each in missing:
                each.rmdir()


@contextlib.contextmanager
def _own(lock: Path, what: str) -> Iterator[None]:
    mine = _myself()
    try:
        _take(lock, mine, what)
    except OSError as error:
        raise InputError(
            f"{what}: {lock.parent} can't be written to ({error.strerror}). Name another place."
        ) from error
    over = threading.Event()
    thread = threading.Thread(target=_beat, args=(lock, mine, what, over), daemon=True, name="owner")
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()
        _release(lock, mine)


def _myself() -> dict[str, Any]:
    command = shlex.join(sys.argv)
    return {
        **_here(),
        "host": os.uname().nodename,
        "pid": os.getpid(),
        "ticks": _ticks(os.getpid()),
        "started": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "command": command if len(command) <= _SHOWN else f"{command[:_SHOWN]} ...",
        "token": uuid.uuid4().hex,
    }


def _here() -> dict[str, str]:
    """What tells a set of process numbers from all others: a start of a machine, and a container on it."""
    boot, space = "", ""
    with contextlib.suppress(OSError):
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        space = os.readlink("/proc/self/ns/pid")
    return {"boot": boot or os.uname().nodename, "space": space}


def _ticks(pid: int) -> int | None:
    """When a process began, in ticks since the machine did; None where it isn't known; 0 of one that has ended."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        return 0 if fields[0] in "ZX" else int(fields[19])  # fields 3 and 22 of proc(5)
    except (OSError, ValueError, IndexError):
        return None


def _is_here(owner: Mapping[str, Any]) -> bool:
    return all(owner.get(name) == value for name, value in _here().items())


def _is_alive(owner: Mapping[str, Any]) -> bool:
    """Whether an owner of this host is still there."""
    try:
        os.kill(owner["pid"], 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    now = _ticks(owner["pid"])
    return now is None or now == owner.get("ticks", now)


def _take(lock: Path, mine: Mapping[str, Any], what: str) -> None:
    """Puts this process into a lock that is free, or whose owner is gone. Raises InputError where another has it."""
    seen, said, began = None, False, time.monotonic()
    while True:
        watched = time.monotonic() - began > 2 * BEAT_SECONDS  # the storage's clock alone may be set ahead
        with _alone(lock.parent):
            owner, beat = _read(lock)
            if beat is None:
                if _create(lock, mine):
                    return
                continue
            here = bool(owner) and _is_here(owner)
            if here and _is_alive(owner):
                raise _taken(what, owner)
            if here or (watched and _age(lock.parent, beat) > STALE_SECONDS):
                _put(lock, mine)
                if here:
                    return
                time.sleep(_SETTLE_SECONDS)
                if _read(lock)[0].get("token") == mine["token"]:
                    return
                continue
        if seen not in (None, beat):
            raise _taken(what, owner)
        seen = beat
        if not said:
            said = True
            print(f"{what}: {_describe(owner)} has it; waiting for a sign of life from there", file=sys.stderr)
        time.sleep(min(1.0, BEAT_SECONDS / 4))


def _taken(what: str, owner: Mapping[str, Any]) -> InputError:
    command = f" ({owner['command']})" if owner.get("command") else ""
    return InputError(f"{what}: {_describe(owner)} has it{command}. Wait until it has ended, or name another.")


def _describe(owner: Mapping[str, Any]) -> str:
    if not owner:
        return "another process"
    return printable(f"process {owner.get('pid')} on {owner.get('host')}, begun {owner.get('started')},")


def _read(lock: Path) -> tuple[dict[str, Any], int | None]:
    """(owner, when its file was touched in ns) of a lock; {} where it doesn't say who, None where nobody has it. It is
    opened anew, so that storage on a network tells the time of now."""
    try:
        with open(lock, "rb") as file:
            beat, content = os.fstat(file.fileno()).st_mtime_ns, file.read()
    except FileNotFoundError:
        return {}, None
    try:
        owner = json.loads(content)
        return (owner if isinstance(owner, dict) and isinstance(owner.get("pid"), int) else {}), beat
    except ValueError:
        return {}, beat


def _age(folder: Path, beat: int) -> float:
    """Seconds since a time that the storage of a folder gave a file, by its own clock."""
    probe = folder / f"{OF_OUTPUT}-{uuid.uuid4().hex}"
    try:
        probe.touch()
        return (probe.stat().st_mtime_ns - beat) / 1e9
    finally:
        probe.unlink(missing_ok=True)


@contextlib.contextmanager
def _written(lock: Path, mine: Mapping[str, Any]) -> Iterator[Path]:
    temporary = lock.with_name(f"{lock.name}-{mine['token'][:12]}")
    try:
        temporary.write_text(json.dumps(mine) + "\n")
        yield temporary
    finally:
        temporary.unlink(missing_ok=True)


def _create(lock: Path, mine: Mapping[str, Any]) -> bool:
    """Makes a lock that isn't there; False where another process was faster."""
    with _written(lock, mine) as temporary:
        try:
            os.link(temporary, lock)  # whole or not at all, on NFS too
        except FileExistsError:
            return False
        except OSError:  # storage without links
            try:
                with open(lock, "x") as file:
                    file.write(temporary.read_text())
            except FileExistsError:
                return False
    return True


def _put(lock: Path, mine: Mapping[str, Any]) -> None:
    """Puts this process in the place of an owner that is gone."""
    with _written(lock, mine) as temporary:
        temporary.replace(lock)


@contextlib.contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Keeps the processes of this host from looking and taking at the same time, where the storage can."""
    fd = os.open(folder, os.O_RDONLY)
    try:
        with contextlib.suppress(OSError):
            fcntl.flock(fd, fcntl.LOCK_EX)
        yield
    finally:
        os.close(fd)


def _beat(lock: Path, mine: Mapping[str, Any], what: str, over: threading.Event) -> None:
    """Touches a lock until `over`. Ends this process where another has taken it: it was silent for too long."""
    while not over.wait(BEAT_SECONDS):
        with contextlib.suppress(OSError):
            owner, beat = _read(lock)
            if beat is None:
                _create(lock, mine)  # removed by hand
            elif owner.get("token", mine["token"]) != mine["token"] and not over.is_set():
                print(
                    f"error: {what}: {_describe(owner)} has taken it, since this process was silent for more than "
                    f"{STALE_SECONDS:.0f} s. This one ends.",
                    file=sys.stderr,
                    flush=True,
                )
                os._exit(Exit.LOST)
            else:
                os.utime(lock)


def _release(lock: Path, mine: Mapping[str, Any]) -> None:
    with contextlib.suppress(OSError), _alone(lock.parent):
        if _read(lock)[0].get("token") == mine["token"]:
            lock.unlink()
