"""What a user types on a terminal, with editing, history and pasted lines together; and a sign of life meanwhile."""

import contextlib
import select
import sys
import threading
import time
from collections.abc import Callable

PROMPT = "> "
_PASTE_SECONDS = 0.05  # lines that come within this after another were pasted with it
_QUIET_SECONDS = 1.0  # before a sign of life
_CLEAR = "\r\x1b[K"


def make_reader() -> Callable[[], str]:
    """Returns a function that reads the user's next turn, and raises EOFError after the last.

    On a terminal arrow keys edit the line and bring earlier ones back, where Python has readline, and lines that are
    pasted together are one turn. What comes from a file or a pipe is a turn a line.
    """
    if not (sys.stdin.isatty() and sys.stdout.isatty()):
        return _read_line
    with contextlib.suppress(ImportError):
        import readline  # to import it is to use it; some Pythons have none

        readline.parse_and_bind("set enable-bracketed-paste on")  # Python turns it off, for its own prompt
    return _read_turn


def _read_line() -> str:
    print(PROMPT, end="", file=sys.stderr, flush=True)
    return input()


def _read_turn() -> str:
    lines = [input(PROMPT)]
    with contextlib.suppress(EOFError):
        while select.select([sys.stdin], [], [], _PASTE_SECONDS)[0]:  # of terminals that don't mark what is pasted
            lines.append(input())
    return "\n".join(lines)


class SignOfLife:
    """Counts the seconds on the last line of a terminal until `end`; elsewhere it says nothing.

    Args:
      what: is being done.
    """

    def __init__(self, what: str):
        self._what, self._over = what, threading.Event()
        self._thread = threading.Thread(target=self._count, daemon=True) if sys.stderr.isatty() else None

    def __enter__(self) -> "SignOfLife":
        if self._thread is not None:
            self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self.end()

    def end(self) -> None:
        """Takes the line away."""
        self._over.set()
        if self._thread is not None:
            self._thread.join()
            self._thread = None

    def _count(self) -> None:
        began, shown = time.monotonic(), False
        while not self._over.wait(_QUIET_SECONDS):
            print(f"{_CLEAR}{self._what} {time.monotonic() - began:.0f} s", end="", file=sys.stderr, flush=True)
            shown = True
        if shown:
            print(_CLEAR, end="", file=sys.stderr, flush=True)
