"""A diagnosis as people and programs read it: in the terminal, and as JSON."""

import math
import textwrap
from typing import Any

from research.diagnosis.types import Diagnosis, Finding

FILE = "diagnosis.json"  # in a workdir
_WIDTH = 110
_LABEL = 11


def text(diagnosis: Diagnosis, subject: str, most: int = 5) -> str:
    """The diagnosis for a terminal.

    Args:
      diagnosis: to show.
      subject: what was diagnosed, as in "runs/sft at step 400".
      most: findings that are shown whole; the others by name.
    """
    lines = [f"{subject} ({diagnosis.evidence.stage}): {_verdict(diagnosis)}"]
    if diagnosis.reason:
        lines += textwrap.wrap(diagnosis.reason[:1].upper() + diagnosis.reason[1:], _WIDTH)
    for place, finding in enumerate(diagnosis.findings[:most], start=1):
        lines += ["", *_finding(place, finding)]
    if len(diagnosis.findings) > most:
        rest = ", ".join(finding.cause.name for finding in diagnosis.findings[most:])
        lines += ["", *textwrap.wrap(f"Less likely: {rest}", _WIDTH)]
    return "\n".join(lines)


def line(finding: Finding) -> str:
    """A finding on a line, for the log of a run."""
    shown = ", ".join(finding.numbers[:2])
    return f"{finding.cause.name} ({finding.level}): {shown}. Remedy: {finding.cause.remedy.rstrip('.')}."


def as_json(diagnosis: Diagnosis, subject: str) -> dict[str, Any]:
    """The diagnosis for programs; numbers that aren't finite are texts."""
    evidence = diagnosis.evidence
    return {
        "subject": subject,
        "verdict": diagnosis.verdict,
        "reason": diagnosis.reason,
        "stage": evidence.stage,
        "started": evidence.started,
        "findings": [_finding_json(finding) for finding in diagnosis.findings],
        "signals": {name: _json_number(value) for name, value in sorted(evidence.signals.items())},
        "rows": {name: list(rows) for name, rows in sorted(evidence.rows.items())},
    }


def _verdict(diagnosis: Diagnosis) -> str:
    if diagnosis.verdict != "cause found":
        return diagnosis.verdict
    count = len(diagnosis.findings)
    return "a cause was found" if count == 1 else f"{count} causes were found, the likeliest first"


def _finding(place: int, finding: Finding) -> list[str]:
    cause = finding.cause
    lines = [f"{place}. {cause.name}, {finding.level} ({cause.group})", *_labelled("", (cause.why,))]
    lines += _labelled("evidence", finding.numbers)
    lines += _labelled("rows", finding.rows)
    lines += _labelled("tried", (finding.confirmation,) if finding.confirmation else ())
    lines += _labelled("remedy", (cause.remedy,))
    if cause.alike:
        lines += _labelled("alike", (f"no signal tells it from others of the class {cause.alike}",))
    return lines


def _labelled(label: str, texts: tuple[str, ...]) -> list[str]:
    lines = []
    for each in texts:
        wrapped = textwrap.wrap(each, _WIDTH - _LABEL - 3, break_long_words=False, break_on_hyphens=False) or [""]
        for part in wrapped:
            lines.append(f"   {label:<{_LABEL}}{part}" if label or part else "")
            label = ""
    return lines


def _finding_json(finding: Finding) -> dict[str, Any]:
    cause = finding.cause
    return {
        "cause": cause.name,
        "group": cause.group,
        "level": finding.level,
        "score": finding.score,
        "why": cause.why,
        "numbers": list(finding.numbers),
        "signals": [each.signal for each in (*cause.predicts, *cause.supports)],
        "rows": list(finding.rows),
        "remedy": cause.remedy,
        "source": cause.source,
        "alike": cause.alike,
        "confirmation": finding.confirmation,
    }


def _json_number(value: float) -> float | str:
    return float(value) if math.isfinite(value) else str(float(value))
