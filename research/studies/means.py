"""Means over seeds, with intervals."""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

LEVEL = 0.95


class Mean(NamedTuple):
    """A mean and its interval, which is nan with one value."""

    value: float
    low: float
    high: float


def mean(values: Sequence[float]) -> Mean:
    """Mean with a two-sided interval at LEVEL: m +- t s / sqrt(n), s with n - 1 in its denominator."""
    m, n = float(np.mean(values)), len(values)
    if n < 2:
        return Mean(m, math.nan, math.nan)
    half = student_quantile(LEVEL, n - 1) * float(np.std(values, ddof=1)) / math.sqrt(n)
    return Mean(m, m - half, m + half)


def text(cell: Mean | None, digits: int = 3) -> str:
    """A mean with its interval, where it has one: "0.712 [0.695, 0.73]"; "-" for none."""
    if cell is None:
        return "-"
    value, low, high = (f"{number:.{digits}g}" for number in cell)
    return value if math.isnan(cell.low) else f"{value} [{low}, {high}]"


def student_quantile(level: float, freedom: int) -> float:
    """The t with P(|T| < t) = level, of Student's distribution.

    With t = sqrt(freedom) tan(angle) the probability is a finite sum in cos(angle) (Abramowitz and Stegun, Handbook of
    Mathematical Functions, 26.7.3 and 26.7.4), which grows with the angle: bisection finds it to the last bits.

    Args:
      level: in (0, 1).
      freedom: degrees of freedom, at least 1.
    """
    low, high = 0.0, math.pi / 2
    while low < (middle := (low + high) / 2) < high:
        low, high = (middle, high) if _student_probability(middle, freedom) < level else (low, middle)
    return math.sqrt(freedom) * math.tan(low)


def _student_probability(angle: float, freedom: int) -> float:
    """P(|T| < sqrt(freedom) tan(angle))."""
    odd, square = freedom % 2, math.cos(angle) ** 2
    term, terms = math.cos(angle) if odd else 1.0, []
    for k in range(1, freedom // 2 + 1):
        terms.append(term)
        term *= square * (2 * k / (2 * k + 1) if odd else (2 * k - 1) / (2 * k))
    total = math.sin(angle) * math.fsum(terms)
    return (angle + total) * 2 / math.pi if odd else total
