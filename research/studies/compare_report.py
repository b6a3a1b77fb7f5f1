"""The report of a study that compares ways to train: each metric over seeds, as a table and as curves."""

import csv
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from scipy import stats

from research.errors import InputError
from research.run.metrics import read_metrics
from research.studies import report as pages

LEVEL = 0.95
METHOD = (
    "Means over seeds of the last evaluation, and in brackets 95 % intervals of the mean by Student's t distribution; "
    "with one seed there are none. Curves: means over seeds, between the least and the greatest."
)


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
    half = float(stats.t.ppf((1 + LEVEL) / 2, n - 1) * np.std(values, ddof=1) / math.sqrt(n))
    return Mean(m, m - half, m + half)


def report(
    runs: Mapping[str, Sequence[str]], metrics: Sequence[str], workdir: str, *, gap: tuple[str, str] | None = None
) -> None:
    """Writes table.csv, table.json, a PNG for each metric and report.html into a folder, and prints the table.

    A study returns functools.partial(report, runs, metrics), or one with `gap` set as well.

    Args:
      runs: name of a way to train -> workdirs of its runs, one a seed.
      metrics: such as "eval/test/loss". A way none of whose runs has it is shown without.
      workdir: of the study.
      gap: names of a weak way and of a strong one: the table gets a column for each metric with the share of the gap
        between their means that a way has recovered (PGR, arXiv:2312.09390, section 3.1), without interval.

    Raises:
      InputError: no run of any way has a metric.
    """
    curves = {name: [_curves(run, metrics) for run in seeds] for name, seeds in runs.items()}
    rows: list[dict[str, Any]] = []
    for name, seeds in curves.items():
        row: dict[str, Any] = {"name": name, "seeds": len(seeds)}
        for metric in metrics:
            last = [curve[metric][max(curve[metric])] for curve in seeds if curve[metric]]
            row[metric] = mean(last) if last else None
        rows.append(row)
    recovered = _recovered(rows, metrics, gap) if gap else {}
    for metric in metrics:
        if all(row[metric] is None for row in rows):
            raise InputError(f"{metric}: no run of the study has this metric. Look at their eval sections.")
    out = Path(workdir)
    out.mkdir(parents=True, exist_ok=True)
    header = ["", "seeds", *metrics, *(f"PGR of {metric}" for metric in recovered)]
    shown = [
        [row["name"], str(row["seeds"]), *(_text(row[metric]) for metric in metrics)]
        + [f"{share[row['name']]:.3f}" if row["name"] in share else "-" for share in recovered.values()]
        for row in rows
    ]
    values = [
        {k: v._asdict() if isinstance(v, Mean) else v for k, v in row.items()}
        | {"runs": list(runs[row["name"]])}
        | {f"PGR of {metric}": share.get(row["name"]) for metric, share in recovered.items()}
        for row in rows
    ]
    (out / "table.json").write_text(json.dumps(_plain(values), indent=2) + "\n")
    with open(out / "table.csv", "w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["name", "seeds", *(f"{m}{part}" for m in metrics for part in ("", " low", " high"))])
        for row in rows:
            cells = [row[m] or Mean(math.nan, math.nan, math.nan) for m in metrics]
            flat = ["" if math.isnan(x) else x for cell in cells for x in cell]
            writer.writerow([row["name"], row["seeds"], *flat])
    drawn = ""
    for metric in metrics:
        png = {theme: plot(metric, curves, theme) for theme in pages.THEMES}
        (out / f"{metric.replace('/', '_')}.png").write_bytes(png["light"])
        drawn += pages.picture(png, metric)
    body = [f"<h1>Comparison</h1><p>{pages.escape(METHOD)}</p>", pages.table(header, shown, "numbers")]
    body.append(f'<div class="plots">{drawn}</div>')
    (out / "report.html").write_text(pages.page("Comparison", body), encoding="utf-8")

    widths = [max(len(line[i]) for line in [header, *shown]) for i in range(len(header))]
    for line in [header, *shown]:
        print("  ".join(text.ljust(n) for text, n in zip(line, widths, strict=True)).rstrip())
    print(f"\n{METHOD}\n\nin full in {out / 'report.html'}, {out / 'table.csv'} and {out / 'table.json'}")


def plot(metric: str, curves: Mapping[str, Sequence[Mapping[str, Mapping[int, float]]]], theme: str = "light") -> bytes:
    """Returns a PNG of a metric over steps, in a colour for each way to train."""
    figure, axes = pages.new_axes(metric, "step", theme)
    for i, (name, seeds) in enumerate(curves.items()):
        color = pages.COLORS[i % len(pages.COLORS)]
        points = [curve[metric] for curve in seeds if curve[metric]]
        steps = sorted(set.intersection(*(set(p) for p in points))) if points else []
        if steps:
            y = np.array([[p[step] for step in steps] for p in points])
            axes.plot(steps, y.mean(axis=0), color=color, label=name, linewidth=1.6, marker="o", markersize=3)
            axes.fill_between(steps, y.min(axis=0), y.max(axis=0), color=color, alpha=0.18, linewidth=0)
    if axes.get_legend_handles_labels()[0]:
        ink = pages.THEMES[theme]["ink"]
        axes.legend(frameon=False, fontsize=8, labelcolor=ink, loc="upper left", bbox_to_anchor=(1.0, 1.0))
    return pages.to_png(figure)


def _curves(run: str, metrics: Sequence[str]) -> dict[str, dict[int, float]]:
    """metric -> step -> value."""
    found: dict[str, dict[int, float]] = {metric: {} for metric in metrics}
    for record in read_metrics(run):
        for metric in metrics:
            if metric in record:
                found[metric][int(record["step"])] = record[metric]
    return found


def _recovered(
    rows: Sequence[Mapping[str, Any]], metrics: Sequence[str], gap: tuple[str, str]
) -> dict[str, dict[str, float]]:
    """metric -> way -> (way - weak) / (strong - weak); nothing where there is no gap."""
    of = {row["name"]: row for row in rows}
    found: dict[str, dict[str, float]] = {}
    for metric in metrics:
        weak, strong = (of[name][metric].value if of[name][metric] else math.nan for name in gap)
        if abs(strong - weak) > 0:
            found[metric] = {
                name: (row[metric].value - weak) / (strong - weak)
                for name, row in of.items()
                if name not in gap and row[metric]
            }
    return found


def _text(cell: Mean | None) -> str:
    if cell is None:
        return "-"
    return f"{cell.value:.4g}" + ("" if math.isnan(cell.low) else f" [{cell.low:.4g}, {cell.high:.4g}]")


def _plain(value: Any) -> Any:
    """nan, which JSON lacks, becomes None."""
    if isinstance(value, Mapping):
        return {k: _plain(v) for k, v in value.items()}
    if isinstance(value, list):
        return [_plain(v) for v in value]
    return None if isinstance(value, float) and math.isnan(value) else value
