"""Times and memory of this process, and work done in turn. Peers measure with it as well, so it needs no library."""

import contextlib
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from research.devices import startup

ROUNDS = 4
PRODUCT = (1024, 8192)  # the size of the square matrices whose product says a peak: of CPUs, of other devices


class Failed(Exception):
    """What is measured in turn with others couldn't do its work: it is left out, and they go on."""


def peak_resident() -> int | None:
    """Bytes of this process's memory at its peak; None where the system doesn't say."""
    try:
        status = Path("/proc/self/status").read_text()
    except OSError:
        return None
    return next((int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith("VmHWM")), None)


def forget_peak() -> None:
    """Peak memory counts from here, where the system lets us; without what is free already."""
    startup.release_memory()
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def timed(work: Callable[[], Any], n: int) -> list[float]:
    """Seconds of each of n calls; each returns when all is done."""
    seconds = []
    for _ in range(n):
        began = time.perf_counter()
        work()
        seconds.append(time.perf_counter() - began)
    return seconds


def spread(seconds: Sequence[float]) -> dict[str, float]:
    """Median and quartiles of some measurements, and how many there were."""
    q1, median, q3 = statistics.quantiles(seconds, method="inclusive") if len(seconds) > 1 else seconds * 3
    return {"median": median, "q1": q1, "q3": q3, "n": len(seconds)}


def in_turn(runners: Mapping[str, Callable[[int], list[float]]], n: int) -> dict[str, list[float] | str]:
    """Runs each n times, a few at a time in turn, so that all see the same hours of a busy machine.

    Args:
      runners: name -> function that does its work k times and returns the seconds of each.
      n: how often.

    Returns:
      name -> n times; or, of one that failed, why.
    """
    rounds = min(ROUNDS, n)
    seconds: dict[str, Any] = {name: [] for name in runners}
    for i in range(rounds):
        for name, runner in runners.items():
            if isinstance(seconds[name], str):
                continue
            try:
                seconds[name] += runner(n * (i + 1) // rounds - n * i // rounds)
            except Failed as error:
                seconds[name] = str(error)
    return seconds
