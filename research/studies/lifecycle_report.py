"""The report of a study of a model's whole life: a row for each stage, what that was for, and rewards over the KL."""

import csv
import dataclasses
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from research import files
from research.studies import lifecycle, means, pages, paper
from research.studies.lifecycle import Curve, Fall, Phase
from research.studies.means import Mean, mean
from research.studies.paper import Table
from research.studies.tables import text_table

METHOD = (
    "Means over seeds, and in brackets 95 % intervals of the mean by Student's t distribution; with one seed there are "
    "none. text: loss of held-out pretraining text, nats a token. right: share of right answers. true: their planted "
    "utility. proxy: what the reward model gives, of each seed shifted and scaled so that the answers of the start "
    "have the mean and the deviation of their true rewards. KL: nats of an answer from the start, drawn by the stage; "
    "of the best of n, log n - (n - 1) / n. length: tokens of an answer. pairs: share of held-out pairs, with right "
    "labels, that the reward model puts in the right order. Answers are drawn at a temperature of 1."
)
TITLES = {
    lifecycle.TEXT: "text",
    lifecycle.RIGHT: "right",
    lifecycle.TRUE: "true",
    lifecycle.PROXY: "proxy",
    lifecycle.KL: "KL",
    lifecycle.LENGTH: "length",
    lifecycle.PAIRS: "pairs",
}
# What a stage is for: the measure, and whether it is to fall.
PURPOSES = {
    lifecycle.PRETRAIN: (lifecycle.TEXT, True),
    lifecycle.SFT: (lifecycle.RIGHT, False),
    lifecycle.REWARD: (lifecycle.PAIRS, False),
    lifecycle.POLICY: (lifecycle.TRUE, False),
    lifecycle.BEST_OF: (lifecycle.TRUE, False),
}
CHANCE = 0.5  # of pairs
SHOWN = 8  # prompts with their answers after each stage


@dataclasses.dataclass(frozen=True)
class Gain:
    """What a stage gave of what it is for.

    Attributes:
      stage, measure, before: names; `before` is what it is compared with.
      difference: over seeds, seed by seed.
      falls: whether the measure is to fall.
    """

    stage: str
    measure: str
    before: str
    difference: Mean
    falls: bool

    @property
    def verdict(self) -> str:
        """Whether it is better, by the interval."""
        if math.isnan(self.difference.low):
            return "one seed"
        low, high = (-self.difference.high, -self.difference.low) if self.falls else self.difference[1:]
        return "better" if low > 0 else "worse" if high < 0 else "can't be told"


@dataclasses.dataclass(frozen=True)
class Life:
    """All that is reported.

    Attributes:
      phases: in their order.
      start: the phase whose policy those of rewards and preferences begin with.
      values: name of a phase -> measure -> value of each seed.
      curves: name of a policy -> its way.
    """

    phases: Sequence[Phase]
    start: Phase
    values: Mapping[str, Mapping[str, Sequence[float]]]
    curves: Mapping[str, Curve]

    @property
    def falls(self) -> dict[str, Fall]:
        return {name: lifecycle.fall(curve) for name, curve in self.curves.items()}

    def gains(self) -> list[Gain]:
        """What each stage gave."""
        policies = [phase for phase in self.phases if phase.kind in (lifecycle.PRETRAIN, lifecycle.SFT)]
        gains = []
        for phase in self.phases:
            measure, falls = PURPOSES[phase.kind]
            values = self.values[phase.name][measure]
            if phase.kind == lifecycle.PRETRAIN:
                name, others = "before its first step", [lifecycle.first(run, measure) for run in phase.runs]
            elif phase.kind == lifecycle.REWARD:
                name, others = "chance", [CHANCE] * len(values)
            else:
                name = policies[0].name if phase.kind == lifecycle.SFT else self.start.name
                others = self.values[name][measure]
            if others:  # none of a model that is named: it isn't known what it was before
                difference = mean(np.subtract(values, others).tolist())
                gains.append(Gain(phase.name, TITLES[measure], name, difference, falls))
        return gains


def read(phases: Sequence[Phase], start: str) -> Life:
    """Reads what the stages left.

    Args:
      phases: in their order.
      start: the name of the one whose policy the later ones begin with.

    Raises:
      InputError: a folder lacks what it should have.
    """
    (begun,) = (phase for phase in phases if phase.name == start)
    scales = [lifecycle.scale_of(lifecycle.read_answers(folder)) for folder in begun.answers]
    values = {phase.name: lifecycle.measures(phase, scales, begun) for phase in phases}
    curves = {}
    for phase in phases:
        if phase.kind == lifecycle.BEST_OF:
            curves[phase.name] = lifecycle.best_of_curve(phase, scales)
        elif phase.kind == lifecycle.POLICY and (curve := lifecycle.training_curve(phase, scales)) is not None:
            curves[phase.name] = curve
    return Life(phases, begun, values, curves)


def report(phases: Sequence[Phase], start: str, workdir: str) -> None:
    """Writes table.md, .tex, .csv and .json, samples.md, costs.csv, plots (PNG, SVG, PDF) and report.html into a
    folder; prints the tables.

    Args:
      phases: in their order.
      start: see `read`.
      workdir: of the study.

    Raises:
      InputError: a folder lacks what it should have, or matplotlib isn't installed: the tables are written then.
    """
    life = read(phases, start)
    out = Path(workdir)
    out.mkdir(parents=True, exist_ok=True)
    tables = {"Stages": table(life), "What each stage gave": gain_table(life), "Overoptimisation": fall_table(life)}
    samples, costs = sample_table(life), cost_table(life)
    files.write_json(out / "table.json", _as_json(life))
    _write_csv(out / "table.csv", life)
    written = [Table(title, ["stage", *rows[0][1:]], rows[1:]) for title, rows in tables.items()]
    paper.write(out, "Lifecycle", [*written, Table("Seeds", *seed_table(life))], METHOD)
    files.write_text(out / "samples.md", paper.markdown(samples[0], samples[1:]) + "\n")
    with open(out / "costs.csv", "w", encoding="utf-8", newline="") as file:  # apart: no two runs take as long
        csv.writer(file).writerows(costs)
    print("\n\n".join(text_table(rows) for rows in (*tables.values(), costs) if len(rows) > 1))
    print(f"\n{METHOD}\n\nin full in {out / 'report.html'}, table.md, .tex, .csv, .json and samples.md")
    _write_page(out, life, {**tables, "Costs of all seeds": costs}, samples)


def table(life: Life) -> list[list[str]]:
    """The heading and a row for each stage, as text."""
    rows = [["", "seeds", *TITLES.values()]]
    for phase in life.phases:
        cells = life.values[phase.name]
        rows.append(
            [phase.name, str(phase.seeds), *(means.text(mean(cells[m])) if m in cells else "-" for m in TITLES)],
        )
    return rows


def seed_table(life: Life) -> tuple[list[str], list[list[str]]]:
    """The heading and a row for each stage and seed, as text."""
    rows = []
    for phase in life.phases:
        cells = life.values[phase.name]
        for i in range(phase.seeds):
            rows.append([phase.name, str(i + 1), *(f"{cells[m][i]:.4g}" if m in cells else "-" for m in TITLES)])
    return ["stage", "seed", *TITLES.values()], rows


def gain_table(life: Life) -> list[list[str]]:
    """The heading and what each stage gave, as text."""
    rows = [["", "is for", "compared with", "difference", ""]]
    for gain in life.gains():
        aim = f"{gain.measure}, lower" if gain.falls else gain.measure
        rows.append([gain.stage, aim, gain.before, means.text(gain.difference), gain.verdict])
    return rows


def fall_table(life: Life) -> list[list[str]]:
    """The heading and, of each policy with a way, what has become of both rewards since the truth was the highest."""
    rows = [["", "KL where the truth is highest", "KL at the end", "true since", "proxy since", ""]]
    for name, fall in life.falls.items():
        kl = [f"{value:.3g}" for value in (fall.kl_at_best, fall.kl_at_end)]
        rows.append([name, *kl, means.text(fall.true), means.text(fall.proxy), _verdict(fall)])
    return rows


def cost_table(life: Life) -> list[list[str]]:
    """The heading and what each stage took."""
    each = {phase.name: lifecycle.costs(phase) for phase in life.phases}
    rows = [[name, *(f"{value:.0f}" for value in costs.values())] for name, costs in each.items()]
    return [["", *next(iter(each.values()))], *rows]


def sample_table(life: Life) -> list[list[str]]:
    """The heading and the first seed's answers to the same prompts after each stage, with their true rewards."""
    phases = [phase for phase in life.phases if phase.answers]
    each = [_first_answers(phase) for phase in phases]
    rows = [["prompt", *(phase.name for phase in phases)]]
    for lines in zip(*each, strict=True):
        rows.append([lines[0]["prompt"], *(f"{line['completion']!r} {line['utility']:.2g}" for line in lines)])
    return rows


def _first_answers(phase: Phase) -> list[Mapping[str, Any]]:
    """One answer to each of the first prompts; of the best of n that with the highest proxy."""
    answers = lifecycle.read_answers(phase.answers[0])
    numbers = sorted({line["number"] for line in answers})[:SHOWN]
    groups = [[line for line in answers if line["number"] == number] for number in numbers]
    return [max(group, key=lambda line: line["reward"]) for group in groups]


def _verdict(fall: Fall) -> str:
    """Whether the proxy was optimised too far: it isn't where the truth was highest at the end."""
    if fall.kl_at_best == fall.kl_at_end:
        return "highest at the end"
    if math.isnan(fall.true.high):
        return "one seed"
    return "overoptimised" if fall.true.high < 0 <= fall.proxy.value else "can't be told"


def _write_csv(path: Path, life: Life) -> None:
    with open(path, "w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["stage", "seeds", *(f"{m}{end}" for m in TITLES for end in ("", " low", " high"))])
        for phase in life.phases:
            cells = life.values[phase.name]
            numbers = [x for m in TITLES for x in (mean(cells[m]) if m in cells else (math.nan,) * 3)]
            writer.writerow([phase.name, phase.seeds, *("" if math.isnan(x) else x for x in numbers)])


def _as_json(life: Life) -> dict[str, Any]:
    """What table.json holds; nan, which JSON lacks, becomes None."""
    return {
        "stages": [
            {"name": p.name, "kind": p.kind, "start": p is life.start, **life.values[p.name]} for p in life.phases
        ],
        "gains": [
            {"stage": g.stage, "measure": g.measure, "before": g.before, **_finite(g.difference), "verdict": g.verdict}
            for g in life.gains()
        ],
        "curves": {name: {k: v.tolist() for k, v in curve._asdict().items()} for name, curve in life.curves.items()},
        "falls": {
            name: {"true": _finite(f.true), "proxy": _finite(f.proxy), "kl_at_best": f.kl_at_best}
            | {"kl_at_end": f.kl_at_end, "verdict": _verdict(f)}
            for name, f in life.falls.items()
        },
    }


def _finite(cell: Mean) -> dict[str, float | None]:
    return {name: None if math.isnan(x) else x for name, x in cell._asdict().items()}


def _write_page(
    out: Path, life: Life, tables: Mapping[str, Sequence[Sequence[str]]], samples: Sequence[Sequence[str]]
) -> None:
    """Writes the plots and report.html."""
    plots, pictures = pages.load_plots(), ""
    stages = {p.name: [life.values[p.name].get(m) for m in (lifecycle.TRUE, lifecycle.PROXY)] for p in life.phases}
    stages = {name: values for name, values in stages.items() if all(values)}
    for name, draw in (
        ("rewards_over_kl", lambda theme: plots.plot_rewards_over_kl(life.curves, theme)),
        ("rewards_by_stage", lambda theme: plots.plot_stages(stages, theme)),
    ):
        pictures += pages.plot(out, name, draw, name.replace("_", " "))
    body = ["<h1>Lifecycle</h1>", f"<p>{pages.escape(METHOD)}</p>"]
    for title, rows in tables.items():
        if len(rows) > 1:
            body += [f"<h2>{title}</h2>", pages.table(rows[0], rows[1:], "numbers")]
    body += [f'<div class="plots">{pictures}</div>', "<h2>The same prompts after each stage</h2>"]
    body.append(pages.table(samples[0], samples[1:], "settings"))
    body.append(paper.section(paper.settings(out), folded=True))
    (out / "report.html").write_text(pages.page("Lifecycle", body), encoding="utf-8")
