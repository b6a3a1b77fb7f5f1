"""What `understudy diagnose` last said of a run, as a section of its report: each finding with its curves."""

from collections.abc import Mapping, Sequence
from typing import Any

from research.studies import charts, pages, run_charts
from research.studies.history import Run
from research.studies.pages import escape

_PLOTTED = 3  # curves of a finding, at most


def section(run: Run, named: bool) -> str:
    """The section as HTML; "" where the run wasn't diagnosed.

    Args:
      run: of the report.
      named: whether the report shows several runs.
    """
    if not run.diagnosis:
        return ""
    parts = [
        pages.heading("Diagnosis", run.name if named else ""),
        f"<p>{escape(run.diagnosis['subject'])}: {escape(_verdict(run.diagnosis))}</p>",
    ]
    for place, finding in enumerate(_findings(run), start=1):
        parts += _finding(run, place, finding)
    signals = [[name, _number(value)] for name, value in run.diagnosis["signals"].items()]
    table = pages.table(["signal", "value"], signals, "numbers")
    parts.append(f"<details><summary>all signals</summary>{table}</details>")
    return "\n".join(parts)


def _finding(run: Run, place: int, finding: Mapping[str, Any]) -> list[str]:
    rows = [["why", finding["why"]], *(["evidence", each] for each in finding["numbers"])]
    rows += [["row", each] for each in finding["rows"]]
    if finding["confirmation"]:
        rows.append(["tried", finding["confirmation"]])
    rows += [["remedy", finding["remedy"]], ["source", finding["source"]]]
    body = pages.table([f"{place}. {finding['cause']}", finding["level"]], rows, "settings")
    shown = [charts.figure(run_charts.of_runs(n, _curves(run, n), [run])) for n in _metrics(run, finding)]
    return [body, f'<div class="plots">{"".join(shown)}</div>' if shown else ""]


def _findings(run: Run) -> Sequence[Mapping[str, Any]]:
    return run.diagnosis.get("findings", ())


def _metrics(run: Run, finding: Mapping[str, Any]) -> list[str]:
    """The metrics that a finding's signals are made of, without "train/", as far as the run has them."""
    names = dict.fromkeys(signal.rpartition(".")[0] for signal in finding["signals"])
    return [name for name in names if name and _curves(run, name)][:_PLOTTED]


def _curves(run: Run, name: str) -> list[str]:
    plain = name.removeprefix("eval/")
    return [metric for metric in (f"train/{plain}", f"eval/{plain}") if metric in run.series]


def _verdict(diagnosis: Mapping[str, Any]) -> str:
    return diagnosis["verdict"] + (f" ({diagnosis['reason']})" if diagnosis["reason"] else "")


def _number(value: float | str) -> str:
    return value if isinstance(value, str) else f"{value:.4g}"
