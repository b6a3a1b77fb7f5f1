"""The temporaries of a step on a CPU: their memory is kept for the next step.

XLA's CPU client asks malloc for them at each step and frees them after it. glibc would map and unmap what is so large,
and the system has to clear it each time, and a hypervisor to find it: a tenth of a step's time, more after a pause.
"""

import ctypes
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax

from research.devices import startup

_TRIM_THRESHOLD, _MMAP_MAX = -1, -4  # of mallopt(3)
_OVERLAPPING = 160 * 2**20  # bytes: where temporaries are below, those of two steps may be there at once
_SETTLING = 8  # steps
_PATIENCE = 0.05  # seconds


def keep(step: Callable[..., Any], size: int) -> Callable[..., Any]:
    """Has glibc's malloc keep from now on what a step frees, where startup.use_huge_pages did something.

    XLA frees temporaries a moment after the results are there, and a step that begins in between takes as much again.
    So where they are above 160 MiB each step waits for those of the last.

    Args:
      step: the program that runs most: (state, ...) -> (state, metrics).
      size: of its temporaries, in bytes.

    Returns:
      The step to call from now on.
    """
    waits = size > _OVERLAPPING
    if not startup.has_huge_pages() or (waits and not _known()):
        return step
    startup.mallopt(_MMAP_MAX, 0)
    startup.mallopt(_TRIM_THRESHOLD, -1)
    return _OneByOne(step, size) if waits else step


class _OneByOne:
    """A step that begins only when the memory of the last one is free, and so finds it again.

    It lies elsewhere where something else has got a few bytes of it meanwhile, as happens at the first steps. Then the
    old place is given back to the system as soon as the step has the new one.
    """

    def __init__(self, step: Callable[..., Any], size: int):
        self._step, self._size = step, size
        self._results: Any = None
        self._others = 0  # bytes that all else has
        self._calls, self._resident = 0, 0

    def __call__(self, *args: Any) -> Any:
        if self._results is not None:
            jax.block_until_ready(self._results)
            _wait(lambda: not self._has_memory())
        self._others, resident = _allocated(), _resident()
        state, self._results = self._step(*args)
        if self._calls < _SETTLING or resident > self._resident + self._size // 2:
            _wait(lambda: self._has_memory() or all(x.is_ready() for x in jax.tree.leaves(self._results)))
            startup.release_memory()
            self._resident = resident
        self._calls += 1
        return state, self._results

    def _has_memory(self) -> bool:
        return _allocated() > self._others + self._size // 2


class _Mallinfo(ctypes.Structure):
    """struct mallinfo2, see mallinfo(3)."""

    _names = "arena ordblks smblks hblks hblkhd usmblks fsmblks uordblks fordblks keepcost"
    _fields_ = [(name, ctypes.c_size_t) for name in _names.split()]


def _known() -> bool:
    """Whether the system says what `_allocated` and `_resident` ask; not before glibc 2.33."""
    try:
        return bool(ctypes.CDLL(None).mallinfo2) and _resident() > 0
    except (OSError, AttributeError):
        return False


def _allocated() -> int:
    """Bytes that malloc has given out."""
    mallinfo = ctypes.CDLL(None).mallinfo2
    mallinfo.restype = _Mallinfo
    return mallinfo().uordblks


def _resident() -> int:
    """Bytes of memory that this process has."""
    return int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1]) * os.sysconf("SC_PAGE_SIZE")


def _wait(until: Callable[[], bool]) -> None:
    """Waits until something holds, but not for long."""
    latest = time.monotonic() + _PATIENCE
    while not until() and time.monotonic() < latest:
        time.sleep(0.0002)
