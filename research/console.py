"""A console that never fails a process: it may be a closed pipe, a full disk, or not there."""

import contextlib
import io
import os
import re
import select
import sys

from research.errors import printable

_OWN = re.compile("(\r|\x1b\\[(?:[KA]|[0-9;]*m))")  # what lines of status and bars move the cursor by, and colours


class _Steady(io.RawIOBase):
    """A file descriptor to write to. What can't be written is dropped."""

    def __init__(self, fd: int):
        self._fd = fd

    def fileno(self) -> int:
        return self._fd

    def writable(self) -> bool:
        return True

    def isatty(self) -> bool:
        return os.isatty(self._fd)

    def write(self, data: memoryview) -> int:
        with contextlib.suppress(OSError):
            return os.write(self._fd, data)
        return len(data)


class _Terminal(io.TextIOWrapper):
    """Text for a terminal, which gets no escape sequences but those that are our own: see errors.printable."""

    def write(self, text: str) -> int:
        super().write("".join(part if i % 2 else printable(part) for i, part in enumerate(_OWN.split(text))))
        return len(text)


def steady(*, output: bool) -> None:
    """Has standard error, and with `output` standard output too, drop what can't be written; and a terminal get no
    escape sequences of others. To be called first: a file that is opened later would get the number of one that is
    closed, and what is printed by others."""
    for fd in range(3):
        try:
            os.fstat(fd)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # the lowest number that is free
    for name, fd in (("stdin", 0), ("stdout", 1), ("stderr", 2)):
        if getattr(sys, name) is None:
            setattr(sys, name, open(fd, "w" if fd else "r", encoding="utf-8", closefd=False))  # noqa: SIM115
    sys.stderr = _wrapped(2, sys.stderr, _Steady(2))
    if output or os.isatty(1):
        sys.stdout = _wrapped(1, sys.stdout, _Steady(1) if output else io.FileIO(1, "w", closefd=False))


def _wrapped(fd: int, before: io.TextIOWrapper, raw: io.RawIOBase) -> io.TextIOWrapper:
    by_line = before.line_buffering or before.write_through  # the latter by PYTHONUNBUFFERED
    options = {"encoding": before.encoding, "errors": before.errors, "line_buffering": by_line}
    make = _Terminal if os.isatty(fd) else io.TextIOWrapper
    return make(io.BufferedWriter(raw), write_through=True, **options)


def is_unread() -> bool:
    """Whether standard output is a pipe or a socket that nobody reads any more."""
    poll = select.poll()
    with contextlib.suppress(OSError, ValueError, AttributeError):
        poll.register(sys.stdout.fileno(), select.POLLOUT)
        return any(event & (select.POLLERR | select.POLLHUP | select.POLLNVAL) for _, event in poll.poll(0))
    return False


def drop_output() -> None:
    """Has all that is still to be printed to standard output go nowhere, also what is buffered."""
    with contextlib.suppress(OSError, ValueError, AttributeError):
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, sys.stdout.fileno())
        os.close(nowhere)
