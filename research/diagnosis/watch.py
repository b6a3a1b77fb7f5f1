"""A check of a run's metrics while it trains: the causes that these alone show. Nothing of the run is imported here."""

import dataclasses
import json
import os
import time
from collections.abc import Callable, Mapping
from typing import Any

from research.diagnosis import ranking, report, series
from research.diagnosis.types import Evidence

_SHARE = 0.01  # of the time since the check before that a check may take
_RECORDS = 400  # that are looked at, evenly over all


@dataclasses.dataclass
class Watch:
    """Looks at WORKDIR/metrics.jsonl every so many steps, and has a line for each cause that it finds the first time.

    A check whose turn comes is left for the next line of metrics until the one before it was less than 1 % of the time
    since then.

    Attributes:
      path: of the metrics.
      stage: of the run, one of types.STAGES.
      every: steps between checks.
      signals: what is known of the config, by name.
      clock: seconds.
    """

    path: str
    stage: str
    every: int
    signals: Mapping[str, float] = dataclasses.field(default_factory=dict)
    clock: Callable[[], float] = time.perf_counter

    def __post_init__(self) -> None:
        self._said: set[str] = set()
        self._last, self._ended, self._cost = 0, self.clock(), 0.0

    def __call__(self, step: int) -> list[str]:
        """Lines to print after a step, whose metrics are written."""
        began = self.clock()
        if step < self._last + self.every or self._cost > _SHARE * (began - self._ended):
            return []
        lines = self._check()
        self._last, self._ended = step, self.clock()
        self._cost = self._ended - began
        return lines

    def _check(self) -> list[str]:
        records = _thinned(_read(self.path))
        evidence = Evidence(self.stage, True, {**self.signals, **series.signals(records)})
        new = [each for each in ranking.diagnose(evidence).findings if each.cause.name not in self._said]
        self._said |= {each.cause.name for each in new}
        return [f"warning  {report.line(each)} `understudy diagnose` says more." for each in new]


def _read(path: str) -> list[dict[str, Any]]:
    """The records of a metrics file; a last line that is half written is left out."""
    if not os.path.exists(path):
        return []
    records = []
    with open(path, encoding="utf-8") as file:
        for text in file:
            if text.endswith("\n"):
                records.append({k: float(v) if isinstance(v, str) else v for k, v in json.loads(text).items()})
    return records


def _thinned(records: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """At most _RECORDS of the records of training, evenly, and all others."""
    stride = max(len(records) // _RECORDS, 1)
    return [
        record
        for number, record in enumerate(records)
        if number % stride == 0 or number >= len(records) - 10 or not any(name.startswith("train/") for name in record)
    ]
