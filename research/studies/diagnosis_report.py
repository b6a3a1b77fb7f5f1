"""What `understudy diagnose` last said of a run, as a section of its report: each finding with its curves."""

from collections.abc import Mapping, Sequence
from types import ModuleType
from typing import Any

from research.studies import pages
from research.studies.history import Run, title_of
from research.studies.pages import escape

_PLOTTED = 3  # curves of a finding, at most

Pictures = Mapping[str, Mapping[str, bytes]]  # metric -> theme -> PNG


def pictures(run: Run, plots: ModuleType) -> dict[str, dict[str, bytes]]:
    """The curves that the findings of a run speak of."""
    names = dict.fromkeys(name for finding in _findings(run) for name in _metrics(run, finding))
    return {
        name: {t: plots.to_png(plots.plot_curves(name, _curves(run, name), [run], t)) for t in plots.THEMES}
        for name in names
    }


def section(run: Run, drawn: Pictures, named: bool) -> str:
    """The section as HTML; "" where the run wasn't diagnosed.

    Args:
      run: of the report.
      drawn: see `pictures`.
      named: whether the report shows several runs.
    """
    if not run.diagnosis:
        return ""
    title = f"Diagnosis{f' of {run.name}' if named else ''}"
    parts = [
        f"<h2>{escape(title)}</h2>",
        f"<p>{escape(run.diagnosis['subject'])}: {escape(_verdict(run.diagnosis))}</p>",
    ]
    for place, finding in enumerate(_findings(run), start=1):
        parts += _finding(run, place, finding, drawn)
    signals = [[name, _number(value)] for name, value in run.diagnosis["signals"].items()]
    table = pages.table(["signal", "value"], signals, "numbers")
    parts.append(f"<details><summary>all signals</summary>{table}</details>")
    return "\n".join(parts)


def _finding(run: Run, place: int, finding: Mapping[str, Any], drawn: Pictures) -> list[str]:
    rows = [["why", finding["why"]], *(["evidence", each] for each in finding["numbers"])]
    rows += [["row", each] for each in finding["rows"]]
    if finding["confirmation"]:
        rows.append(["tried", finding["confirmation"]])
    rows += [["remedy", finding["remedy"]], ["source", finding["source"]]]
    body = pages.table([f"{place}. {finding['cause']}", finding["level"]], rows, "settings")
    shown = [pages.picture(drawn[name], f"{title_of(name)} over steps") for name in _metrics(run, finding)]
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
