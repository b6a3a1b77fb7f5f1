"""The report of a study of planted faults: how often the diagnosis is right, what it takes for what, and how soon."""

import csv
import dataclasses
import functools
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from research import files
from research.diagnosis import ranking, series
from research.diagnosis.causes import CAUSES
from research.diagnosis.types import Cause, Evidence
from research.studies import pages, paper
from research.studies.faults import signatures
from research.studies.faults.trials import HEALTHY, TRIALS_FILE, evidence, read
from research.studies.paper import Table
from research.studies.pgr import Estimate

MOMENTS = (0, 5, 10, 20, 40, 60)  # steps at which it is asked
NOTHING = "nothing"  # what is found where nothing is
METHOD = (
    "A fault is recognised where the cause that is ranked first is the planted one, or of its class. False alarms: "
    "healthy runs in which any cause is found. Precision: of the runs in which a cause is ranked first, those in which "
    "it was planted. Noticed: the first of the steps {moments} from which on the planted cause is ranked first; 0 is "
    "before the run. Intervals are exact, at 95 %. Thresholds were chosen on the part dev."
).format(moments=", ".join(map(str, MOMENTS)))


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What the diagnosis said of a run.

    Attributes:
      planted: the cause that is in it; HEALTHY for none.
      found: the cause that is ranked first; NOTHING where none is.
      others: those that follow.
      verdict: of the diagnosis.
      noticed: the first of MOMENTS from which on the planted one is ranked first; None for never.
      signed: whether it is one of the causes with signatures.
      part, setup, key: of the run.
    """

    planted: str
    found: str
    others: tuple[str, ...]
    verdict: str
    noticed: int | None
    signed: bool
    part: str
    setup: str
    key: str

    @property
    def right(self) -> bool:
        """Whether the planted cause, or one of its class, is ranked first."""
        return same_class(self.planted, self.found)


@dataclasses.dataclass(frozen=True)
class Share:
    """How many of how many."""

    count: int
    total: int

    def text(self) -> str:
        if not self.total:
            return "none of 0"
        low, high = exact_interval(self.count, self.total)
        return f"{self.count} of {self.total} = {self.count / self.total:.1%} [{low:.1%}, {high:.1%}]"


def report(folders: Sequence[str], workdir: str) -> None:
    """Writes table.md, table.tex, table.csv (the whole confusion matrix), table.json, the plot noticed.png (SVG, PDF)
    and report.html into a folder, and prints the first.

    Args:
      folders: of the stages that made the trials.
      workdir: of the study.
    """
    out = Path(workdir)
    out.mkdir(parents=True, exist_ok=True)
    lines = [line for folder in folders for line in read(Path(folder) / TRIALS_FILE)]
    outcomes = [outcome(line) for line in lines]
    files.write_json(out / "table.json", [dataclasses.asdict(each) for each in outcomes])
    with open(out / "table.csv", "w", encoding="utf-8", newline="") as file:
        csv.writer(file).writerows(confusion([each for each in outcomes if each.part == "test"] or outcomes))
    parts = paper_tables(outcomes)
    paper.write(out, "The diagnosis on planted faults", parts, METHOD)
    text = f"{page(outcomes)}\n## Signatures\n\n{markdown_table(signatures.table(lines))}\n"
    files.write_text(out / "table.md", text)
    print(text)
    print(f"in full in {out / 'report.html'}, table.md, table.tex, table.csv and table.json")
    plots = pages.load_plots()
    draw = functools.partial(plots.plot_methods, "faults noticed by step", noticed(outcomes), {}, {})
    body = [
        *map(paper.section, parts),
        f'<div class="plots">{pages.plot(out, "noticed", draw, "noticed by step")}</div>',
    ]
    body += [f"<p>{pages.escape(METHOD)}</p>", paper.section(paper.settings(out), folded=True)]
    files.write_text(out / "report.html", pages.page("Planted faults", ["<h1>Planted faults</h1>", *body]))


def outcome(line: Mapping[str, Any], causes: Sequence[Cause] = CAUSES) -> Outcome:
    """What the diagnosis says of a run, by what was measured of it.

    Args:
      line: of trials.jsonl.
      causes: to look for.
    """
    at_end = ranking.diagnose(evidence(line), causes)
    names = [each.cause.name for each in at_end.findings]
    return Outcome(
        planted=line["cause"],
        found=names[0] if names else NOTHING,
        others=tuple(names[1:]),
        verdict=at_end.verdict,
        noticed=_noticed(line, causes),
        signed=line["signed"],
        part=line["part"],
        setup=line["setup"],
        key=line["key"],
    )


def _noticed(line: Mapping[str, Any], causes: Sequence[Cause]) -> int | None:
    """The first of MOMENTS from which on the planted cause is ranked first."""
    if line["cause"] == HEALTHY:
        return None
    first = None
    for step in MOMENTS:
        findings = ranking.diagnose(at_step(line, step), causes).findings
        found = bool(findings) and same_class(line["cause"], findings[0].cause.name)
        first = (step if first is None else first) if found else None
    return first


def at_step(line: Mapping[str, Any], step: int) -> Evidence:
    """What was known of a run after so many steps: what was measured before the first, and the metrics since; after
    the last, what was measured then."""
    if step >= max((record["step"] for record in line["records"]), default=0):
        return evidence(line)
    before = evidence(line, "before")
    if not step:
        return before
    records = [
        {name: float(value) for name, value in record.items()} for record in line["records"] if record["step"] <= step
    ]
    rows = {"setup/rows_read": line["after"].get("setup/rows_read", 0.0) * step / max(MOMENTS)}
    return Evidence(line["stage"], True, {**before.signals, **series.signals(records), **rows})


def same_class(planted: str, found: str) -> bool:
    """Whether two causes are one, or of one class of causes that no signal tells apart."""
    classes = _classes()
    return planted == found or (classes.get(planted, "") != "" and classes.get(planted) == classes.get(found))


@functools.cache
def _classes() -> dict[str, str]:
    return {cause.name: cause.alike for cause in CAUSES}


def paper_tables(outcomes: Sequence[Outcome]) -> list[Table]:
    """What each part of the study comes to, and its causes one by one."""
    tables = []
    for part in dict.fromkeys(each.part for each in outcomes):
        own = [each for each in outcomes if each.part == part]
        named = {"Part": summary(own), "Kinds of runs of part": by_kind(own), "Causes of part": by_cause(own)}
        for title, (header, *rows) in ((f"{about} {part}", table) for about, table in named.items()):
            tables.append(Table(title, header, rows))
    return tables


def noticed(outcomes: Sequence[Outcome]) -> dict[str, Estimate]:
    """Step -> the share of faults that were noticed by then, with its exact interval."""
    faulty = [each for each in outcomes if each.planted != HEALTHY]
    shares = {}
    for step in MOMENTS if faulty else ():
        soon = sum(each.noticed is not None and each.noticed <= step for each in faulty)
        shares[str(step)] = Estimate(soon / len(faulty), *exact_interval(soon, len(faulty)))
    return shares


def page(outcomes: Sequence[Outcome]) -> str:
    """The report as Markdown; what is counted, the part test, comes first."""
    sections = [METHOD]
    for part in sorted(dict.fromkeys(each.part for each in outcomes), reverse=True):
        own = [each for each in outcomes if each.part == part]
        sections.append(f"## Runs of `{part}`")
        sections += map(markdown_table, (summary(own), moments(own), by_kind(own), by_cause(own)))
        if wrong := [each for each in own if not each.right and each.planted != HEALTHY]:
            sections.append("Taken for another:\n\n" + "\n".join(map(_told, wrong)))
        if alarms := [each for each in own if each.planted == HEALTHY and each.found != NOTHING]:
            sections.append("False alarms:\n\n" + "\n".join(map(_told, alarms)))
    return "\n\n".join(sections) + "\n"


def _told(outcome: Outcome) -> str:
    """A line on a run: what the diagnosis said of it."""
    said = outcome.verdict if outcome.found == NOTHING else ", ".join((outcome.found, *outcome.others))
    return f"- {outcome.key.split('/', 1)[1]}: {said}"


def markdown_table(lines: Sequence[Sequence[str]]) -> str:
    """A table of Markdown, the first line its header."""
    rows = [f"| {' | '.join(line)} |" for line in lines]
    return "\n".join([rows[0], "|---" * len(lines[0]) + "|", *rows[1:]])


def summary(outcomes: Sequence[Outcome]) -> list[list[str]]:
    """What a part of the study comes to."""
    faulty = [each for each in outcomes if each.planted != HEALTHY]
    healthy = [each for each in outcomes if each.planted == HEALTHY]
    groups = {
        "with a signature": [each for each in faulty if each.signed],
        "others": [e for e in faulty if not e.signed],
    }
    rows = [["recall of", "ranked first", "found at all"]]
    for name, own in groups.items():
        first = Share(sum(each.right for each in own), len(own))
        anywhere = Share(sum(any(same_class(e.planted, x) for x in (e.found, *e.others)) for e in own), len(own))
        rows.append([name, first.text(), anywhere.text()])
    alarmed = [each for each in healthy if each.found != NOTHING]
    told = [each for each in outcomes if each.found != NOTHING]
    rows.append(["false alarms", Share(len(alarmed), len(healthy)).text(), ""])
    rows.append(["called healthy", Share(sum(e.verdict == "healthy" for e in healthy), len(healthy)).text(), ""])
    rows.append(["precision", Share(sum(each.right for each in told), len(told)).text(), ""])
    return rows


def moments(outcomes: Sequence[Outcome]) -> list[list[str]]:
    """How many of the faults are noticed by a step."""
    faulty = [each for each in outcomes if each.planted != HEALTHY]
    soon = [sum(each.noticed is not None and each.noticed <= step for each in faulty) for step in MOMENTS]
    shares = [f"{count} ({count / len(faulty):.0%})" if faulty else "0" for count in soon]
    return [["noticed by step", *map(str, MOMENTS)], [f"of {len(faulty)} faults", *shares]]


def by_kind(outcomes: Sequence[Outcome]) -> list[list[str]]:
    """A line for each kind of run."""
    rows = [["kind of run", "faults", "ranked first", "healthy runs", "false alarms"]]
    for setup in dict.fromkeys(each.setup for each in outcomes):
        faulty = [each for each in outcomes if each.setup == setup and each.planted != HEALTHY]
        healthy = [each for each in outcomes if each.setup == setup and each.planted == HEALTHY]
        counts = sum(each.right for each in faulty), sum(each.found != NOTHING for each in healthy)
        rows.append([setup, str(len(faulty)), str(counts[0]), str(len(healthy)), str(counts[1])])
    return rows


def by_cause(outcomes: Sequence[Outcome]) -> list[list[str]]:
    """A line for each planted cause: how often it was ranked first, when, and what else was."""
    rows = [["planted", "runs", "first", "precision", "noticed", "taken for"]]
    told = Counter(each.found for each in outcomes)
    right = Counter(each.found for each in outcomes if each.right)
    for name in dict.fromkeys(each.planted for each in outcomes):
        own = [each for each in outcomes if each.planted == name]
        if name == HEALTHY:
            others = Counter(each.found for each in own if each.found != NOTHING)
            rows.append([name, str(len(own)), str(sum(e.found == NOTHING for e in own)), "", "", _counts(others)])
            continue
        others = Counter(each.found for each in own if not each.right)
        steps = sorted(str(each.noticed) for each in own)
        precision = f"{right[name]}/{told[name]}" if told[name] else "-"
        rows.append(
            [name, str(len(own)), str(sum(each.right for each in own)), precision, " ".join(steps), _counts(others)]
        )
    return rows


def _counts(counter: Counter[str]) -> str:
    return ", ".join(f"{name} {count}" for name, count in counter.most_common())


def confusion(outcomes: Sequence[Outcome]) -> list[list[str]]:
    """The confusion matrix: a row for what was planted, a column for what was ranked first."""
    planted = sorted({each.planted for each in outcomes})
    found = sorted({each.found for each in outcomes})
    counts = Counter((each.planted, each.found) for each in outcomes)
    return [["planted", *found], *([row, *(str(counts[row, column]) for column in found)] for row in planted)]


def exact_interval(count: int, total: int, level: float = 0.95) -> tuple[float, float]:
    """The exact interval of a share (Clopper and Pearson 1934, doi:10.1093/biomet/26.4.404), by bisection.

    Args:
      count, total: so many of so many.
      level: of confidence, half of the rest on either side; where none or all are counted, all of it on one side.
    """
    tail = (1 - level) / (1 if count in (0, total) else 2)
    low = 0.0 if count == 0 else _bisect(lambda p: 1 - _below(count - 1, total, p) - tail)
    high = 1.0 if count == total else _bisect(lambda p: tail - _below(count, total, p))
    return low, high


def _below(count: int, total: int, p: float) -> float:
    """The probability of at most so many of so many, each with probability p."""
    return sum(math.comb(total, k) * p**k * (1 - p) ** (total - k) for k in range(count + 1))


def _bisect(function: Any) -> float:
    """Where a function that rises from below 0 to above 0 between 0 and 1 is 0."""
    low, high = 0.0, 1.0
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if function(middle) < 0 else (low, middle)
    return (low + high) / 2
