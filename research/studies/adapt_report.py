"""The report of a study that compares ways to adapt a model: how good each becomes, and what it costs."""

import csv
import dataclasses
import functools
import itertools
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from research import files
from research.errors import InputError
from research.run.metrics import read_metrics
from research.studies import means, pages, paper
from research.studies.means import Mean, mean
from research.studies.paper import Table
from research.studies.tables import text_table

METHOD = (
    "Each way is at the learning rate that gave one seed the lowest loss of rows held out of the training data "
    "(eval/loss). Means over seeds of the last evaluation, and in brackets 95 % intervals of the mean by Student's t "
    "distribution; with one seed there are none. Trained: parameters. Step: bytes that a compiled step needs by XLA's "
    "analysis (what is trained, its moments, what is frozen, a batch, temporaries). Time: the median over the lines of "
    "the logs, with whatever else the machine did meanwhile."
)


@dataclasses.dataclass(frozen=True)
class Way:
    """A way to adapt.

    Attributes:
      name: as the study calls it.
      rate: its learning rate.
      rates: the learning rates that were tried, and the held-out loss of each on one seed; inf where it diverged.
      runs: workdirs at `rate`, one a seed.
    """

    name: str
    rate: float
    rates: Mapping[float, float]
    runs: Sequence[str]

    @property
    def diverged(self) -> list[float]:
        """The learning rates at which it diverged."""
        return sorted(rate for rate, loss in self.rates.items() if math.isinf(loss))

    @property
    def at_the_edge(self) -> bool:
        """Whether a lower or higher rate than was tried may have been better."""
        return self.rate in (min(self.rates), max(self.rates))


@dataclasses.dataclass(frozen=True)
class Result:
    """What came of a way.

    Attributes:
      way: the way.
      metrics: name -> of the last evaluation, over seeds.
      seeds: name -> the same of each seed.
      before: the same of the model that all began with, and what the adapter begins as, with the first seed.
      trained: parameters.
      step_bytes: of a step.
      seconds: of a step.
    """

    way: Way
    metrics: Mapping[str, Mean]
    seeds: Mapping[str, Sequence[float]]
    before: Mapping[str, float]
    trained: int
    step_bytes: float
    seconds: float


def read(way: Way, metrics: Sequence[str]) -> Result:
    """Reads the runs of a way.

    Args:
      way: to read.
      metrics: such as "eval/test/exact_match".

    Raises:
      InputError: a run lacks a metric.
    """
    runs = [_read_run(run, metrics) for run in way.runs]
    return Result(
        way,
        {name: mean([run["last"][name] for run in runs]) for name in metrics},
        {name: [run["last"][name] for run in runs] for name in metrics},
        runs[0]["first"],
        int(runs[0]["trained"]),
        max(run["step_bytes"] for run in runs),
        float(np.median(np.concatenate([run["seconds"] for run in runs]))),
    )


def _read_run(run: str, metrics: Sequence[str]) -> dict[str, Any]:
    """The numbers of a run. A step's time is that of its tokens at the speed of its line of the log."""
    records = read_metrics(run)
    series: dict[str, list[float]] = {}
    for record in records:
        for name, value in record.items():
            series.setdefault(name, []).append(value)
    for name in (*metrics, "startup/trained_parameters"):
        if name not in series:
            raise InputError(f"{run}: has no metric {name}. Its evaluation must give it: see eval.tasks.")
    timed = [record for record in records if "train/tokens_per_second" in record]
    return {
        "first": {name: series[name][0] for name in metrics},
        "last": {name: series[name][-1] for name in metrics},
        "trained": series["startup/trained_parameters"][0],
        "step_bytes": series.get("startup/step_bytes", [math.nan])[0],
        "seconds": [r["train/tokens"] / r["train/tokens_per_second"] for r in timed] or [math.nan],
    }


def report(ways: Sequence[Way], metrics: Sequence[str], workdir: str) -> None:
    """Writes table.csv, .json, .md and .tex, plots of each metric (PNG, SVG, PDF) and report.html into a folder, and
    prints the table.

    Args:
      ways: to compare.
      metrics: how good they are, such as "eval/test/exact_match".
      workdir: of the study.

    Raises:
      InputError: a run lacks a metric, or matplotlib isn't installed: the tables are written then.
    """
    results = [read(way, metrics) for way in ways]
    out = Path(workdir)
    out.mkdir(parents=True, exist_ok=True)
    files.write_json(out / "table.json", [_as_json(result) for result in results])
    header, rows = table(results, metrics)
    with open(out / "table.csv", "w", encoding="utf-8", newline="") as file:
        csv.writer(file).writerows(_as_csv(results))
    print(text_table([header, *rows]))
    remarks = [METHOD, *_remarks(results)]
    print("\n" + "\n".join(remarks))
    paper.write(out, "Adaptation", paper_tables(results, metrics), " ".join(remarks))
    print(f"\nin full in {out / 'report.html'}, table.md, table.tex, table.csv and table.json")
    _write_page(out, results, metrics, remarks)


def table(results: Sequence[Result], metrics: Sequence[str]) -> tuple[list[str], list[list[str]]]:
    """The heading and the rows, as text."""
    header = ["", "rate", "seeds", *metrics, "trained", "step, MiB", "time, ms"]
    rows = []
    for r in results:
        cost = [f"{r.trained:,}", f"{r.step_bytes / 2**20:.1f}", f"{1000 * r.seconds:.0f}"]
        rows.append(
            [r.way.name, f"{r.way.rate:g}", str(len(r.way.runs)), *(means.text(r.metrics[m]) for m in metrics), *cost]
        )
    return header, rows


def paper_tables(results: Sequence[Result], metrics: Sequence[str]) -> list[Table]:
    """The ways, the losses of the rates that were tried, and the runs one by one."""
    header, rows = table(results, metrics)
    rates = [[r.way.name, f"{rate:g}", _loss(loss)] for r in results for rate, loss in sorted(r.way.rates.items())]
    seeds = [
        [r.way.name, str(place), *(f"{value:.4g}" for value in values)]
        for r in results
        for place, values in enumerate(zip(*(r.seeds[m] for m in metrics), strict=True), start=1)
    ]
    return [
        Table("Ways to adapt", ["way", *header[1:]], rows),
        Table("Learning rates", ["way", "rate", "held-out loss of one seed"], rates),
        Table("Seeds", ["way", "run", *metrics], seeds),
    ]


def _remarks(results: Sequence[Result]) -> list[str]:
    """What a reader of the table should know besides."""
    remarks = []
    edge = [result.way.name for result in results if len(result.way.rates) > 1 and result.way.at_the_edge]
    if edge:
        remarks.append(
            f"At the lowest or highest rate that was tried, so that another may be better: {', '.join(edge)}."
        )
    diverged = [f"{r.way.name} at {_rates(r.way.diverged)}" for r in results if r.way.diverged]
    if diverged:
        remarks.append(f"Diverged, which counts as the worst loss: {'; '.join(diverged)}.")
    return remarks


def _rates(rates: Sequence[float]) -> str:
    return ", ".join(f"{rate:g}" for rate in rates)


def _write_page(out: Path, results: Sequence[Result], metrics: Sequence[str], remarks: Sequence[str]) -> None:
    """Writes the plots and report.html."""
    plots, pictures = pages.load_plots(), ""
    for metric, (name, title) in itertools.product(
        metrics, (("trained", "trained parameters"), ("step_bytes", "bytes of a step"))
    ):
        points = {r.way.name: (getattr(r, name), *r.metrics[metric]) for r in results}
        draw = functools.partial(plots.plot_costs, metric, title, points)
        pictures += pages.plot(out, f"{metric.replace('/', '_')}_over_{name}", draw, f"{metric} over {title}")
    for metric in metrics:
        draw = functools.partial(
            plots.plot_methods,
            metric,
            {r.way.name: r.metrics[metric] for r in results},
            {r.way.name: r.seeds[metric] for r in results},
            {},
        )
        pictures += pages.plot(out, metric.replace("/", "_"), draw, f"{metric} of each way")
    losses = {r.way.name: sorted(r.way.rates.items()) for r in results}
    rates = [[name, ", ".join(f"{rate:g}: {_loss(loss)}" for rate, loss in own)] for name, own in losses.items()]
    body = ["<h1>Adaptation</h1>", *(f"<p>{pages.escape(text)}</p>" for text in remarks)]
    body += [pages.table(*table(results, metrics), "numbers"), f'<div class="plots">{pictures}</div>']
    body += ["<h2>Learning rates</h2>", pages.table(["", "rate: held-out loss of one seed"], rates, "settings")]
    body.append(paper.section(paper.settings(out), folded=True))
    (out / "report.html").write_text(pages.page("Adaptation", body), encoding="utf-8")


def _loss(loss: float) -> str:
    return "diverged" if math.isinf(loss) else f"{loss:.4g}"


def _as_csv(results: Sequence[Result]) -> list[list[Any]]:
    measured = [f"{name}{end}" for name in results[0].metrics for end in ("", " low", " high", " before")]
    lines: list[list[Any]] = [["name", "rate", "seeds", *measured, "trained", "step bytes", "seconds", "diverged at"]]
    for r in results:
        numbers = [x for name, cell in r.metrics.items() for x in (*cell, r.before[name])]
        numbers += [r.trained, r.step_bytes, r.seconds]
        lines.append([r.way.name, r.way.rate, len(r.way.runs), *("" if math.isnan(x) else x for x in numbers)])
        lines[-1].append(_rates(r.way.diverged))
    return lines


def _as_json(result: Result) -> dict[str, Any]:
    """A row of table.json; nan and infinity, which JSON lacks, become None."""

    def finite(x: float) -> float | None:
        return x if math.isfinite(x) else None

    return {
        "name": result.way.name,
        "rate": result.way.rate,
        "rates": {f"{rate:g}": finite(loss) for rate, loss in result.way.rates.items()},
        "runs": list(result.way.runs),
        **{name: {k: finite(x) for k, x in cell._asdict().items()} for name, cell in result.metrics.items()},
        "values of seeds": {name: [finite(x) for x in values] for name, values in result.seeds.items()},
        "before": {name: finite(x) for name, x in result.before.items()},
        **{name: finite(getattr(result, name)) for name in ("trained", "step_bytes", "seconds")},
    }
