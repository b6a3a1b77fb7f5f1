"""What a study leaves for a paper: its tables as Markdown and as LaTeX, with its settings."""

import dataclasses
import re
from collections.abc import Sequence
from pathlib import Path

from research import files
from research.studies import pages
from research.studies.history import differing, flatten
from research.studies.pages import INTERVAL

_RECORD = "study.json"
_LATEX = {"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "->": r"$\rightarrow$"}
_LATEX |= {each: f"\\{each}" for each in "&%$#_{}"} | {"<": r"\textless{}", ">": r"\textgreater{}", "|": r"\textbar{}"}
_SPECIAL = re.compile("->|[" + re.escape("".join(key for key in _LATEX if len(key) == 1)) + "]")


@dataclasses.dataclass(frozen=True)
class Table:
    """A table of texts.

    Attributes:
      title: of it.
      header: of its columns, the first of which names the rows.
      rows: each with as many cells.
      note: below it.
    """

    title: str
    header: Sequence[str]
    rows: Sequence[Sequence[str]]
    note: str = ""


def write(workdir: str | Path, title: str, tables: Sequence[Table], method: str) -> None:
    """Writes table.md and table.tex into a study's folder; tables without rows are left out.

    Args:
      workdir: of the study; its study.json, where there is one, tells the settings.
      title: of the study.
      tables: to write.
      method: how the numbers were made.
    """
    shown = [table for table in tables if table.rows]
    chosen = settings(workdir)
    parts = [f"# {title}", method, *(_section(table) for table in shown)]
    files.write_text(Path(workdir) / "table.md", "\n\n".join([*parts, *([_section(chosen)] if chosen else [])]) + "\n")
    latex = ["% Needs \\usepackage{booktabs,graphicx}."] + [f"% {line}" for line in _command(workdir)]
    latex += [_latex(table, method if table is shown[0] else "") for table in shown]
    latex += [_latex(chosen, "")] if chosen else []
    files.write_text(Path(workdir) / "table.tex", "\n\n".join(latex) + "\n")


def settings(workdir: str | Path) -> Table | None:
    """The settings of a study: its section `study`, and what else differs from the defaults; None where it isn't known.

    Args:
      workdir: with study.json.
    """
    record = files.read_json(Path(workdir) / _RECORD, {})
    config = record.get("config")
    if not config:
        return None
    own = {name: value for name, value in config.items() if name != "study"}
    rows = [[f"study.{field}", value] for field, value in flatten(config.get("study", {})).items()]
    rows += [[field, value] for field, (value, _) in differing(own).items()]
    versions = ", ".join(f"{name} {version}" for name, version in record.get("versions", {}).items())
    return Table("Settings", ["field", "value"], [*rows, ["versions", versions]])


def section(table: Table | None, folded: bool = False) -> str:
    """A table with its title, for a study's page; "" for none, and for one without rows."""
    if table is None or not table.rows:
        return ""
    kind = "settings" if table.title == "Settings" else "numbers"
    body = pages.table(table.header, table.rows, kind) + (f"<p>{pages.escape(table.note)}</p>" if table.note else "")
    title = pages.escape(table.title)
    return f"<details><summary>{title}</summary>{body}</details>" if folded else f"<h2>{title}</h2>{body}"


def markdown(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table of Markdown; a bar inside a cell is escaped."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)


def latex_text(text: str) -> str:
    """A text as LaTeX shows it."""
    return _SPECIAL.sub(lambda match: _LATEX[match.group()], text)


def _section(table: Table) -> str:
    note = f"\n\n{table.note}" if table.note else ""
    return f"## {table.title}\n\n{markdown(table.header, table.rows)}{note}"


def _command(workdir: str | Path) -> list[str]:
    command = files.read_json(Path(workdir) / _RECORD, {}).get("command")
    return [f"Made by: {command}"] if command else []


def _latex(table: Table, method: str) -> str:
    """A floating table, by booktabs; intervals are smaller than values, and a table that is too wide shrinks."""
    columns = "l" + ("l" if table.title == "Settings" else "r") * (len(table.header) - 1)
    caption = " ".join(latex_text(part) for part in (f"{table.title}.", table.note, method) if part)
    label = re.sub(r"\W+", "-", table.title.lower()).strip("-")
    body = [
        r"\begin{table}",
        r"  \centering\small",
        f"  \\caption{{{caption}}}",
        f"  \\label{{tab:{label}}}",
        r"  \resizebox{\ifdim\width>\linewidth\linewidth\else\width\fi}{!}{%",
        f"  \\begin{{tabular}}{{{columns}}}",
        r"    \toprule",
        f"    {_line(table.header)}",
        r"    \midrule",
        *(f"    {_line(row)}" for row in table.rows),
        r"    \bottomrule",
        r"  \end{tabular}}",
        r"\end{table}",
    ]
    return "\n".join(body)


def _line(cells: Sequence[str]) -> str:
    return " & ".join(map(_latex_cell, cells)) + r" \\"


def _latex_cell(cell: str) -> str:
    found = INTERVAL.fullmatch(cell)
    if found is None:
        return _minus(cell) if re.fullmatch(r"-\d[\d.,%]*", cell) else latex_text(cell)
    value, interval = found.groups()
    return f"{_minus(value)} {{\\scriptsize {_minus(interval)}}}"


def _minus(text: str) -> str:
    """Numbers with a minus sign in the place of a hyphen."""
    return re.sub(r"-(?=\d)", r"$-$", latex_text(text))
