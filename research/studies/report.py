"""Plots and a page from the metrics of a run, or of several compared.

There is one PNG per metric, and report.html, a page that needs no other file.
"""

import os
import re
from collections.abc import Mapping, Sequence

import numpy as np

from research import files
from research.studies import data_section, diagnosis_report, pages
from research.studies.history import FIRST, Run, group_metrics, load_run, title_of
from research.studies.pages import escape

_CAPTION = """<p>Faint: as logged. Line: moving mean, where a curve is noisy. A metric that never changes has no
plot.</p>"""


_LONGEST_NAME = 100  # characters of a picture's


def write_report(workdirs: Sequence[str], out: str | None = None) -> str:
    """Writes the plots and the page; returns the page's path.

    Args:
      workdirs: of the runs to show.
      out: the folder to write to; the first workdir's report/ if None.

    Raises:
      InputError: a workdir has no metrics, or matplotlib isn't installed. Nothing is written then.
    """
    plots = pages.load_plots()
    bases = [os.path.basename(os.path.abspath(workdir)) for workdir in workdirs]
    unique = len(set(bases)) == len(bases)
    runs = [load_run(workdir, base if unique else workdir) for workdir, base in zip(workdirs, bases, strict=True)]
    pictures = {
        title: {theme: plots.plot_curves(title, metrics, runs, theme) for theme in plots.THEMES}
        for title, metrics in group_metrics(runs).items()
        if changes(title, metrics, runs)
    }
    page = make_page(runs, pictures, [diagnosis_report.pictures(run, plots) for run in runs])
    out = out or os.path.join(workdirs[0], "report")
    os.makedirs(out, exist_ok=True)
    for title, png in pictures.items():
        files.write_bytes(os.path.join(out, re.sub(r"[^\w.-]", "_", title)[:_LONGEST_NAME] + ".png"), png["light"])
    path = os.path.join(out, "report.html")
    files.write_text(path, page)
    return path


def changes(title: str, metrics: Sequence[str], runs: Sequence[Run]) -> bool:
    """Whether there is anything to plot: a curve that isn't the same number all along; a loss is plotted anyway."""
    curves = (run.series[metric][1] for run in runs for metric in metrics if metric in run.series)
    return title in FIRST or any(len(np.unique(values)) > 1 for values in curves)


def make_page(
    runs: Sequence[Run],
    pictures: Mapping[str, Mapping[str, bytes]],
    diagnosed: Sequence[diagnosis_report.Pictures] | None = None,
) -> str:
    """Returns the report as HTML that refers to no other file.

    Args:
      runs: to show.
      pictures: title -> theme -> PNG.
      diagnosed: for each run the curves that its diagnosis speaks of (see diagnosis_report.pictures).
    """
    names = ", ".join(run.name for run in runs) if len(runs) <= 4 else f"{len(runs)} runs"
    parts = [f"<h1>{escape(names)}</h1>", _status(runs), "<h2>Numbers</h2>", _numbers(runs)]
    for run, drawn in zip(runs, diagnosed or [{}] * len(runs), strict=True):
        parts.append(diagnosis_report.section(run, drawn, named=len(runs) > 1))
    parts += ["<h2>Curves</h2>", _CAPTION]
    parts.append('<div class="plots">')
    for title, png in pictures.items():
        parts.append(pages.picture(png, f"{title_of(title)} over steps"))
    parts += ["</div>", *(_samples(run, named=len(runs) > 1) for run in runs if run.samples)]
    parts += [
        data_section.section(f"Data of {run.name}" if len(runs) > 1 else "Data", run.data) for run in runs if run.data
    ]
    parts += [_starts(run, named=len(runs) > 1) for run in runs if len(run.starts) > 1]
    parts += [_settings("Config", runs, [run.config for run in runs])]
    parts += [_settings("Versions and command", runs, [run.about for run in runs])]
    return pages.page(names, parts)


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


def _numbers(runs: Sequence[Run]) -> str:
    metrics = [metric for group in group_metrics(runs).values() for metric in group]
    if len(runs) > 1:
        rows = [
            [metric, *(_number(run.series[metric][1][-1]) if metric in run.series else "" for run in runs)]
            for metric in metrics
        ]
        return pages.table(["last value of", *(run.name for run in runs)], rows, "numbers")
    rows = []
    for metric in metrics:
        steps, values = runs[0].series[metric]
        finite = values[np.isfinite(values)]
        bounds = [_number(finite.min()), _number(finite.max())] if finite.size else ["", ""]
        rows.append([metric, _number(values[-1]), str(steps[-1]), *bounds])
    return pages.table(["metric", "last", "at step", "lowest", "highest"], rows, "numbers")


def _samples(run: Run, named: bool, shown: int = 10) -> str:
    """The sampled texts, the newest step first and unfolded."""
    by_step: dict[int, list[str]] = {}
    for sample in run.samples:
        block = f'<p class="name">{escape(sample["name"])}</p><pre>{escape(sample["text"])}</pre>'
        by_step.setdefault(sample["step"], []).append(block)
    steps = sorted(by_step, reverse=True)
    parts = [f"<h2>Samples{escape(f' of {run.name}') if named else ''}</h2>"]
    for step in steps[:shown]:
        unfolded = " open" if step == steps[0] else ""
        parts.append(f"<details{unfolded}><summary>step {step}</summary>{''.join(by_step[step])}</details>")
    if len(steps) > shown:
        parts.append(f"<p>Those of {len(steps) - shown} earlier steps are in samples.jsonl.</p>")
    return "\n".join(parts)


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
    title = f"Starts{escape(f' of {run.name}') if named else ''}"
    return f"<h2>{title}</h2>" + pages.table(["at step", "changed", "time", "versions", "command"], rows, "settings")


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
