"""The report of a weak-to-strong study: tables and plots of what research/evals/pgr.py measures."""

import csv
import dataclasses
import json
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from research.studies import pgr
from research.studies import report as pages
from research.studies.pgr import Estimate, Group, Missing

METHOD = (
    f"In brackets: {pgr.LEVEL:.0%} percentile intervals of a bootstrap with {pgr.DRAWS} draws, of seeds and test "
    "examples together, weak, student and ceiling on the same examples; with one seed, of examples alone. PGR is the "
    "ratio of the means over seeds, (student - weak) / (ceiling - weak), not the mean of ratios; there is none where "
    "the gap can't be told from 0. Agreement is of the student with its supervisor: on all examples, on those where "
    "the supervisor is right, and on those where it is wrong."
)
_COLUMNS = {  # estimate -> heading
    "weak": "weak",
    "student": "student",
    "ceiling": "ceiling",
    "pgr": "PGR",
    "pgr_clipped": "PGR in [0, 1]",
    "agreement": "agreement",
    "agreement_right": "where right",
    "agreement_wrong": "where wrong",
}
_FIRST = ("weak", "student", "ceiling", "pgr")


def report(cells: Sequence[Mapping[str, Any]], workdir: str) -> None:
    """Writes table.csv, table.json, accuracy.png, pgr.png and report.html into a folder, and prints the table.

    Cells that lack a file are listed with the reason and, where WORKDIR/study.json tells, with how the stage stands
    that was to write it. A study returns functools.partial(report, cells).

    Args:
      cells: see pgr.measure.
      workdir: of the study.

    Raises:
      InputError: see pgr.measure.
    """
    groups, missing = pgr.measure(cells)
    missing = [Missing(cell, reason + _stage_of(cell, workdir)) for cell, reason in missing]
    os.makedirs(workdir, exist_ok=True)
    out = Path(workdir)
    header, rows = table(groups)
    listed = left_out(groups, missing)
    (out / "table.json").write_text(json.dumps(_as_json(groups, missing), indent=2, allow_nan=False) + "\n")
    with open(out / "table.csv", "w", encoding="utf-8", newline="") as f:
        writer = csv.writer(f)
        writer.writerows(_as_csv(groups))
    body = [f"<h1>Weak to strong</h1><p>{pages.escape(METHOD)}</p>", pages.table(header, rows, "numbers")]
    if listed:
        body += ["<h2>Left out</h2>", pages.table(["what", "why"], listed, "settings")]
    drawn = ""
    for name, title in (("accuracy", "Accuracy"), ("pgr", "Performance gap recovered")):
        if groups:
            png = {theme: plot(name, title, groups, theme) for theme in pages.THEMES}
            (out / f"{name}.png").write_bytes(png["light"])
            drawn += pages.picture(png, f"{title} over the size gap")
    body.append(f'<h2>Over the size gap</h2><div class="plots">{drawn}</div>')
    (out / "report.html").write_text(pages.page("Weak to strong", body), encoding="utf-8")

    lines = [header, *table(groups, brief=True)[1]]
    widths = [max(len(line[i]) for line in lines) for i in range(len(header))]
    print("\n".join("  ".join(text.ljust(n) for text, n in zip(line, widths, strict=True)).rstrip() for line in lines))
    print(f"\n{METHOD}")
    for what, why in listed:
        print(f"left out: {what}: {why}")
    print(f"\nin full in {out / 'report.html'}, {out / 'table.csv'} and {out / 'table.json'}")


def table(groups: Sequence[Group], brief: bool = False) -> tuple[list[str], list[list[str]]]:
    """Returns the heading and the rows, as text: "0.712 [0.695, 0.730]"; `brief`: with fewer intervals."""
    header = ["weak", "strong", "loss", "seeds", *_COLUMNS.values()]
    rows = []
    for group in groups:
        seeds = str(len(group.seeds)) + (" (examples only)" if len(group.seeds) == 1 else "")
        shown = [_text(group.estimates[name], alone=brief and name not in _FIRST) for name in _COLUMNS]
        rows.append([str(group.weak_size), str(group.strong_size), str(group.loss), seeds, *shown])
    return header, rows


def left_out(groups: Sequence[Group], missing: Sequence[Missing]) -> list[list[str]]:
    """What the table holds no PGR or no cell of, and why: pairs of text."""
    listed = [[f"PGR of {g.weak_size} -> {g.strong_size}, {g.loss}", g.excluded] for g in groups if g.excluded]
    for cell, reason in missing:
        what = f"{cell['weak_size']} -> {cell['strong_size']}, {cell['loss']}, seed {cell['seed']}"
        listed.append([what, reason])
    return listed


def plot(name: str, title: str, groups: Sequence[Group], theme: str = "light") -> bytes:
    """Returns a PNG over the size gap, parameters of strong over parameters of weak, in a colour for each loss.

    A line joins the weak sizes that supervise one strong size.

    Args:
      name: "accuracy" (of student, with weak and ceiling beside) or "pgr"; groups that are excluded from PGR have none.
      title: of the plot.
      groups: to draw.
      theme: "light" or "dark".
    """
    from matplotlib.ticker import FuncFormatter, NullLocator

    figure, axes = pages.new_axes(title, "parameters, strong / weak", theme)
    ink = pages.THEMES[theme]["ink"]
    losses = list(dict.fromkeys(group.loss for group in groups))
    ratios = sorted({group.strong_params / group.weak_params for group in groups})

    def line(chosen: Sequence[Group], what: str, shift: float, label: str, **style: Any) -> None:
        for size in dict.fromkeys(group.strong_size for group in chosen):
            found = sorted((g for g in chosen if g.strong_size == size), key=lambda g: g.strong_params / g.weak_params)
            x = [group.strong_params / group.weak_params * shift for group in found]
            y, low, high = zip(*(group.estimates[what] for group in found), strict=True)
            errors = [[_length(a - b) for a, b in zip(*ends, strict=True)] for ends in ((y, low), (high, y))]
            axes.errorbar(x, y, yerr=errors, capsize=2.5, markersize=4, linewidth=1.4, label=label, **style)
            label = ""  # once is enough

    if name == "accuracy":
        pairs = {(group.weak_size, group.strong_size): group for group in groups}
        line(list(pairs.values()), "weak", 1.0, color=ink, label="weak", linestyle=":", marker="v", alpha=0.7)
        line(list(pairs.values()), "ceiling", 1.0, color=ink, linestyle="--", marker="^", label="ceiling", alpha=0.7)
    else:
        for y in (0, 1):
            axes.axhline(y, color=ink, linewidth=0.8, alpha=0.5)
    for i, loss in enumerate(losses):
        chosen = [g for g in groups if g.loss == loss and not (name == "pgr" and g.excluded)]
        shift = 1.02 ** (i - (len(losses) - 1) / 2)  # so that intervals lie side by side
        color = pages.COLORS[i % len(pages.COLORS)]
        what = "student" if name == "accuracy" else "pgr"
        if chosen:
            line(chosen, what, shift, loss, color=color, marker="os^vDPX*"[i // len(pages.COLORS) % 8])
    axes.set_xscale("log")
    axes.set_xlim(ratios[0] / 1.3, ratios[-1] * 1.3)
    axes.set_xticks(ratios)
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:.3g}"))
    if axes.get_legend_handles_labels()[0]:
        axes.legend(frameon=False, fontsize=8, labelcolor=ink, loc="upper left", bbox_to_anchor=(1.0, 1.0))
    return pages.to_png(figure)


def _length(x: float) -> float:
    """Of an error bar, which can't be drawn to infinity."""
    return max(x, 0.0) if math.isfinite(x) else math.nan


def _stage_of(cell: Mapping[str, Any], workdir: str) -> str:
    """ " (stage x: failed: why)" of the stages that a cell's missing files were to come from."""
    record = Path(workdir) / "study.json"
    if not record.is_file():
        return ""
    stages = json.loads(record.read_text())["stages"]
    missing = [cell[key] for key in pgr.PREDICTIONS if not Path(cell[key]).is_file()]
    told = []
    for stage in stages:
        if any(path.startswith(os.path.join(stage["workdir"], "")) for path in missing):
            why = f": {stage['error']}" if "error" in stage else ""
            told.append(f" (stage {stage['name']}: {stage['state']}{why})")
    return "".join(told)


def _text(estimate: Estimate, alone: bool) -> str:
    if math.isnan(estimate.value):
        return "-"
    return f"{estimate.value:.3f}" if alone else f"{estimate.value:.3f} [{estimate.low:.3f}, {estimate.high:.3f}]"


def _as_csv(groups: Sequence[Group]) -> list[list[Any]]:
    names = ["weak", "student", "ceiling", "gap", *(name for name in _COLUMNS if name not in pgr.PREDICTIONS)]
    fixed = ["weak_size", "strong_size", "loss", "weak_params", "strong_params", "examples"]
    lines: list[list[Any]] = [[*fixed, "seeds", *(n + end for n in names for end in ("", "_low", "_high")), "excluded"]]
    for group in groups:
        numbers = ["" if math.isnan(x) else x for name in names for x in group.estimates[name]]
        lines.append([*(getattr(group, key) for key in fixed), len(group.seeds), *numbers, group.excluded])
    return lines


def _as_json(groups: Sequence[Group], missing: Sequence[Missing]) -> dict[str, Any]:
    def finite(x: float) -> float | str | None:
        return None if math.isnan(x) else x if math.isfinite(x) else str(x)

    return {
        "method": METHOD,
        "groups": [
            dataclasses.asdict(group)
            | {"estimates": {k: {n: finite(x) for n, x in e._asdict().items()} for k, e in group.estimates.items()}}
            for group in groups
        ],
        "missing": [{"cell": dict(cell), "reason": reason} for cell, reason in missing],
    }
