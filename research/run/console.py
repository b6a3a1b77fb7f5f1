"""What a run shows: lines of metrics, and a line of status that says what is going on while there are none."""

import contextlib
import logging
import math
import os
import sys
import time
from collections.abc import Iterator, Mapping
from typing import Any, TextIO

from tqdm import tqdm

from research import progress
from research.errors import printable

_AGAIN = 10.0  # seconds after which a log says again how far something has come
_COUNTS = ("skipped", "empty", "nonfinite", "unused", "identical")  # metrics that say something where they aren't 0


class Status(logging.Handler):
    """Shows what research.progress is told: on a terminal as a line that the next one takes the place of; elsewhere as
    lines, each thing once, and again after some seconds how far it has come."""

    def __init__(self, stream: TextIO):
        super().__init__(logging.INFO)
        self.stream, self.bar = stream, None  # bar: of tqdm, whose description says it instead
        self._terminal = on_terminal(stream)
        self._said: dict[str, float] = {}
        self._drawn = False

    def emit(self, record: logging.LogRecord) -> None:
        """Shows one message: "WHAT" or "WHAT: HOW FAR"."""
        text = printable(record.getMessage())
        what, now = text.partition(": ")[0], time.monotonic()
        if self.bar is not None:
            self.bar.set_description_str(text)
        elif self._terminal:
            width = os.get_terminal_size(self.stream.fileno()).columns
            self.stream.write(f"\r\x1b[K{text[: width - 1]}")
            self.stream.flush()
            self._drawn = True
        elif now - self._said.get(what, -math.inf) > _AGAIN and (what not in self._said or ": " in text):
            self._said[what] = now
            print(f"...      {text}", file=self.stream, flush=True)

    def clear(self) -> None:
        """Takes the line of status away, for what is to stay."""
        if self._drawn:
            self.stream.write("\r\x1b[K")
            self._drawn = False


@contextlib.contextmanager
def shown(active: bool) -> Iterator[None]:
    """Within, what research.progress is told is shown on stderr; not where this isn't the process that prints."""
    if not active:
        yield
        return
    status, level = Status(sys.stderr), progress.LOGGER.level
    progress.LOGGER.addHandler(status)
    progress.LOGGER.setLevel(logging.INFO)
    try:
        yield
    finally:
        status.clear()
        progress.LOGGER.removeHandler(status)
        progress.LOGGER.setLevel(level)


def line(text: str) -> None:
    """Prints a line that stays, above what is drawn."""
    for status in _statuses():
        status.clear()
    tqdm.write(printable(text), file=sys.stderr)


def use_bar(bar: Any) -> None:
    """From now on a bar of tqdm says what is going on; None: there is none."""
    for status in _statuses():
        status.clear()
        status.bar = bar


def _statuses() -> list[Status]:
    return [handler for handler in progress.LOGGER.handlers if isinstance(handler, Status)]


def on_terminal(stream: Any) -> bool:
    """Whether a stream is a terminal whose width is known."""
    return bool(stream.isatty() and os.get_terminal_size(stream.fileno()).columns)


def describe(values: Mapping[str, float]) -> str:
    """Returns values as a line to read: "loss 1.234  lr 1.0e-03  23.1k tok/s  MFU 41%  eval  loss 1.3"."""
    formats = {
        "loss": lambda v: f"loss {v:.4g}",
        "reward": lambda v: f"reward {v:.4g}",
        "rollout/agreeing": lambda v: f"agreeing {v:.0%}",
        "grad_norm": lambda v: f"grad_norm {v:.3g}",
        "learning_rate": lambda v: f"lr {v:.1e}",
        "epoch": lambda v: f"epoch {v:.2f}",
        "tokens_per_second": lambda v: f"{tqdm.format_sizeof(v)} tok/s",
        "mfu": lambda v: f"MFU {v:.0%}",
    }
    train = [show(values[f"train/{name}"]) for name, show in formats.items() if f"train/{name}" in values]
    groups: dict[str, dict[str, float]] = {}
    for name, value in values.items():
        group, slash, rest = name.partition("/")
        if group != "train":
            groups.setdefault(group if slash else "", {})[rest or name] = value
    return "  ".join(train + ["  ".join([*filter(None, [group]), *_listed(own)]) for group, own in groups.items()])


def _listed(values: Mapping[str, float]) -> list[str]:
    """Values with their names: the loss first, none twice, no counts that are 0, and parts of a value behind it, as in
    "exact_match 0.5 (copy 1, sort 0)"."""
    loss = values.get("loss")
    left = {name: value for name, value in values.items() if value or not name.rpartition("/")[2].startswith(_COUNTS)}
    if loss is not None and left.get("nll") == loss:
        del left["nll"]
    listed = []
    for name in sorted(left, key=lambda name: name != "loss"):
        if name.rpartition("/")[0] in left:
            continue
        parts = {other: value for other, value in left.items() if other.rpartition("/")[0] == name}
        told = ", ".join(f"{other[len(name) + 1 :]} {_shown(value)}" for other, value in parts.items())
        differ = len(parts) > 1 and any(value != left[name] for value in parts.values())
        listed.append(f"{name} {_shown(left[name])}" + (f" ({told})" if differ else ""))
    return listed


def _shown(value: float) -> str:
    """Four digits, and a count with all of its own."""
    return f"{value:,.0f}" if abs(value) >= 1e4 and float(value).is_integer() else f"{value:.4g}"


def duration(seconds: float) -> str:
    """Returns "1:23" (minutes:seconds), "1:02:03" or "2d 1:02:03"."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    days, hours = divmod(hours, 24)
    clock = f"{hours}:{minutes:02}:{seconds:02}" if days or hours else f"{minutes}:{seconds:02}"
    return f"{days}d {clock}" if days else clock


def size(count: float) -> str:
    """Returns a count as "812", "98.6 k", "6.84 M" or "1.3 G"."""
    for unit, name in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if count >= unit:
            return f"{count / unit:.3g} {name}"
    return f"{count:.0f}"
