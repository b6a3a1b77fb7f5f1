"""The report of a study that compares ways to train: each metric over seeds, as a table and as curves."""

import csv
import dataclasses
import functools
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from research import files
from research.errors import InputError, did_you_mean
from research.run.metrics import read_metrics
from research.studies import means, pages, paper
from research.studies.means import Mean, mean
from research.studies.paper import Table
from research.studies.tables import text_table

_DIGITS = 4
METHOD = (
    "Means over seeds of the last evaluation, and in brackets 95 % intervals of the mean by Student's t distribution; "
    "with one seed there are none. Curves: means over seeds, between the least and the greatest."
)


@dataclasses.dataclass(frozen=True)
class Way:
    """A way to train.

    Attributes:
      name: as the study calls it.
      runs: workdirs, one a seed.
      curves: of each run, metric -> step -> value.
      means: metric -> mean over the seeds of its last value; None where no run has it.
      recovered: metric -> share of the gap between a weak way and a strong one, None of these two; metrics without a
        gap aren't there.
      differences: metric -> mean over the seeds of what it has more of the metric than another way, whose run of the
        same place is subtracted; None where one of the two has none, or their runs aren't as many.
    """

    name: str
    runs: Sequence[str]
    curves: Sequence[Mapping[str, Mapping[int, float]]]
    means: Mapping[str, Mean | None]
    recovered: Mapping[str, float | None] = dataclasses.field(default_factory=dict)
    differences: Mapping[str, Mean | None] = dataclasses.field(default_factory=dict)


def report(
    runs: Mapping[str, Sequence[str]],
    metrics: Sequence[str],
    workdir: str,
    *,
    gap: tuple[str, str] | None = None,
    base: str = "",
) -> None:
    """Writes table.csv, .json, .md and .tex, two plots of each metric (PNG, SVG, PDF) and report.html into a folder,
    and prints the table.

    A study returns functools.partial(report, runs, metrics), or one with `gap` or `base` set as well.

    Args:
      runs: name of a way to train -> workdirs of its runs, one a seed.
      metrics: such as "eval/test/loss". A way none of whose runs has it is shown without.
      workdir: of the study.
      gap: names of a weak way and of a strong one: the table gets a column for each metric with the share of the gap
        between their means that a way has recovered (PGR, arXiv:2312.09390, section 3.1), without interval.
      base: name of a way that the others are compared with, seed by seed: a second table has the mean differences.
        Where runs of a seed share their start or their data, these have narrower intervals than the means.

    Raises:
      InputError: `base` is none of the ways; no run of any way has a metric; or matplotlib isn't installed: the tables
        are written then.
    """
    if base and base not in runs:
        raise InputError(f"base = {base!r}: the study has no such way.{did_you_mean(base, runs)}")
    ways = [read_way(name, seeds, metrics) for name, seeds in runs.items()]
    for metric in metrics:
        if all(way.means[metric] is None for way in ways):
            raise InputError(f"{metric}: no run of the study has this metric. Look at their eval sections.")
    if gap:
        ways = with_recovered(ways, *gap)
    if base:
        ways = with_differences(ways, base)
    out = Path(workdir)
    out.mkdir(parents=True, exist_ok=True)
    files.write_json(out / "table.json", [_as_json(way) for way in ways])
    _write_csv(out / "table.csv", ways, metrics)
    header, rows = table(ways, metrics)
    tables = [Table("Means", ["way", *header[1:]], rows)]
    tables += [Table(_heading(base), ["way", *metrics], difference_rows(ways))] if base else []
    tables.append(Table("Seeds", ["way", "run", *metrics], seed_rows(ways, metrics)))
    paper.write(out, "Comparison", tables, METHOD)
    print(text_table([header, *rows]))
    if base:
        print(f"\n{_heading(base)}:\n{text_table([['', *metrics], *difference_rows(ways)])}")
    print(f"\n{METHOD}\n\nin full in {out / 'report.html'}, table.md, table.tex, table.csv and table.json")
    _write_page(out, ways, metrics, tables)


def read_way(name: str, runs: Sequence[str], metrics: Sequence[str]) -> Way:
    """Reads the metrics of the runs of a way to train."""
    curves = [_read_curves(run, metrics) for run in runs]
    means: dict[str, Mean | None] = {}
    for metric in metrics:
        last = _last(curves, metric)
        means[metric] = mean(last) if last else None
    return Way(name, list(runs), curves, means)


def with_recovered(ways: Sequence[Way], weak: str, strong: str) -> list[Way]:
    """The ways with the shares of the gap that they have recovered: (way - weak) / (strong - weak), of means.

    Args:
      ways: all of them.
      weak, strong: names of two, which get no share themselves.
    """
    by_name = {way.name: way for way in ways}
    bounds = {}
    for metric in ways[0].means:
        low, high = by_name[weak].means[metric], by_name[strong].means[metric]
        if low and high and low.value != high.value:
            bounds[metric] = (low.value, high.value)
    shares = []
    for way in ways:
        recovered: dict[str, float | None] = dict.fromkeys(bounds)
        for metric, (low, high) in bounds.items():
            cell = way.means[metric]
            if cell and way.name not in (weak, strong):
                recovered[metric] = (cell.value - low) / (high - low)
        shares.append(dataclasses.replace(way, recovered=recovered))
    return shares


def with_differences(ways: Sequence[Way], base: str) -> list[Way]:
    """The ways with their differences from one of them, which gets none itself.

    Args:
      ways: all of them; the runs of each stand in the same order of seeds.
      base: name of the one that is subtracted.
    """
    other = next(way for way in ways if way.name == base)
    results = []
    for way in ways:
        differences: dict[str, Mean | None] = {}
        for metric in way.means:
            values, others = _last(way.curves, metric), _last(other.curves, metric)
            paired = len(values) == len(others) == len(way.runs) == len(other.runs)
            differences[metric] = mean(np.subtract(values, others).tolist()) if paired else None
        results.append(dataclasses.replace(way, differences=differences) if way is not other else way)
    return results


def difference_rows(ways: Sequence[Way]) -> list[list[str]]:
    """Returns a row of text for each way that is compared with another."""
    return [
        [way.name, *(means.text(each, _DIGITS) for each in way.differences.values())] for way in ways if way.differences
    ]


def table(ways: Sequence[Way], metrics: Sequence[str]) -> tuple[list[str], list[list[str]]]:
    """Returns the heading and the rows, as text."""
    header = ["", "seeds", *metrics, *(f"PGR of {metric}" for metric in ways[0].recovered)]
    rows = []
    for way in ways:
        shares = ["-" if share is None else f"{share:.3f}" for share in way.recovered.values()]
        rows.append([way.name, str(len(way.runs)), *(means.text(way.means[m], _DIGITS) for m in metrics), *shares])
    return header, rows


def seed_rows(ways: Sequence[Way], metrics: Sequence[str]) -> list[list[str]]:
    """A row of text for each run: its last values."""
    return [
        [way.name, str(place), *(f"{c[m][max(c[m])]:.4g}" if c[m] else "-" for m in metrics)]
        for way in ways
        for place, c in enumerate(way.curves, start=1)
    ]


def _write_csv(path: Path, ways: Sequence[Way], metrics: Sequence[str]) -> None:
    missing = Mean(math.nan, math.nan, math.nan)
    with open(path, "w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        columns = [*metrics, *dict.fromkeys(f"difference of {m}" for way in ways for m in way.differences)]
        writer.writerow(["name", "seeds", *(f"{name}{part}" for name in columns for part in ("", " low", " high"))])
        for way in ways:
            cells = {**way.means, **{f"difference of {m}": cell for m, cell in way.differences.items()}}
            numbers = [x for name in columns for x in cells.get(name) or missing]
            writer.writerow([way.name, len(way.runs), *("" if math.isnan(x) else x for x in numbers)])


def _write_page(out: Path, ways: Sequence[Way], metrics: Sequence[str], tables: Sequence[Table]) -> None:
    """Writes the plots and report.html."""
    plots = pages.load_plots()
    curves, pictures = {way.name: way.curves for way in ways}, ""
    for metric in metrics:
        name = metric.replace("/", "_")
        cells = {way.name: cell for way in ways if (cell := way.means[metric])}
        points = {way.name: _last(way.curves, metric) for way in ways}
        draw = functools.partial(plots.plot_methods, f"{metric}, last", cells, points, {})
        pictures += pages.plot(out, f"{name}_last", draw, f"last {metric} of each way")
        pictures += pages.plot(out, name, functools.partial(plots.plot_ways, metric, curves), f"{metric} over steps")
    *shown, seeds = tables
    body = ["<h1>Comparison</h1>", *map(paper.section, shown), f'<div class="plots">{pictures}</div>']
    body += [paper.section(seeds, folded=True), f"<p>{pages.escape(METHOD)}</p>"]
    body.append(paper.section(paper.settings(out), folded=True))
    files.write_text(out / "report.html", pages.page("Comparison", body))


def _read_curves(run: str, metrics: Sequence[str]) -> dict[str, dict[int, float]]:
    """metric -> step -> value."""
    curves: dict[str, dict[int, float]] = {metric: {} for metric in metrics}
    for record in read_metrics(run):
        for metric in metrics:
            if metric in record:
                curves[metric][int(record["step"])] = record[metric]
    return curves


def _last(curves: Sequence[Mapping[str, Mapping[int, float]]], metric: str) -> list[float]:
    """The last value of a metric in each run that has it."""
    return [curve[metric][max(curve[metric])] for curve in curves if curve[metric]]


def _heading(base: str) -> str:
    """What the table of differences is called."""
    return f"Differences from {base}, seed by seed"


def _as_json(way: Way) -> dict[str, Any]:
    """A row of table.json; nan, which JSON lacks, becomes None."""
    means = {metric: _interval(cell) for metric, cell in way.means.items()}
    shares = {f"PGR of {metric}": share for metric, share in way.recovered.items()}
    differences = {f"difference of {metric}": _interval(cell) for metric, cell in way.differences.items()}
    seeds = {metric: _last(way.curves, metric) for metric in way.means}
    row = {"name": way.name, "seeds": len(way.runs), **means, "runs": list(way.runs), **shares, **differences}
    return {**row, "values of seeds": seeds}


def _interval(cell: Mean | None) -> dict[str, float | None] | None:
    """A mean in table.json."""
    return cell and {name: None if math.isnan(x) else x for name, x in cell._asdict().items()}
