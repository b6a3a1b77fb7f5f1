"""Plots and a page from the metrics of a run, or of several compared.

understudy report WORKDIR [WORKDIR ...] [--out=DIR]

Writes one PNG per metric and report.html, a page that needs no other file, into the first WORKDIR/report.
"""

import argparse
import base64
import dataclasses
import html
import io
import json
import os
import re
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from research.errors import InputError
from research.run.metrics import read_metrics, read_samples

_FIRST = ("loss", "perplexity", "bits_per_byte", "exact_match", "accuracy")
_TRAINING = ("grad_norm", "update_ratio", "learning_rate", "tokens_per_second", "mfu", "supervised_fraction")
_LOG_SCALE = ("loss", "perplexity", "bits_per_byte", "grad_norm", "update_ratio")
COLORS = ("#4a7de0", "#e07b39", "#2f9e6e", "#c0487f", "#8a63d2", "#c9a227", "#3aa0b8", "#8c6d5a")
_BAD = "#d33b3b"
THEMES = {
    "light": {"face": "#ffffff", "ink": "#333842", "grid": "#e6e8ec"},
    "dark": {"face": "#1b1e24", "ink": "#c9ced8", "grid": "#333842"},
}


@dataclasses.dataclass(frozen=True)
class Run:
    """What is known of one run.

    Attributes:
      name: what it is called in the report.
      series: metric -> (steps [N] int64, values [N] float64), in order of steps.
      samples: the sampled texts, {"step", "name", "text"} each.
      config: dotted field -> value, as text; empty where the workdir holds no config.json.
      about: what else config.json says: versions, command, ...; as text.
      finished: whether the run came to its end.
    """

    name: str
    series: Mapping[str, tuple[np.ndarray, np.ndarray]]
    samples: Sequence[Mapping[str, Any]]
    config: Mapping[str, str]
    about: Mapping[str, str]
    finished: bool

    @property
    def last_step(self) -> int:
        return max(int(steps[-1]) for steps, _ in self.series.values())


def load_run(workdir: str, name: str | None = None) -> Run:
    """Reads a workdir: metrics.jsonl, and where they are there samples.jsonl, config.json and done.json.

    config.json is {"config": {...}, anything else: versions, command, ...}, or the config alone.

    Raises:
      InputError: there are no metrics, or a file can't be read.
    """
    points: dict[str, dict[int, float]] = {}
    for record in read_metrics(workdir):
        for metric in record.keys() - {"step", "time"}:
            points.setdefault(metric, {})[record["step"]] = record[metric]
    if not points:
        raise InputError(f"{workdir}: its metrics.jsonl has no records yet. Wait for the first, or name another run.")
    series = {}
    for metric, values in sorted(points.items()):
        steps = sorted(values)
        series[metric] = (np.array(steps, np.int64), np.array([values[s] for s in steps], np.float64))
    written = _read_json(os.path.join(workdir, "config.json"))
    config = written.pop("config") if isinstance(written.get("config"), dict) else written
    return Run(
        name=name or os.path.basename(os.path.abspath(workdir)),
        series=series,
        samples=read_samples(workdir),
        config=_flatten(config),
        about=_flatten(written) if written is not config else {},
        finished=os.path.exists(os.path.join(workdir, "done.json")),
    )


def group_metrics(runs: Sequence[Run]) -> dict[str, list[str]]:
    """Returns title -> the metrics of one plot, the most telling first.

    A plot holds what is measured by the same name: train/loss, eval/loss and train/sft/loss; eval/exact_match and
    eval/exact_match/sort.
    """
    metrics = sorted({metric for run in runs for metric in run.series}, key=lambda m: (m[:6] != "train/", m))
    plain = {metric.partition("/")[2] for metric in metrics}
    groups: dict[str, list[str]] = {}
    for metric in metrics:
        parts = metric.split("/")[1:] or [metric]
        groups.setdefault(next((part for part in parts if part in plain), parts[-1]), []).append(metric)

    def order(title: str) -> tuple[int, str]:
        if title in _FIRST:
            return _FIRST.index(title), title
        if title in _TRAINING:
            return 200 + _TRAINING.index(title), title
        return (100 if any(not metric.startswith("train/") for metric in groups[title]) else 300), title

    return {title: groups[title] for title in sorted(groups, key=order)}


def changes(title: str, metrics: Sequence[str], runs: Sequence[Run]) -> bool:
    """Whether there is anything to plot: a curve that isn't the same number all along; a loss is plotted anyway."""
    curves = (run.series[metric][1] for run in runs for metric in metrics if metric in run.series)
    return title in _FIRST or any(len(np.unique(values)) > 1 for values in curves)


def plot(title: str, metrics: Sequence[str], runs: Sequence[Run], theme: str = "light") -> bytes:
    """Returns a PNG with the curves of `metrics` over steps.

    With one run, colours tell metrics apart; with several, colours tell runs and line styles tell metrics
    apart. A noisy curve is faint under its moving mean; a step whose value isn't finite is a cross at the foot.
    """
    from matplotlib import colormaps
    from matplotlib.lines import Line2D
    from matplotlib.ticker import EngFormatter, FuncFormatter, LogLocator, MaxNLocator

    style = THEMES[theme]
    labels = {metric: "/".join(part for part in metric.split("/") if part != title) or metric for metric in metrics}
    colored = metrics if len(runs) == 1 else [run.name for run in runs]
    many = colormaps["viridis"](np.linspace(0.1, 0.9, len(colored)))
    palette = dict(zip(colored, COLORS if len(colored) <= len(COLORS) else many, strict=False))
    lines = {metric: "-" if len(runs) == 1 else ("-", "--", ":", "-.")[i % 4] for i, metric in enumerate(metrics)}

    figure, axes = new_axes(_words(title), "step", theme)
    curves = [(run, metric) for run in runs for metric in metrics if metric in run.series]
    broken = False
    for run, metric in curves:
        steps, values = run.series[metric]
        color = palette[metric if len(runs) == 1 else run.name]
        marker = "o" if len(steps) <= 40 else ""
        smooth = _moving_mean(values)
        if smooth is not None:
            axes.plot(steps, values, color=color, linewidth=0.8, alpha=0.35)
            values = smooth
        axes.plot(steps, values, lines[metric], color=color, linewidth=1.6, marker=marker, markersize=3.5)
        bad = ~np.isfinite(run.series[metric][1])
        if bad.any():
            broken = True
            axes.plot(steps[bad], [0.02] * bad.sum(), "x", color=_BAD, transform=axes.get_xaxis_transform())

    seen = np.concatenate([run.series[metric][1] for run, metric in curves])
    seen = seen[np.isfinite(seen)]
    if title in _LOG_SCALE and seen.size and seen.min() > 0 and seen.max() / seen.min() > 10:
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if seen.max() / seen.min() < 1000 else (1,)))
        axes.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{y:g}"))
        axes.yaxis.set_minor_formatter(FuncFormatter(lambda y, _: ""))
    elif title == "mfu":
        axes.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{100 * y:.4g}%"))
    elif seen.size and np.abs(seen).max() >= 10_000:
        axes.yaxis.set_major_formatter(EngFormatter(sep=""))
    axes.xaxis.set_major_locator(MaxNLocator(7, steps=(1, 2, 5, 10), integer=True))
    axes.xaxis.set_major_formatter(EngFormatter(sep=""))

    solid = {"linewidth": 1.6, "color": style["ink"]}
    keys = [Line2D([], [], label=labels.get(name, name), **solid | {"color": palette[name]}) for name in colored]
    keys = keys if len(colored) > 1 else []
    if len(runs) > 1 and len(metrics) > 1:
        keys += [Line2D([], [], linestyle=lines[metric], label=labels[metric], **solid) for metric in metrics]
    if broken:
        keys.append(Line2D([], [], linestyle="", marker="x", color=_BAD, label="not finite"))
    place = {"loc": "best"} if len(keys) <= 6 else {"loc": "upper left", "bbox_to_anchor": (1.0, 1.0)}
    if keys:
        axes.legend(handles=keys, frameon=False, fontsize=8, labelcolor=style["ink"], **place)

    return to_png(figure)


def new_axes(title: str, xlabel: str, theme: str = "light") -> tuple[Any, Any]:
    """Returns a matplotlib (figure, axes) that looks as all plots here do; `theme` is "light" or "dark"."""
    from matplotlib.figure import Figure

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


def to_png(figure: Any) -> bytes:
    """Returns a matplotlib figure as a PNG of at most 256 colours."""
    from PIL import Image

    drawn, png = io.BytesIO(), io.BytesIO()
    figure.savefig(drawn, format="png")
    small = Image.open(drawn).convert("RGB").quantize(256, Image.Quantize.MAXCOVERAGE)
    small.save(png, "PNG")
    return png.getvalue()


def make_page(runs: Sequence[Run], plots: Mapping[str, Mapping[str, bytes]]) -> str:
    """Returns the report as HTML that refers to no other file; `plots` holds title -> theme -> PNG."""
    names = ", ".join(run.name for run in runs) if len(runs) <= 4 else f"{len(runs)} runs"
    parts = [f"<h1>{escape(names)}</h1>", _status(runs), "<h2>Numbers</h2>", _numbers(runs)]
    parts += ["<h2>Curves</h2>", _CAPTION]
    parts.append('<div class="plots">')
    for title, png in plots.items():
        parts.append(picture(png, f"{_words(title)} over steps"))
    parts += ["</div>", *(_samples(run, named=len(runs) > 1) for run in runs if run.samples)]
    parts += [_settings("Config", runs, [run.config for run in runs])]
    parts += [_settings("Versions and command", runs, [run.about for run in runs])]
    return page(names, parts)


def page(title: str, parts: Sequence[str]) -> str:
    """Returns a page that refers to no other file; `parts` are HTML, empty ones left out."""
    return _PAGE.format(title=escape(title), style=_STYLE, body="\n".join(filter(None, parts)))


def picture(png: Mapping[str, bytes], alt: str) -> str:
    """A plot inside a page, light or dark as the reader has it; `png` holds theme -> PNG."""
    return (
        f'<picture><source media="(prefers-color-scheme: dark)" srcset="{data_url(png["dark"])}">'
        f'<img src="{data_url(png["light"])}" alt="{escape(alt)}"></picture>'
    )


def write_report(workdirs: Sequence[str], out: str | None = None) -> str:
    """Writes the plots and the page; returns the page's path.

    Args:
      workdirs: of the runs to show.
      out: the folder to write to; the first workdir's report/ if None.

    Raises:
      InputError: a workdir has no metrics. Nothing is written then.
    """
    bases = [os.path.basename(os.path.abspath(workdir)) for workdir in workdirs]
    unique = len(set(bases)) == len(bases)
    runs = [load_run(workdir, base if unique else workdir) for workdir, base in zip(workdirs, bases, strict=True)]
    plots = {
        title: {theme: plot(title, metrics, runs, theme) for theme in THEMES}
        for title, metrics in group_metrics(runs).items()
        if changes(title, metrics, runs)
    }
    page = make_page(runs, plots)
    out = out or os.path.join(workdirs[0], "report")
    os.makedirs(out, exist_ok=True)
    for title, png in plots.items():
        with open(os.path.join(out, re.sub(r"[^\w.-]", "_", title) + ".png"), "wb") as f:
            f.write(png["light"])
    path = os.path.join(out, "report.html")
    with open(path, "w", encoding="utf-8") as f:
        f.write(page)
    return path


def _read_json(path: str) -> dict[str, Any]:
    if not os.path.exists(path):
        return {}
    with open(path, encoding="utf-8") as f:
        try:
            return dict(json.load(f))
        except (ValueError, TypeError) as error:
            raise InputError(f"{path}: not a JSON object ({error}). Repair it or move it away.") from None


def _flatten(tree: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    flat = {}
    for key, value in tree.items():
        if isinstance(value, Mapping) and value:
            flat |= _flatten(value, f"{prefix}{key}.")
        else:
            flat[prefix + key] = value if isinstance(value, str) else json.dumps(value)
    return flat


def _moving_mean(values: np.ndarray) -> np.ndarray | None:
    """Centred mean over a twelfth of the curve, non-finite values left out; None where the curve needs none."""
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


def _words(title: str) -> str:
    return {"mfu": "MFU (model-FLOPs utilisation)"}.get(title, title.replace("_", " ").capitalize())


def _number(value: float) -> str:
    if abs(value) >= 10_000:
        return f"{value:,.0f}"
    return f"{value:.2e}" if 0 < abs(value) < 1e-3 else f"{value:.4g}"


def escape(text: Any) -> str:
    """Text for HTML."""
    return html.escape(str(text))


def data_url(png: bytes) -> str:
    """A PNG inside a page."""
    return "data:image/png;base64," + base64.b64encode(png).decode("ascii")


def table(header: Sequence[str], rows: Sequence[Sequence[str]], kind: str) -> str:
    """A table of texts, which are escaped here; it scrolls sideways on a narrow screen."""
    head = "".join(f"<th>{escape(cell)}</th>" for cell in header)
    body = "".join("<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>" for row in rows)
    return (
        f'<div class="scroll"><table class="{kind}"><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'
    )


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
        return table(["last value of", *(run.name for run in runs)], rows, "numbers")
    rows = []
    for metric in metrics:
        steps, values = runs[0].series[metric]
        finite = values[np.isfinite(values)]
        bounds = [_number(finite.min()), _number(finite.max())] if finite.size else ["", ""]
        rows.append([metric, _number(values[-1]), str(steps[-1]), *bounds])
    return table(["metric", "last", "at step", "lowest", "highest"], rows, "numbers")


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
        parts.append(table(header, differing, "settings"))
    unfolded = "" if differing or len(rows) > 20 else " open"
    parts.append(f"<details{unfolded}><summary>all</summary>{table(header, rows, 'settings')}</details>")
    return "\n".join(parts)


_CAPTION = """<p>Faint: as logged. Line: moving mean, where a curve is noisy. A metric that never changes has no
plot.</p>"""
_PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>{title}</title>
<style>{style}</style>
</head>
<body>
{body}
</body>
</html>
"""

_STYLE = """
:root { --page: #f5f6f8; --card: #ffffff; --ink: #23272f; --soft: #69707d; --line: #e6e8ec;
  --done: #1f8a5b; --open: #b3691a; }
@media (prefers-color-scheme: dark) {
  :root { --page: #121419; --card: #1b1e24; --ink: #dfe3ea; --soft: #98a0ae; --line: #333842;
    --done: #5fcf9c; --open: #e8a75c; } }
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 1.5rem 1rem 4rem; max-width: 76rem; background: var(--page); color: var(--ink);
  font: 15px/1.5 system-ui, sans-serif; }
h1 { font-size: 1.5rem; margin: 0 0 .5rem; overflow-wrap: anywhere; }
h2 { font-size: 1.1rem; margin: 2.2rem 0 .7rem; }
.chips span { display: inline-block; margin: 0 .6rem .4rem 0; padding: .1rem .7rem; border: 1px solid;
  border-radius: 1rem; font-size: .85rem; }
.done { color: var(--done); } .open { color: var(--open); }
.plots { display: grid; gap: 1rem; grid-template-columns: repeat(auto-fit, minmax(min(100%, 27rem), 1fr)); }
.plots img { display: block; width: 100%; height: auto; border: 1px solid var(--line); border-radius: .6rem; }
.scroll, details { background: var(--card); border: 1px solid var(--line); border-radius: .6rem; }
.scroll { overflow-x: auto; }
details { margin: .6rem 0; padding: .5rem .9rem; }
details .scroll { border: 0; }
summary { cursor: pointer; color: var(--soft); }
table { border-collapse: collapse; width: 100%; font-size: .88rem; }
th, td { padding: .35rem .9rem; text-align: left; border-bottom: 1px solid var(--line); }
tbody tr:last-child td { border-bottom: 0; }
th { color: var(--soft); font-weight: 600; white-space: nowrap; }
.numbers td + td, .numbers th + th { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap; }
.settings td { font-family: ui-monospace, monospace; font-size: .82rem; overflow-wrap: anywhere; }
p { margin: .4rem 0 .8rem; color: var(--soft); font-size: .88rem; }
.settings td:first-child { white-space: nowrap; }
.name { margin: .8rem 0 .2rem; color: var(--soft); font-size: .85rem; }
pre { margin: 0 0 .4rem; padding: .6rem .8rem; background: var(--page); border-radius: .4rem;
  white-space: pre-wrap; overflow-wrap: anywhere; font: .85rem/1.45 ui-monospace, monospace; }
"""


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="understudy report", description=__doc__.split("\n")[0])
    parser.add_argument("workdirs", nargs="+", metavar="WORKDIR", help="of a run; several are compared")
    parser.add_argument("--out", help="folder to write to (default: the first WORKDIR/report)")
    args = parser.parse_args(argv)
    try:
        print(write_report(args.workdirs, args.out))
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
