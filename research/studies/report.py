"""A page from the metrics of a run, or of several compared: of a sweep's or a study's runs too, grouped over seeds.

There is report.html, a page that needs no other file, and one PNG per metric, but for those that it folds away.
"""

import os
import re
from collections.abc import Mapping, Sequence

import numpy as np

from research import files
from research.run.console import duration
from research.studies import (
    card,
    charts,
    data_section,
    diagnosis_report,
    groups_section,
    pages,
    run_charts,
    samples_section,
    sections,
)
from research.studies import groups as groups_lib
from research.studies.groups import Group
from research.studies.history import FIRST, Run, group_metrics
from research.studies.pages import escape

_HINT = (
    "Point at a curve to see its values, drag over a part to see it alone, double-click for the whole; a name in the "
    "legend hides its curve. Faint: as logged; line: moving mean, where a curve is noisy. × is a value that isn't "
    "finite, a dotted line a step at which the run went on after a stop. A metric that never changes has no curve."
)
_LONGEST_NAME = 100  # characters of a picture's
_COMPARED = 6  # metrics of the table of several runs


def write_report(workdirs: Sequence[str], out: str | None = None) -> str:
    """Writes the plots and the page; returns the page's path.

    Args:
      workdirs: of the runs to show; the folder of a sweep or a study stands for its runs.
      out: the folder to write to; the first workdir's report/ if None.

    Raises:
      InputError: a workdir has no metrics, or matplotlib isn't installed. Nothing is written then.
    """
    plots = pages.load_plots()
    runs = groups_lib.load([member for workdir in workdirs for member in groups_lib.members(workdir)])
    shown = {t: m for t, metrics in group_metrics(runs).items() if (m := moving(t, metrics, runs))}
    whole = {t: m for t, m in shown.items() if not sections.is_detail(sections.section_of(t, m, False), t)}
    pictures = {title: plots.to_png(plots.plot_curves(title, metrics, runs)) for title, metrics in whole.items()}
    out = out or os.path.join(workdirs[0], "report")
    os.makedirs(out, exist_ok=True)
    title = os.path.basename(os.path.abspath(workdirs[0])) if len(workdirs) == 1 and len(runs) > 1 else ""
    page = make_page(runs, title, out)
    for name, png in pictures.items():
        files.write_bytes(os.path.join(out, re.sub(r"[^\w.-]", "_", name)[:_LONGEST_NAME] + ".png"), png)
    path = os.path.join(out, "report.html")
    files.write_text(path, page)
    return path


def moving(title: str, metrics: Sequence[str], runs: Sequence[Run]) -> list[str]:
    """The metrics of a plot of which there is anything to see: those that aren't the same number all along; losses and
    other first measures are plotted anyway, as long as a run has them."""

    def moves(metric: str) -> bool:
        own = [run.series[metric][1] for run in runs if metric in run.series]
        return any(len(np.unique(values)) > 1 for values in own)

    return list(metrics) if title in FIRST else [metric for metric in metrics if moves(metric)]


def make_page(
    runs: Sequence[Run],
    title: str = "",
    out: str | None = None,
) -> str:
    """Returns the report as HTML that refers to no other file.

    Args:
      runs: to show.
      title: of the page; by default the names of the runs.
      out: a folder that plots of groups of runs are written to as well.
    """
    several = len(runs) > 1
    title = title or (", ".join(run.name for run in runs) if len(runs) <= 4 else f"{len(runs)} runs")
    groups = groups_lib.by_seed(runs) if several else []
    grouped = len(groups) < len(runs) or len(groups) > 2
    parts = [f"<h1>{escape(title)}</h1>", _status(runs) if len(runs) <= 8 else ""]
    if several:
        parts += [groups_section.section(groups, out) if grouped else "", "<h2>Runs</h2>", _runs(runs)]
    else:
        parts.append(card.card(runs[0]))
    parts += [diagnosis_report.section(run, named=several) for run in runs]
    parts.append(f"<p>{_HINT}</p>")
    samples = [samples_section.section(run, named=several) for run in runs]
    data = [
        data_section.section(f"Data of {run.name}" if several else "Lengths and first rows", run.data)
        for run in runs
        if run.data
    ]
    for name, titles in sections.of_runs(runs).items():
        parts += _section(name, titles, runs, groups if grouped else [])
        if name == "Quality":
            parts += [text.replace("<h2>", "<h3>").replace("</h2>", "</h3>") for text in samples]
            samples = []
        if name == "Data":
            parts, data = [*parts, *data], []
    parts += [*samples, *data, "<h2>Numbers</h2>", _numbers(runs)]
    parts += [_starts(run, named=several) for run in runs if len(run.starts) > 1]
    parts += [_settings("Config", runs, [run.config for run in runs])]
    parts += [_settings("Versions and command", runs, [run.about for run in runs])]
    return pages.page(title, parts, charts.script())


def _section(name: str, titles: Mapping[str, Sequence[str]], runs: Sequence[Run], groups: Sequence[Group]) -> list[str]:
    """A section's charts; those that say the same as others are folded."""
    drawn: dict[bool, list[str]] = {False: [], True: []}
    for title, metrics in titles.items():
        if moved := moving(title, metrics, runs):
            chart = run_charts.of_groups(title, moved, groups) if groups else run_charts.of_runs(title, moved, runs)
            drawn[sections.is_detail(name, title)].append(charts.figure(chart))
    if not drawn[False] and not drawn[True] and name != "Data":
        return []
    parts = [f"<h2>{name}</h2><p>{sections.ABOUT[name]}</p>"]
    parts.append(f'<div class="plots">{"".join(drawn[False])}</div>' if drawn[False] else "")
    if drawn[True]:
        inner = f'<div class="plots">{"".join(drawn[True])}</div>'
        parts.append(f"<details><summary>{len(drawn[True])} more curves</summary>{inner}</details>")
    return parts


def _number(value: float) -> str:
    if abs(value) >= 10_000:
        return f"{value:,.0f}"
    return f"{value:.2e}" if 0 < abs(value) < 1e-3 else f"{value:.4g}"


def _status(runs: Sequence[Run]) -> str:
    chips = []
    for run in runs:
        state = f"finished at step {run.last_step}" if run.finished else f"not finished, step {run.last_step}"
        text = state if len(runs) == 1 else f"{run.name}: {state}"
        chips.append(f'<span class="{"done" if run.finished else "open"}">{escape(text)}</span>')
    return f'<p class="chips">{"".join(chips)}</p>'


def _runs(runs: Sequence[Run]) -> str:
    """A row for each run: its state, its course, its last measures, what it took."""
    measures, rows = sections.measures(runs, _COMPARED), []
    for run in runs:
        course = card.course(run)
        row = [run.name, f"{run.last_step:,}" + ("" if run.finished else ", not finished")]
        row += [_number(run.last(metric)) if metric in run.series else "" for metric in measures]
        best = "" if course is None else f"{_number(course.best[1])} at {course.best[0]:,}"
        rows.append([*row, best, duration(run.seconds) if run.seconds else ""])
    named = {course.name for run in runs if (course := card.course(run))}
    best = f"best {next(iter(named))}" if len(named) == 1 else "best"
    return pages.table(["", "steps", *measures, best, "time"], rows, "numbers wide")


def _numbers(runs: Sequence[Run]) -> str:
    """A folded table of all metrics."""
    metrics = [metric for group in group_metrics(runs).values() for metric in group]
    if len(runs) > 1:
        rows = [
            [metric, *(_number(run.series[metric][1][-1]) if metric in run.series else "" for run in runs)]
            for metric in metrics
        ]
        table = pages.table(["last value of", *(run.name for run in runs)], rows, "numbers")
    else:
        table = pages.table(["metric", "first", "last", "at step", "lowest", "highest"], _extremes(runs[0]), "numbers")
    return f"<details><summary>{len(metrics)} metrics</summary>{table}</details>"


def _extremes(run: Run) -> list[list[str]]:
    rows = []
    for metric in (metric for group in group_metrics([run]).values() for metric in group):
        steps, values = run.series[metric]
        finite = values[np.isfinite(values)]
        bounds = [_number(finite.min()), _number(finite.max())] if finite.size else ["", ""]
        rows.append([metric, _number(values[0]), _number(values[-1]), str(steps[-1]), *bounds])
    return rows


def _starts(run: Run, named: bool) -> str:
    """What a run that was started several times was started with; of versions, what differs from the start before."""
    rows = []
    for before, start in zip(({}, *run.starts), run.starts, strict=False):
        known = before.get("versions") or {}
        versions = [f"{k} {v}" for k, v in (start.get("versions") or {}).items() if known.get(k) != v]
        changed = "; ".join(start["changed"]) or ("" if before else "new")
        rows.append(
            [str(start["step"]), changed, str(start.get("started")), ", ".join(versions), str(start["command"])]
        )
    title = pages.heading("Starts", run.name if named else "")
    return title + pages.table(["at step", "changed", "time", "versions", "command"], rows, "settings")


def _settings(title: str, runs: Sequence[Run], settings: Sequence[Mapping[str, str]]) -> str:
    """A folded table field x run; of several runs, the fields that differ come first, unfolded."""
    fields = list(dict.fromkeys(field for each in settings for field in each))
    if not fields:
        return ""
    rows = [[field, *(each.get(field, "") for each in settings)] for field in fields]
    header = ["field", *(run.name for run in runs)] if len(runs) > 1 else ["field", "value"]
    differing = [row for row in rows if len(set(row[1:])) > 1]
    parts = [f"<h2>{title}</h2>"]
    if differing:
        parts.append(pages.table(header, differing, "settings"))
    unfolded = "" if differing or len(rows) > 20 else " open"
    parts.append(f"<details{unfolded}><summary>all</summary>{pages.table(header, rows, 'settings')}</details>")
    return "\n".join(parts)
