"""Curves of a page, which its own script (charts.js) draws: it shows values under the pointer, a part that is dragged
over, and a logarithmic scale, and needs neither a server nor another file."""

import dataclasses
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from research.studies.pages import escape

_MOST = 1500  # points of a curve: beyond it, the least and the greatest of each stretch are kept
_LOG_SCALE = ("loss", "nll", "perplexity", "bits_per_byte", "grad_norm", "update_ratio")


@dataclasses.dataclass(frozen=True)
class Curve:
    """One line of a chart.

    Attributes:
      name: in the legend.
      steps: [N] int64, in order.
      values: [N] float64; what isn't finite is a cross at the foot.
      color, dash: numbers of the line's colour and style.
      low, high: [N] float64, edges of a band around it; None for no band.
    """

    name: str
    steps: np.ndarray
    values: np.ndarray
    color: int = 0
    dash: int = 0
    low: np.ndarray | None = None
    high: np.ndarray | None = None


@dataclasses.dataclass(frozen=True)
class Chart:
    """A title, curves over steps, and the steps at which a run went on.

    Attributes:
      title: above it.
      curves: at least one.
      log: whether the scale is logarithmic at first.
      percent: whether values are shares.
      resumes: steps at which a run went on after a stop.
    """

    title: str
    curves: Sequence[Curve]
    log: bool = False
    percent: bool = False
    resumes: Sequence[int] = ()


def figure(chart: Chart) -> str:
    """The chart as HTML, for a page that ends with `script()`."""
    content = {
        "title": chart.title,
        "log": chart.log,
        "percent": chart.percent,
        "colors": len({curve.color for curve in chart.curves}) < len(chart.curves),
        "resumes": [int(step) for step in chart.resumes],
        "curves": [_content(curve) for curve in chart.curves],
    }
    text = json.dumps(content, separators=(",", ":"), allow_nan=False).replace("<", "\\u003c")
    return (
        f'<figure class="chart"><figcaption><b>{escape(chart.title)}</b></figcaption>'
        f'<script type="application/json">{text}</script></figure>'
    )


def script() -> str:
    """What draws the charts of a page."""
    return (Path(__file__).parent / "charts.js").read_text(encoding="utf-8")


def suits_log(title: str, values: Sequence[np.ndarray]) -> bool:
    """Whether a metric is read best on a logarithmic scale: one of a kind that falls by its size, over a wide range."""
    finite = np.concatenate([each[np.isfinite(each)] for each in values]) if values else np.zeros(0)
    return title in _LOG_SCALE and bool(finite.size and finite.min() > 0 and finite.max() / finite.min() > 10)


def moving_mean(values: np.ndarray) -> np.ndarray | None:
    """Centred mean over a twelfth of the curve, non-finite values left out; None where the curve needs none.

    Args:
      values: [N] float64.

    Returns:
      [N] float64 or None.
    """
    finite = np.isfinite(values)
    width = len(values) // 12
    if width < 3 or finite.sum() < 3:
        return None
    seen = values[finite]
    if np.abs(np.diff(seen, n=2)).mean() < 0.01 * np.ptp(seen):
        return None
    window = np.ones(2 * (width // 2) + 1)
    total = np.convolve(np.where(finite, values, 0.0), window, "same")
    count = np.convolve(finite.astype(np.float64), window, "same")
    return np.divide(total, count, out=np.full_like(values, np.nan), where=finite & (count > 0))


def thin(values: np.ndarray, most: int = _MOST) -> np.ndarray:
    """The places of a curve that are drawn: all of a short one; of a long one the least and the greatest of each
    stretch, and what isn't finite.

    Args:
      values: [N] float64.
      most: places, but for those that aren't finite.

    Returns:
      int64, in order.
    """
    count = len(values)
    if count <= most:
        return np.arange(count)
    places = {0, count - 1, *np.flatnonzero(~np.isfinite(values)).tolist()}
    for stretch in np.array_split(np.arange(count), (most - 2) // 2):
        own = values[stretch]
        if np.isfinite(own).any():
            places |= {int(stretch[np.nanargmin(own)]), int(stretch[np.nanargmax(own)])}
    return np.array(sorted(places))


def _content(curve: Curve) -> dict[str, Any]:
    values = np.where(np.isfinite(curve.values), curve.values, np.nan)
    places, smooth = thin(values), moving_mean(values) if curve.low is None else None
    content = {"name": curve.name, "color": curve.color, "dash": curve.dash}
    content |= {"x": curve.steps[places].tolist(), "y": _numbers(values[places])}
    for name, each in (("smooth", smooth), ("low", curve.low), ("high", curve.high)):
        if each is not None:
            content[name] = _numbers(each[places])
    return content


def _numbers(values: np.ndarray) -> list[float | None]:
    """Five digits of each, and None in the place of what isn't finite."""
    return [float(f"{x:.5g}") if math.isfinite(x) else None for x in values.tolist()]
