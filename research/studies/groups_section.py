"""Groups of runs that differ in nothing but their seed, as a section of a report: a table, and lines or a heat map
where one or two fields tell the groups apart."""

import math
from collections.abc import Sequence

from research.studies import means, pages, sections
from research.studies.groups import Group
from research.studies.means import Mean, mean
from research.studies.pages import escape

_MEASURES = 6  # metrics of the table
_DIGITS = 4
_DRAWN = 2  # metrics that are drawn over a field
METHOD = "Means over seeds of the last values, and below them 95 % intervals of the mean by Student's t distribution; "
METHOD += "with one seed there are none."


def section(groups: Sequence[Group], out: str | None) -> str:
    """The section as HTML.

    Args:
      groups: of runs.
      out: the folder that plots are written to; None for none.
    """
    measures = sections.measures([run for group in groups for run in group.runs], _MEASURES)
    rows = [
        [group.name, str(len(group.runs)), *(means.text(_mean(group, metric), _DIGITS) for metric in measures)]
        for group in groups
    ]
    parts = ["<h2>Over seeds</h2>", f"<p>{escape(METHOD)}</p>"]
    parts.append(pages.table(["", "seeds", *measures], rows, "numbers wide"))
    fields = list(groups[0].settings)
    if len(fields) == 1 and len(groups) > 2 and out and all(_is_number(g.settings[fields[0]]) for g in groups):
        drawn = [_line(metric, fields[0], groups, out) for metric in measures[:_DRAWN]]
        parts.append(f'<div class="plots">{"".join(drawn)}</div>')
    if len(fields) == 2 and len(groups) > 2:
        parts += [_heat(metric, fields, groups) for metric in measures[:_DRAWN]]
    return "\n".join(parts)


def _mean(group: Group, metric: str) -> Mean | None:
    values = [run.last(metric) for run in group.runs if metric in run.series]
    return mean(values) if values else None


def _line(metric: str, field: str, groups: Sequence[Group], out: str) -> str:
    """A metric over a field of numbers, with intervals and a point for each seed."""
    plots = pages.load_plots()
    points = sorted(
        (float(group.settings[field]), [run.last(metric) for run in group.runs if metric in run.series])
        for group in groups
    )
    name = f"{metric}_over_{field}".replace("/", "_")
    draw = lambda theme: plots.plot_over_field(metric, field, [p for p in points if p[1]], theme)  # noqa: E731
    return pages.plot(out, name, draw, f"{metric} over {field}")


def _heat(metric: str, fields: Sequence[str], groups: Sequence[Group]) -> str:
    """A table of a metric over two fields, the darker the higher."""
    across = sorted({group.settings[fields[1]] for group in groups}, key=_order)
    down = sorted({group.settings[fields[0]] for group in groups}, key=_order)
    cells = {(g.settings[fields[0]], g.settings[fields[1]]): _mean(g, metric) for g in groups}
    values = [cell.value for cell in cells.values() if cell and math.isfinite(cell.value)]
    if not values:
        return ""
    low, width = min(values), max(values) - min(values) or 1.0
    head = "".join(f"<th>{escape(name)}</th>" for name in (f"{fields[0]} \\ {fields[1]}", *across))
    rows = []
    for each in down:
        row = f"<td>{escape(each)}</td>"
        for other in across:
            cell = cells.get((each, other))
            part = (cell.value - low) / width if cell and math.isfinite(cell.value) else 0.0
            row += f'<td style="--part: {part:.2f}">{escape(means.text(cell, _DIGITS) if cell else "")}</td>'
        rows.append(f"<tr>{row}</tr>")
    table = f'<table class="heat"><thead><tr>{head}</tr></thead><tbody>{"".join(rows)}</tbody></table>'
    return f'<h3>{escape(metric)}</h3><div class="scroll">{table}</div>'


def _is_number(value: str) -> bool:
    try:
        return math.isfinite(float(value))
    except ValueError:
        return False


def _order(value: str) -> tuple:
    return (0, float(value), "") if _is_number(value) else (1, 0.0, value)
