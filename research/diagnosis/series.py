"""From the metrics of a run to numbers that say how they went: how they began, how they ended, whether they rise."""

import math
from collections.abc import Iterable, Mapping, Sequence

import numpy as np

Records = Sequence[Mapping[str, float]]

_FIRST = 3  # values that the beginning is the mean of
_LAST = 10  # values that the end is the mean of, at most, and at most a quarter of all
_ABOUT = ("step", "time")


def signals(records: Records) -> dict[str, float]:
    """The signals of a series of metrics, as metrics.jsonl has them.

    Of each metric X (of "train/X" without that prefix):
      X.first, X.last: the mean of the first three values, and of the last quarter, at most ten.
      X.start, X.end: the very first and the very last.
      X.mean, X.median, X.max, X.min, X.max_over_median, X.last_over_first: as they say.
      X.std_last: the spread of the last quarter.
      X.trend: the slope by least squares times the number of values, over the spread around the line.
      X.rise: the mean of the last third less that of the first, over the spread within thirds.
      X.peak: where the greatest value lies, 0 the beginning and 1 the end.
      X.nonfinite: the share of values that are no numbers, which count nowhere else.
    And `steps`; `logged`, how many records of training there are; `unique_batches`, the share of batches that were new.
    """
    made: dict[str, float] = {}
    for name, values in _columns(records).items():
        made |= {f"{name}.{what}": value for what, value in summary(values).items()}
    training = [record for record in records if any(key.startswith("train/") for key in record)]
    made["logged"] = float(len(training))
    made["steps"] = float(max((record["step"] for record in training), default=0))
    if (unique := _unique(training)) is not None:
        made["unique_batches"] = unique
    return made


def summary(values: Sequence[float]) -> dict[str, float]:
    """The numbers of one metric; see `signals`. What isn't finite counts only in `nonfinite`."""
    everything = np.asarray(values, np.float64)
    x = everything[np.isfinite(everything)]
    made = {"nonfinite": 1 - len(x) / len(everything)}
    if not len(x):
        return made
    last = x[-max(1, min(_LAST, len(x) // 4)) :]
    quarter = x[-max(2, len(x) // 4) :]
    first, end, median = float(np.mean(x[:_FIRST])), float(np.mean(last)), float(np.median(x))
    made |= {"first": first, "last": end, "median": median, "max": float(x.max()), "min": float(x.min())}
    made |= {"mean": float(x.mean()), "start": float(x[0]), "end": float(x[-1])}
    made |= {"std_last": float(np.std(quarter)), "peak": float(np.argmax(x)) / max(len(x) - 1, 1)}
    if median:
        made["max_over_median"] = made["max"] / median
    if first:
        made["last_over_first"] = end / first
    if len(x) >= 4:
        made["trend"], made["rise"] = _trend(x), _rise(x)
    return made


def _trend(x: np.ndarray) -> float:
    """Slope by least squares times the number of values, over the spread of what is left; 0 of a constant."""
    t = np.arange(len(x))
    slope, intercept = np.polyfit(t, x, 1)
    spread = float(np.std(x - slope * t - intercept))
    change = slope * len(x)
    scale = max(spread, 1e-12 * max(1.0, float(np.abs(x).max())))
    return float(change / scale) if abs(change) > 1e-9 * max(float(np.abs(x).max()), 1e-30) else 0.0


def _rise(x: np.ndarray) -> float:
    """The mean of the last third less that of the first, over the spread within thirds; 0 of a constant."""
    n = len(x) // 3
    a, b = x[: max(n, 1)], x[-max(n, 1) :]
    spread = math.sqrt((float(np.var(a)) + float(np.var(b))) / 2)
    change = float(b.mean() - a.mean())
    scale = max(spread, 1e-12 * max(1.0, float(np.abs(x).max())))
    return change / scale if abs(change) > 1e-9 * max(float(np.abs(x).max()), 1e-30) else 0.0


def _columns(records: Records) -> dict[str, list[float]]:
    """Metric -> its values in order; those of training without "train/"."""
    columns: dict[str, list[float]] = {}
    for record in records:
        for name, value in record.items():
            if name not in _ABOUT and "/" in name and not name.startswith("startup/"):
                columns.setdefault(name.removeprefix("train/"), []).append(float(value))
    for name in ("batch_hash",):
        columns.pop(name, None)
    return columns


def _unique(training: Records) -> float | None:
    """The share of batches that were new: counted where each step has its hash, else as the run counted them."""
    hashes = [record["train/batch_hash"] for record in training if "train/batch_hash" in record]
    if hashes and len(hashes) == len(training):
        return len(set(hashes)) / len(hashes)
    shares = _values(training, "train/unique_batches")
    return float(np.mean(shares)) if shares else None


def _values(records: Records, name: str) -> list[float]:
    return [record[name] for record in records if name in record]


def points(records: Iterable[Mapping[str, float]], name: str) -> tuple[list[int], list[float]]:
    """(steps, values) of one metric by its whole name, for a plot."""
    pairs = [(int(record["step"]), float(record[name])) for record in records if name in record]
    return [step for step, _ in pairs], [value for _, value in pairs]
