"""Plots, by matplotlib: curves of runs, of ways to train, of weak-to-strong pairs, of costs, and of rewards; each is a
figure, which to_png and to_vector write."""

import dataclasses
import io
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib import colormaps, rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import EngFormatter, FuncFormatter, LogLocator, MaxNLocator, NullLocator
from PIL import Image

from research.studies.charts import moving_mean, suits_log
from research.studies.history import Run, title_of
from research.studies.means import mean
from research.studies.pgr import Estimate, Group

COLORS = ("#4a7de0", "#e07b39", "#2f9e6e", "#c0487f", "#8a63d2", "#c9a227", "#3aa0b8", "#8c6d5a")
THEMES = {
    "light": {"face": "#ffffff", "ink": "#333842", "grid": "#e6e8ec"},
    "dark": {"face": "#1b1e24", "ink": "#c9ced8", "grid": "#333842"},
}
_BAD = "#d33b3b"
_OUTSIDE = {"loc": "upper left", "bbox_to_anchor": (1.0, 1.0)}  # of a legend

# A metric of several ways to train: way -> its seeds' curves, each metric -> step -> value.
Ways = Mapping[str, Sequence[Mapping[str, Mapping[int, float]]]]


def plot_curves(title: str, metrics: Sequence[str], runs: Sequence[Run], theme: str = "light") -> Figure:
    """Returns a plot with the curves of `metrics` over steps.

    With one run, colours tell metrics apart; with several, colours tell runs and line styles tell metrics
    apart. A noisy curve is faint under its moving mean; a step whose value isn't finite is a cross at the foot.

    Args:
      title: of the plot, which decides its scale too.
      metrics: at least one run has each.
      runs: to draw.
      theme: of THEMES.
    """
    figure, axes = _new_axes(title_of(title), "step", theme)
    curves = _Curves(title, metrics, runs, THEMES[theme]["ink"])
    broken = curves.draw(axes)
    curves.scale(axes)
    curves.add_legend(axes, broken)
    return figure


def plot_ways(metric: str, ways: Ways, theme: str = "light") -> Figure:
    """Returns a plot of a metric over steps, in a colour for each way to train: the mean, the range of the seeds, and
    faintly the points of each."""
    figure, axes = _new_axes(metric, "step", theme)
    for i, (name, seeds) in enumerate(ways.items()):
        points = [curve[metric] for curve in seeds if curve[metric]]
        steps = sorted(set.intersection(*(set(p) for p in points))) if points else []
        if steps:
            color = COLORS[i % len(COLORS)]
            y = np.array([[p[step] for step in steps] for p in points])
            axes.plot(steps, y.mean(axis=0), color=color, label=name, linewidth=1.6, marker="o", markersize=3)
            if len(y) > 1:
                axes.plot(np.tile(steps, (len(y), 1)).T, y.T, "o", color=color, markersize=1.8, alpha=0.5)
            axes.fill_between(steps, y.min(axis=0), y.max(axis=0), color=color, alpha=0.18, linewidth=0)
    _add_legend(axes, theme)
    return figure


def plot_methods(
    title: str,
    cells: Mapping[str, Estimate],
    points: Mapping[str, Sequence[float]],
    bands: Mapping[str, Estimate],
    theme: str = "light",
) -> Figure:
    """Returns a plot with methods on the x axis: of each its value with the interval, and a point for each seed.

    Args:
      title: of the plot.
      cells: method -> (value, low, high); low and high are nan where there is no interval.
      points: method -> values of its seeds.
      bands: name -> (value, low, high) of what all methods are beside: lines across, with their intervals as bands.
      theme: of THEMES.
    """
    figure, axes = _new_axes(title, "", theme)
    ink, places = THEMES[theme]["ink"], np.arange(len(cells))
    for (name, (value, low, high)), style in zip(bands.items(), (":", "--", "-."), strict=False):
        axes.axhline(value, color=ink, linewidth=1.2, linestyle=style, label=name)
        if math.isfinite(low):
            axes.axhspan(low, high, color=ink, alpha=0.1, linewidth=0)
    for place, (name, (value, low, high)) in zip(places, cells.items(), strict=True):
        color, own = COLORS[place % len(COLORS)], points.get(name, ())
        axes.plot(place + 0.16 + np.zeros(len(own)), own, "o", color=color, markersize=3, alpha=0.55)
        errors = [[_length(value - low)], [_length(high - value)]]
        axes.errorbar([place], [value], yerr=errors, color=color, marker="s", markersize=5, capsize=3, linestyle="")
    axes.set_xlim(-0.6, len(cells) - 0.4)
    crowded = sum(map(len, cells)) > 50
    axes.set_xticks(
        places, list(cells), **({"rotation": 35, "ha": "right", "rotation_mode": "anchor"} if crowded else {})
    )
    _add_legend(axes, theme)
    return figure


def plot_over_field(
    metric: str, field: str, points: Sequence[tuple[float, Sequence[float]]], theme: str = "light"
) -> Figure:
    """Returns a plot of a metric over a field of numbers: the mean with its interval, and a point for each seed.

    Args:
      metric: what is drawn upwards.
      field: what is drawn to the right; on a logarithmic scale where it spans more than a factor of 10.
      points: (value of the field, values of the seeds), in order.
      theme: of THEMES.
    """
    figure, axes = _new_axes(metric, field, theme)
    x, means = [each for each, _ in points], [mean(values) for _, values in points]
    errors = [[_length(m.value - m.low) for m in means], [_length(m.high - m.value) for m in means]]
    axes.errorbar(x, [m.value for m in means], yerr=errors, color=COLORS[0], marker="o", markersize=4, capsize=2.5)
    for each, values in points:
        axes.plot([each] * len(values), values, "o", color=COLORS[1], markersize=3, alpha=0.6)
    if min(x) > 0 and max(x) / min(x) > 10:
        axes.set_xscale("log")
        axes.set_xlabel(f"{field} (log scale)", color=THEMES[theme]["ink"], fontsize=9)
    return figure


def plot_calibration(bins: Mapping[str, np.ndarray], theme: str = "light") -> Figure:
    """Returns a plot of how often a model is right over how sure it is; on the diagonal it is calibrated.

    Args:
      bins: name of a model -> [K, 3], of each bin the mean confidence, the share that is right, and the count.
      theme: of THEMES.
    """
    figure, axes = _new_axes("calibration: share that is right", "confidence", theme)
    low = min(float(each[:, 0].min()) for each in bins.values())
    axes.plot([low, 1], [low, 1], color=THEMES[theme]["ink"], linewidth=0.8, alpha=0.6)
    for i, (name, each) in enumerate(bins.items()):
        sizes = 12 + 120 * each[:, 2] / each[:, 2].sum()
        axes.plot(each[:, 0], each[:, 1], color=COLORS[i % len(COLORS)], linewidth=1.4, label=name)
        axes.scatter(each[:, 0], each[:, 1], s=sizes, color=COLORS[i % len(COLORS)], alpha=0.8)
    _add_legend(axes, theme)
    return figure


def plot_pairs(quantity: str, title: str, groups: Sequence[Group], theme: str = "light") -> Figure:
    """Returns a plot over the size gap, parameters of strong over parameters of weak, in a colour for each loss.

    A line joins the weak sizes that supervise one strong size. With one pair of sizes the losses stand on the x axis,
    and weak and ceiling are bands.

    Args:
      quantity: "accuracy" (of student, with weak and ceiling beside) or "pgr"; groups that are excluded from PGR have
        none.
      title: of the plot.
      groups: to draw.
      theme: of THEMES.
    """
    if len({(group.weak_size, group.strong_size) for group in groups}) == 1:
        return _plot_pair(quantity, title, groups, theme)
    figure, axes = _new_axes(title, "parameters, strong / weak", theme)
    ink = THEMES[theme]["ink"]
    if quantity == "accuracy":
        pairs = list({(group.weak_size, group.strong_size): group for group in groups}.values())
        _draw_pairs(axes, pairs, "weak", label="weak", color=ink, linestyle=":", marker="v", alpha=0.7)
        _draw_pairs(axes, pairs, "ceiling", label="ceiling", color=ink, linestyle="--", marker="^", alpha=0.7)
    else:
        for y in (0, 1):
            axes.axhline(y, color=ink, linewidth=0.8, alpha=0.5)
    losses = list(dict.fromkeys(group.loss for group in groups))
    for i, loss in enumerate(losses):
        members = [g for g in groups if g.loss == loss and not (quantity == "pgr" and g.excluded)]
        _draw_pairs(
            axes,
            members,
            "student" if quantity == "accuracy" else "pgr",
            shift=1.02 ** (i - (len(losses) - 1) / 2),  # so that intervals lie side by side
            label=loss,
            color=COLORS[i % len(COLORS)],
            marker="os^vDPX*"[i // len(COLORS) % 8],
        )
    ratios = sorted({group.strong_params / group.weak_params for group in groups})
    axes.set_xscale("log")
    axes.set_xlim(ratios[0] / 1.3, ratios[-1] * 1.3)
    axes.set_xticks(ratios)
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:.3g}"))
    _add_legend(axes, theme)
    return figure


def _plot_pair(quantity: str, title: str, groups: Sequence[Group], theme: str) -> Figure:
    """plot_pairs with one pair of sizes."""
    name = "student" if quantity == "accuracy" else "pgr"
    shown = [group for group in groups if not (quantity == "pgr" and group.excluded)]
    cells = {group.loss: group.estimates[name] for group in shown}
    points = {group.loss: [x for x in group.points[name] if math.isfinite(x)] for group in shown}
    bands = {"supervisor": Estimate(0, math.nan, math.nan), "ceiling": Estimate(1, math.nan, math.nan)}
    if quantity == "accuracy":
        bands = {each: groups[0].estimates[each] for each in ("weak", "ceiling")}
    return plot_methods(title, cells, points, bands, theme)


def plot_costs(
    metric: str, cost: str, points: Mapping[str, tuple[float, float, float, float]], theme: str = "light"
) -> Figure:
    """Returns a plot of how good each way is, with its interval, over what it costs.

    Args:
      metric: what is drawn upwards.
      cost: what is drawn to the right, on a logarithmic scale.
      points: name of a way -> (cost, value, low, high); low and high are nan where there is no interval.
      theme: of THEMES.
    """
    figure, axes = _new_axes(metric, cost, theme)
    for i, (name, (x, value, low, high)) in enumerate(points.items()):
        errors = [[_length(value - low)], [_length(high - value)]]
        style = {"color": COLORS[i % len(COLORS)], "marker": "os^vDPX*"[i // len(COLORS) % 8], "label": name}
        axes.errorbar([x], [value], yerr=errors, capsize=2.5, markersize=6, linestyle="", **style)
    axes.set_xscale("log")
    _add_legend(axes, theme)
    return figure


def plot_rewards_over_kl(curves: Mapping[str, Any], theme: str = "light") -> Figure:
    """Returns a plot of the true reward (a line) and of the proxy (dashed) of policies on their way, over the square
    root of the KL from their start (arXiv:2210.10760, figure 1): means over seeds, and of the truth the range.

    Args:
      curves: name of a policy -> studies.lifecycle.Curve.
      theme: of THEMES.
    """
    figure, axes = _new_axes("true reward (line) and proxy (dashed)", "square root of the KL from the start", theme)
    for i, (name, curve) in enumerate(curves.items()):
        color, x = COLORS[i % len(COLORS)], np.sqrt(np.maximum(curve.kl.mean(axis=0), 0))
        axes.plot(x, curve.true.mean(axis=0), color=color, label=name, linewidth=1.6, marker="o", markersize=3)
        axes.fill_between(x, curve.true.min(axis=0), curve.true.max(axis=0), color=color, alpha=0.18, linewidth=0)
        axes.plot(x, curve.proxy.mean(axis=0), "--", color=color, linewidth=1.4)
    _add_legend(axes, theme)
    return figure


def plot_stages(stages: Mapping[str, Sequence[Sequence[float]]], theme: str = "light") -> Figure:
    """Returns a plot of the true reward and the proxy after each stage: a mark for each seed.

    Args:
      stages: name -> (true rewards, proxies), a value a seed.
      theme: of THEMES.
    """
    figure, axes = _new_axes("rewards after each stage", "", theme)
    for i, name in enumerate(("true", "proxy")):
        points = [(x, value) for x, values in enumerate(stages.values()) for value in values[i]]
        x, y = zip(*points, strict=True)
        axes.plot(np.array(x) + 0.12 * (2 * i - 1), y, "os"[i], color=COLORS[i], label=name, markersize=5, alpha=0.8)
    axes.set_xticks(range(len(stages)), list(stages))
    _add_legend(axes, theme)
    return figure


@dataclasses.dataclass(frozen=True)
class _Curves:
    """The curves of one plot. `ink` is the colour of its text."""

    title: str
    metrics: Sequence[str]
    runs: Sequence[Run]
    ink: str

    @property
    def labels(self) -> dict[str, str]:
        """metric -> what tells it apart from the others of this plot."""
        parts = {metric: [part for part in metric.split("/") if part != self.title] for metric in self.metrics}
        return {metric: "/".join(rest) or metric for metric, rest in parts.items()}

    @property
    def palette(self) -> dict[str, Any]:
        """metric -> colour where there is one run, else name of a run -> colour."""
        names = self.metrics if len(self.runs) == 1 else [run.name for run in self.runs]
        many = colormaps["viridis"](np.linspace(0.1, 0.9, len(names)))
        return dict(zip(names, COLORS if len(names) <= len(COLORS) else many, strict=False))

    @property
    def styles(self) -> dict[str, str]:
        """metric -> line style."""
        several = len(self.runs) > 1
        return {metric: ("-", "--", ":", "-.")[i % 4] if several else "-" for i, metric in enumerate(self.metrics)}

    def members(self) -> list[tuple[Run, str]]:
        return [(run, metric) for run in self.runs for metric in self.metrics if metric in run.series]

    def draw(self, axes: Axes) -> bool:
        """Draws the curves; says whether one has a value that isn't finite."""
        palette, styles, broken = self.palette, self.styles, False
        for run, metric in self.members():
            steps, values = run.series[metric]
            color = palette[metric if len(self.runs) == 1 else run.name]
            marker = "o" if len(steps) <= 40 else ""
            bad = ~np.isfinite(values)
            smooth = moving_mean(values)
            if smooth is not None:
                axes.plot(steps, values, color=color, linewidth=0.8, alpha=0.35)
                values = smooth
            axes.plot(steps, values, styles[metric], color=color, linewidth=1.6, marker=marker, markersize=3.5)
            if bad.any():
                broken = True
                axes.plot(steps[bad], [0.02] * bad.sum(), "x", color=_BAD, transform=axes.get_xaxis_transform())
        return broken

    def scale(self, axes: Axes) -> None:
        """Chooses the scales by the title and the range of the values."""
        seen = np.concatenate([run.series[metric][1] for run, metric in self.members()])
        seen = seen[np.isfinite(seen)]
        if suits_log(self.title, [seen]):
            axes.set_ylabel("log scale", color=self.ink, fontsize=8)
            axes.set_yscale("log")
            axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if seen.max() / seen.min() < 1000 else (1,)))
            axes.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{y:g}"))
            axes.yaxis.set_minor_formatter(FuncFormatter(lambda y, _: ""))
        elif self.title == "mfu":
            axes.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{100 * y:.4g}%"))
        elif seen.size and np.abs(seen).max() >= 10_000:
            axes.yaxis.set_major_formatter(EngFormatter(sep=""))
        axes.xaxis.set_major_locator(MaxNLocator(7, steps=(1, 2, 5, 10), integer=True))
        axes.xaxis.set_major_formatter(EngFormatter(sep=""))

    def add_legend(self, axes: Axes, broken: bool) -> None:
        labels, palette = self.labels, self.palette
        solid = {"linewidth": 1.6, "color": self.ink}
        keys = []
        if len(palette) > 1:
            keys += [Line2D([], [], label=labels.get(n, n), **solid | {"color": c}) for n, c in palette.items()]
        if len(self.runs) > 1 and len(self.metrics) > 1:
            styles = self.styles
            keys += [Line2D([], [], linestyle=styles[m], label=labels[m], **solid) for m in self.metrics]
        if broken:
            keys.append(Line2D([], [], linestyle="", marker="x", color=_BAD, label="not finite"))
        place = {"loc": "best"} if len(keys) <= 6 else _OUTSIDE
        if keys:
            axes.legend(handles=keys, frameon=False, fontsize=8, labelcolor=self.ink, **place)


def _draw_pairs(
    axes: Axes, groups: Sequence[Group], estimate: str, *, label: str, shift: float = 1.0, **style: Any
) -> None:
    """Draws an estimate with its interval over the size gap, a line for each strong size."""
    for size in dict.fromkeys(group.strong_size for group in groups):
        members = sorted((g for g in groups if g.strong_size == size), key=lambda g: g.strong_params / g.weak_params)
        x = [group.strong_params / group.weak_params * shift for group in members]
        y, low, high = zip(*(group.estimates[estimate] for group in members), strict=True)
        errors = [[_length(a - b) for a, b in zip(*ends, strict=True)] for ends in ((y, low), (high, y))]
        axes.errorbar(x, y, yerr=errors, capsize=2.5, markersize=4, linewidth=1.4, label=label, **style)
        label = ""  # once is enough


def _length(x: float) -> float:
    """Of an error bar, which can't be drawn to infinity."""
    return max(x, 0.0) if math.isfinite(x) else math.nan


def _new_axes(title: str, xlabel: str, theme: str) -> tuple[Figure, Axes]:
    """A figure that looks as all plots here do."""
    style = THEMES[theme]
    figure = Figure(figsize=(6.4, 3.7), dpi=150, layout="constrained", facecolor=style["face"])
    figure.get_layout_engine().set(w_pad=0.12, h_pad=0.1)
    axes = figure.add_subplot(facecolor=style["face"])
    axes.set_title(title, color=style["ink"], fontsize=12, loc="left", pad=8)
    axes.set_xlabel(xlabel, color=style["ink"], fontsize=9)
    axes.tick_params(which="both", colors=style["ink"], labelsize=9, length=0)
    axes.grid(True, color=style["grid"], linewidth=0.8)
    axes.set_axisbelow(True)
    for name, spine in axes.spines.items():
        spine.set_visible(name == "bottom")
        spine.set_color(style["grid"])
    return figure, axes


def _add_legend(axes: Axes, theme: str) -> None:
    if axes.get_legend_handles_labels()[0]:
        axes.legend(frameon=False, fontsize=8, labelcolor=THEMES[theme]["ink"], **_OUTSIDE)


def to_vector(figure: Figure, kind: str) -> bytes:
    """A figure as "svg" or "pdf", the same bytes each time; a PDF has its texts as letters, for papers."""
    written, date = io.BytesIO(), {"svg": "Date", "pdf": "CreationDate"}[kind]
    with rc_context({"svg.hashsalt": "understudy", "pdf.fonttype": 42}):
        figure.savefig(written, format=kind, metadata={date: None})
    return written.getvalue()


def to_png(figure: Figure) -> bytes:
    """A figure as a PNG of at most 256 colours."""
    full, png = io.BytesIO(), io.BytesIO()
    figure.savefig(full, format="png")
    small = Image.open(full).convert("RGB").quantize(256, Image.Quantize.MAXCOVERAGE)
    small.save(png, "PNG")
    return png.getvalue()
