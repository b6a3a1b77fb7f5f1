"""The report of a weak-to-strong study: tables and plots of what pgr.py measures."""

import csv
import dataclasses
import functools
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from research import files
from research.studies import pages, paper, pgr
from research.studies.means import mean
from research.studies.paper import Table
from research.studies.pgr import Calibration, Estimate, Group, Missing
from research.studies.tables import text_table

METHOD = (
    f"In brackets: {pgr.LEVEL:.0%} percentile intervals of a bootstrap with {pgr.DRAWS} draws, of seeds and test "
    "examples together, weak, student and ceiling on the same examples; with one seed, of examples alone. PGR is the "
    "ratio of the means over seeds, (student - weak) / (ceiling - weak), not the mean of ratios; there is none where "
    "the gap can't be told from 0. Agreement is of the student with its supervisor: on all examples, on those where "
    "the supervisor is right, and on those where it is wrong. Differences are of students' accuracies, on the same "
    "seeds and examples. Calibration: the mean probability of the supervisor's answers beside the share that is right, "
    "and the expected calibration error over ten bins (arXiv:1706.04599), over seeds."
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
    """Writes table.csv, .json, .md and .tex, the plots accuracy, pgr and calibration (PNG, SVG, PDF) and report.html
    into a folder, and prints the table.

    Cells that lack a file are listed with the reason and, where WORKDIR/study.json tells, with how the stage stands
    that was to write it. A study returns functools.partial(report, cells).

    Args:
      cells: see pgr.measure.
      workdir: of the study.

    Raises:
      InputError: see pgr.measure; or matplotlib isn't installed: the tables are written then.
    """
    groups, missing = pgr.measure(cells)
    missing = [Missing(cell, reason + _stage_of(cell, workdir)) for cell, reason in missing]
    out = Path(workdir)
    out.mkdir(parents=True, exist_ok=True)
    calibrations = pgr.calibrations(cells)
    files.write_json(out / "table.json", _as_json(groups, missing, calibrations))
    with open(out / "table.csv", "w", encoding="utf-8", newline="") as f:
        csv.writer(f).writerows(_as_csv(groups))
    header, rows = table(groups, brief=True)
    omissions = left_out(groups, missing)
    tables = paper_tables(groups, calibrations)
    paper.write(out, "Weak to strong", tables, METHOD)
    print(text_table([header, *rows]))
    print(f"\n{METHOD}")
    for what, why in omissions:
        print(f"left out: {what}: {why}")
    print(f"\nin full in {out / 'report.html'}, table.md, table.tex, table.csv and table.json")
    _write_page(out, groups, omissions, tables, calibrations)


def table(groups: Sequence[Group], brief: bool = False) -> tuple[list[str], list[list[str]]]:
    """Returns the heading and the rows, as text: "0.712 [0.695, 0.730]"; `brief`: with fewer intervals."""
    header = ["weak", "strong", "loss", "seeds", *_COLUMNS.values()]
    rows = []
    for group in groups:
        seeds = str(len(group.seeds)) + (" (examples only)" if len(group.seeds) == 1 else "")
        cells = [_text(group.estimates[name], alone=brief and name not in _FIRST) for name in _COLUMNS]
        rows.append([str(group.weak_size), str(group.strong_size), str(group.loss), seeds, *cells])
    return header, rows


def left_out(groups: Sequence[Group], missing: Sequence[Missing]) -> list[list[str]]:
    """What the table holds no PGR or no cell of, and why: pairs of text."""
    omissions = [[f"PGR of {g.weak_size} -> {g.strong_size}, {g.loss}", g.excluded] for g in groups if g.excluded]
    for cell, reason in missing:
        what = f"{cell['weak_size']} -> {cell['strong_size']}, {cell['loss']}, seed {cell['seed']}"
        omissions.append([what, reason])
    return omissions


def paper_tables(groups: Sequence[Group], calibrations: Sequence[Calibration]) -> list[Table]:
    """The students, what is below and above them, how far they are from the first loss, and the supervisors'
    calibration; then the seeds one by one."""
    students, bounds, differences, seeds = [], {}, [], []
    pairs = len({(group.weak_size, group.strong_size) for group in groups}) > 1
    for group in groups:
        pair = f"{group.weak_size} -> {group.strong_size}"
        name = f"{group.loss}, {pair}" if pairs else str(group.loss)
        cells = [_text(group.estimates[e], alone=False) for e in ("student", "pgr")]
        agreement = [
            _text(group.estimates[e], alone=False) for e in ("agreement", "agreement_right", "agreement_wrong")
        ]
        students.append([name, str(len(group.seeds)), *cells, *agreement])
        ends = [_text(group.estimates[e], alone=False) for e in ("weak", "ceiling", "gap")]
        sizes = [f"{group.weak_params:,.0f}", f"{group.strong_params:,.0f}", f"{group.examples:,}"]
        bounds.setdefault((pair, *ends), [pair, *sizes, str(len(group.seeds)), *ends])
        if group.difference is not None:
            low, high = group.difference[1:]
            verdict = "better" if low > 0 else "worse" if high < 0 else "can't be told"
            differences.append([name, group.base, _text(group.difference, alone=False), verdict])
        for i, seed in enumerate(group.seeds):
            each = [group.points[k][i] for k in (*pgr.PREDICTIONS, "pgr")]
            seeds.append([name, str(seed), *("-" if math.isnan(x) else f"{x:.3f}" for x in each)])
    supervisors = []
    for each in calibrations:
        error = Estimate(*mean(each.errors))
        numbers = [f"{each.accuracy:.3f}", f"{each.confidence:.3f}", _text(error, alone=math.isnan(error.low))]
        supervisors.append([each.name, str(each.seeds), *numbers])
    agreements = ["agreement", "where right", "where wrong"]
    head = ["pair", "parameters of weak", "of strong", "test examples", "seeds", "weak", "ceiling", "gap"]
    return [
        Table("Students", ["loss", "seeds", "accuracy", "PGR", *agreements], students),
        Table("Supervisors and ceilings", head, list(bounds.values())),
        Table("Paired differences of accuracy", ["loss", "from", "difference", ""], differences),
        Table("Calibration of supervisors", ["supervisor", "seeds", "right", "confidence", "error"], supervisors),
        Table("Seeds", ["loss", "seed", "weak", "student", "ceiling", "PGR"], seeds),
    ]


def _write_page(
    out: Path,
    groups: Sequence[Group],
    omissions: Sequence[Sequence[str]],
    tables: Sequence[Table],
    calibrations: Sequence[Calibration],
) -> None:
    """Writes the plots and report.html; `omissions` is what is left out."""
    plots, pictures = pages.load_plots(), ""
    for name, title in (("accuracy", "Accuracy"), ("pgr", "Performance gap recovered")):
        if any(name == "accuracy" or not group.excluded for group in groups):
            pictures += pages.plot(out, name, functools.partial(plots.plot_pairs, name, title, groups), title)
    if calibrations:
        draw = functools.partial(plots.plot_calibration, {each.name: each.bins for each in calibrations})
        pictures += pages.plot(out, "calibration", draw, "Calibration of supervisors")
    students, *others, seeds = tables
    body = ["<h1>Weak to strong</h1>", paper.section(students), f'<div class="plots">{pictures}</div>']
    if omissions:
        body += ["<h2>Left out</h2>", pages.table(["what", "why"], omissions, "settings")]
    body += [*map(paper.section, others), paper.section(seeds, folded=True)]
    body += [f"<p>{pages.escape(METHOD)}</p>", paper.section(paper.settings(out), folded=True)]
    files.write_text(out / "report.html", pages.page("Weak to strong", body))


def _stage_of(cell: Mapping[str, Any], workdir: str) -> str:
    """ " (stage x: failed: why)" of the stages that a cell's missing files were to come from."""
    record = files.read_json(Path(workdir) / "study.json", {"stages": []})
    missing = [Path(cell[key]) for key in pgr.PREDICTIONS if not Path(cell[key]).is_file()]
    texts = []
    for stage in record["stages"]:
        if any(Path(stage["workdir"]) in path.parents for path in missing):
            why = f": {stage['error']}" if "error" in stage else ""
            texts.append(f" (stage {stage['name']}: {stage['state']}{why})")
    return "".join(texts)


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


def _as_json(
    groups: Sequence[Group], missing: Sequence[Missing], calibrations: Sequence[Calibration]
) -> dict[str, Any]:
    def finite(x: float) -> float | str | None:
        return None if math.isnan(x) else x if math.isfinite(x) else str(x)

    return {
        "method": METHOD,
        "groups": [
            dataclasses.asdict(group)
            | {"estimates": {k: {n: finite(x) for n, x in e._asdict().items()} for k, e in group.estimates.items()}}
            | {"points": {k: [finite(x) for x in values] for k, values in group.points.items()}}
            | {"difference": group.difference and group.difference._asdict()}
            for group in groups
        ],
        "calibrations": [each._asdict() | {"bins": each.bins.tolist()} for each in calibrations],
        "missing": [{"cell": dict(cell), "reason": reason} for cell, reason in missing],
    }
