"""What SIGTERM, SIGINT and SIGHUP mean to a run from its process's first moment to its last.

Before the loop there is nothing to save: the process ends at once with status 75, also while XLA compiles, when Python
runs no handler. In the loop run/loop.py takes them. Once all is done they change nothing any more.
"""

import contextlib
import os
import signal
import threading
from types import FrameType

from research.errors import Exit

STOPS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)  # SIGHUP: the terminal was closed


def hold() -> None:
    """Has signals wait until `begin`, also while the process begins anew by exec."""
    signal.pthread_sigmask(signal.SIG_BLOCK, STOPS)


def begin() -> None:
    """From now on signals end the process with PREEMPTED. One that is ignored (nohup) stays so."""
    taken = [number for number in STOPS if signal.getsignal(number) != signal.SIG_IGN]
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
    for number in taken:
        signal.signal(number, _leave)
    threading.Thread(target=_watch, args=(reader,), daemon=True, name="signals").start()
    signal.pthread_sigmask(signal.SIG_UNBLOCK, STOPS)


def end() -> None:
    """The process's status is decided: signals no longer change it."""
    for number in STOPS:
        signal.signal(number, signal.SIG_IGN)


def _watch(reader: int) -> None:
    """Ends the process where a signal comes that `_leave` would take: the main thread may be in XLA for minutes."""
    while numbers := os.read(reader, 64):
        for number in numbers:
            if signal.getsignal(number) is _leave:
                _leave(number, None)


def _leave(number: int, _: FrameType | None) -> None:
    with contextlib.suppress(OSError):
        os.write(2, f"{signal.Signals(number).name}: stopped. The same command goes on.\n".encode())
    os._exit(Exit.PREEMPTED)
