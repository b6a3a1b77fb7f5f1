"""The report of a study that selects data: what each way dropped, how good the models became, and what it cost."""

import csv
import dataclasses
import functools
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from research import files, loading
from research.models import flops
from research.pretrained import wholeness
from research.run.metrics import read_metrics
from research.sources import entries, records, scores, selected
from research.studies import means, pages, paper
from research.studies.compare_report import read_way
from research.studies.means import Mean, mean
from research.studies.paper import Table
from research.studies.planted_noise import KINDS
from research.studies.tables import text_table

METHOD = (
    "Means over seeds of the last evaluation on records without noise, and in brackets 95 % intervals of the mean by "
    "Student's t distribution. All train for as many steps of as many tokens, and each way that selects keeps as many "
    "of the data's. Against random: the difference, seed by seed. Precision: of the records that were dropped, which "
    "share is noise; recall: of the noise, which share was dropped, and of each kind. Cost: FLOPs of training the "
    "small models and of all that they score, over those of one training of the larger one."
)
BASE = "random"


@dataclasses.dataclass(frozen=True)
class Way:
    """A way to select.

    Attributes:
      name: as the study calls it.
      runs: workdirs, one a seed.
      lists: what was kept for each of the runs; none where nothing was selected beforehand.
      models: the names of the small models that it needs.
      while_training: whether the reference runs beside the training.
    """

    name: str
    runs: Sequence[str]
    lists: Sequence[str]
    models: Sequence[str]
    while_training: bool = False


@dataclasses.dataclass(frozen=True)
class Pool:
    """The data that ways select from.

    Attributes:
      name: of it.
      path: of its file, whose records have `noise`.
      scores: of its records.
      models: name of a small model -> its run.
      ways: to select.
    """

    name: str
    path: str
    scores: str
    models: Mapping[str, str]
    ways: Sequence[Way]

    @functools.cached_property
    def noise(self) -> list[str]:
        """What is wrong with each record, "" where nothing is."""
        return [records.parse(raw).get("noise", "") for _, raw in entries.locate(self.path, count=0, seed=0).read()]


class Dropped(NamedTuple):
    """What a way dropped: shares, nan where there is nothing to share."""

    kept_tokens: float
    precision: float
    recall: float
    by_kind: Mapping[str, float]


@dataclasses.dataclass(frozen=True)
class Result:
    """What came of a way.

    Attributes:
      way: it.
      pool: name of the pool.
      metrics: name -> of the last evaluation, over seeds.
      seeds: name -> the same of each seed.
      differences: the same less that of random, seed by seed; None for random itself.
      dropped: the mean over seeds; None where nothing is selected beforehand.
      cost: FLOPs of the selection over those of a training.
      tokens: that one training read.
    """

    way: Way
    pool: str
    metrics: Mapping[str, Mean]
    seeds: Mapping[str, Sequence[float]]
    differences: Mapping[str, Mean | None]
    dropped: Dropped | None
    cost: float
    tokens: float


def report(pools: Sequence[Pool], metrics: Sequence[str], workdir: str) -> None:
    """Writes table.md, .tex, .csv and .json, plots (PNG, SVG, PDF) and report.html into a folder; prints the tables.

    Args:
      pools: with their ways, `random` among them.
      metrics: how good the models are, such as "eval/nll".
      workdir: of the study.

    Raises:
      InputError: a run lacks a metric, or matplotlib isn't installed: the tables are written then.
    """
    out = Path(workdir)
    out.mkdir(parents=True, exist_ok=True)
    results = {pool.name: read(pool, metrics) for pool in pools}
    flat = [result for own in results.values() for result in own]
    files.write_json(out / "table.json", [_as_json(result) for result in flat])
    with open(out / "table.csv", "w", encoding="utf-8", newline="") as file:
        csv.writer(file).writerows(_as_csv(flat, metrics))
    tables = []
    for name, own in results.items():
        header, rows = table(own, metrics)
        verdicts = [verdict(own, metric) for metric in metrics]
        tables.append(Table(name, ["way", *header[1:]], rows, " ".join(verdicts)))
        print(f"{name}:\n{text_table([header, *rows])}\n" + "\n".join(verdicts) + "\n")
    tables.append(Table("Seeds", ["pool", "way", "run", *metrics], seed_rows(flat, metrics)))
    paper.write(out, "Data selection", tables, METHOD)
    print(f"{METHOD}\n\nin full in {out / 'report.html'}, table.md, table.tex, table.csv and table.json")
    _write_page(out, results, metrics)


def read(pool: Pool, metrics: Sequence[str]) -> list[Result]:
    """Reads what came of the ways of a pool. Raises InputError where a run lacks a metric."""
    ways = {way.name: read_way(way.name, way.runs, metrics) for way in pool.ways}
    last = {name: {m: [_last(curve[m]) for curve in way.curves] for m in metrics} for name, way in ways.items()}
    costs = Costs.of(pool)
    results = []
    for way in pool.ways:
        differences: dict[str, Mean | None] = {}
        for m in metrics:
            own, base = last[way.name][m], last.get(BASE, {}).get(m)
            paired = base is not None and way.name != BASE and len(own) == len(base)
            differences[m] = mean(np.subtract(own, base).tolist()) if paired else None
        found = {m: mean(last[way.name][m]) for m in metrics}
        results.append(
            Result(
                way,
                pool.name,
                found,
                last[way.name],
                differences,
                _dropped(way, pool),
                costs.of_way(way),
                _tokens(way.runs[0]),
            )
        )
    return results


def _last(curve: Mapping[int, float]) -> float:
    return curve[max(curve)] if curve else math.nan


def _tokens(run: str) -> float:
    """How many tokens a run read, padding left out."""
    seen = [record["train/tokens"] for record in read_metrics(run) if "train/tokens" in record]
    return float(np.mean(seen)) * _steps(run) if seen else math.nan


def _steps(run: str) -> int:
    return int(wholeness.read_record(run)["config"]["steps"])


def _dropped(way: Way, pool: Pool) -> Dropped | None:
    """What a way dropped. `truth` has no list: it is a file of its own."""
    if not way.lists:
        return None
    each = [dropped(pool.noise, kept, pool.scores) for kept in way.lists]
    kinds = {kind: float(np.mean([d.by_kind[kind] for d in each])) for kind in each[0].by_kind}
    return Dropped(*(float(np.mean([d[i] for d in each])) for i in range(3)), kinds)


def dropped(noise: Sequence[str], kept: str, scored: str) -> Dropped:
    """What a list of kept records drops.

    Args:
      noise: of each record of the file.
      kept: the list.
      scored: the scores that it was made by.
    """
    selection, rows = selected.read(kept, "kept"), scores.read(scored)
    (of_file,) = selection.by_file.values()
    keep = np.zeros(len(noise), bool)
    keep[of_file.number] = True
    kinds = np.array(noise)
    bad = kinds != ""
    share = lambda part, whole: float(np.sum(part & whole) / np.sum(whole)) if np.any(whole) else math.nan  # noqa: E731
    by_kind = {kind: share(~keep, kinds == kind) for kind in KINDS} if bad.any() else {}
    tokens = float(rows.tokens[keep].sum() / rows.tokens.sum())
    return Dropped(tokens, share(bad, ~keep) if bad.any() else math.nan, share(~keep, bad), by_kind)


@dataclasses.dataclass(frozen=True)
class Costs:
    """What selections cost.

    Attributes:
      training: small model -> FLOPs of its training.
      scoring: small model -> FLOPs of a pass over the pool.
      beside: small model -> FLOPs of a pass over all that a training of the larger model reads.
      large: FLOPs of a training of the larger model.
    """

    training: Mapping[str, float]
    scoring: Mapping[str, float]
    beside: Mapping[str, float]
    large: float

    @classmethod
    def of(cls, pool: Pool) -> "Costs":
        tokens = float(scores.read(pool.scores).tokens.sum())
        run = pool.ways[0].runs[0]
        training = {name: _training(model) for name, model in pool.models.items()}
        forward = {name: _of_model(model) / 3 for name, model in pool.models.items()}
        beside = {name: each * _places(run) for name, each in forward.items()}
        return cls(training, {name: each * tokens for name, each in forward.items()}, beside, _training(run))

    def of_way(self, way: Way) -> float:
        """The cost of a way, over that of a training of the larger model."""
        passes = self.beside if way.while_training else self.scoring
        return sum(self.training[name] + passes[name] for name in way.models) / self.large


def _training(run: str) -> float:
    return _of_model(run) * _places(run)


def _of_model(run: str) -> float:
    """FLOPs of a token in training; a third of them are those of a pass."""
    length = wholeness.read_record(run)["config"]["seq_len"]
    return flops.of_training(loading.find(run).config, length)


def _places(run: str) -> float:
    """How many places of rows a training computes, padding included."""
    config = wholeness.read_record(run)["config"]
    return config["steps"] * config["batch_size"] * config["seq_len"]


def table(results: Sequence[Result], metrics: Sequence[str]) -> tuple[list[str], list[list[str]]]:
    """The heading and the rows of a pool, as text."""
    kinds = next((list(r.dropped.by_kind) for r in results if r.dropped), [])
    header = ["", "seeds", *(column for m in metrics for column in (m, "against random"))]
    header += ["kept", "precision", "recall", *kinds, "cost"]
    rows = []
    for r in results:
        cells = [r.way.name, str(len(r.way.runs))]
        cells += [text for m in metrics for text in (means.text(r.metrics[m]), means.text(r.differences[m]))]
        shares = (r.dropped.kept_tokens, r.dropped.precision, r.dropped.recall) if r.dropped else (math.nan,) * 3
        by_kind = [r.dropped.by_kind[kind] for kind in kinds] if r.dropped else [math.nan] * len(kinds)
        cells += ["-" if math.isnan(x) else f"{x:.2f}" for x in (*shares, *by_kind)]
        rows.append([*cells, f"{r.cost:.2f}"])
    return header, rows


def verdict(results: Sequence[Result], metric: str) -> str:
    """Which ways are better or worse than random with an interval that has nothing in common with its own."""
    base = next((r.metrics[metric] for r in results if r.way.name == BASE), None)
    if base is None or math.isnan(base.low):
        return f"{metric}: nothing can be said against random with one seed, or without it."
    lower_is_better = not metric.endswith(("exact_match", "accuracy"))
    groups: dict[str, list[str]] = {"better": [], "worse": [], "not told apart": []}
    for r in results:
        cell = r.metrics[metric]
        if r.way.name == BASE:
            continue
        below, above = cell.high < base.low, cell.low > base.high
        kind = "not told apart" if not (below or above) else "better" if below == lower_is_better else "worse"
        groups[kind].append(r.way.name)
    said = "; ".join(f"{kind}: {', '.join(names) or 'none'}" for kind, names in groups.items())
    return f"{metric} against random, by disjoint intervals: {said}."


def seed_rows(results: Sequence[Result], metrics: Sequence[str]) -> list[list[str]]:
    """A row of text for each run: its last values."""
    return [
        [r.pool, r.way.name, str(place), *(f"{value:.4g}" for value in values)]
        for r in results
        for place, values in enumerate(zip(*(r.seeds[m] for m in metrics), strict=True), start=1)
    ]


def _write_page(out: Path, results: Mapping[str, Sequence[Result]], metrics: Sequence[str]) -> None:
    """Writes the plots and report.html."""
    plots = pages.load_plots()
    body = ["<h1>Data selection</h1>", f"<p>{pages.escape(METHOD)}</p>"]
    for name, own in results.items():
        pictures = ""
        for metric in metrics:
            points = {r.way.name: (1 + r.cost, *r.metrics[metric]) for r in own}
            title = "FLOPs, selection included, over those of a training"
            draw = functools.partial(plots.plot_costs, metric, title, points)
            pictures += pages.plot(out, f"{name}_{metric.replace('/', '_')}", draw, f"{metric} of {name}")
            cells, seeds = {r.way.name: r.metrics[metric] for r in own}, {r.way.name: r.seeds[metric] for r in own}
            draw = functools.partial(plots.plot_methods, f"{metric} of {name}", cells, seeds, {})
            pictures += pages.plot(out, f"{name}_{metric.replace('/', '_')}_ways", draw, f"{metric} of each way")
        verdicts = [f"<p>{pages.escape(verdict(own, metric))}</p>" for metric in metrics]
        body += [f"<h2>{pages.escape(name)}</h2>", pages.table(*table(own, metrics), "numbers"), *verdicts]
        body.append(f'<div class="plots">{pictures}</div>')
    body.append(paper.section(paper.settings(out), folded=True))
    (out / "report.html").write_text(pages.page("Data selection", body), encoding="utf-8")


def _cells(r: Result, metrics: Sequence[str]) -> Iterator[float]:
    missing = Mean(math.nan, math.nan, math.nan)
    for m in metrics:
        yield from r.metrics[m]
        yield from r.differences[m] or missing


def _as_csv(results: Sequence[Result], metrics: Sequence[str]) -> list[list[Any]]:
    parts = ("", " low", " high")
    measured = [f"{prefix}{m}{part}" for m in metrics for prefix in ("", "difference of ") for part in parts]
    shares = ("kept tokens", "precision", "recall", *KINDS)
    lines: list[list[Any]] = [["pool", "name", "seeds", *measured, *shares, "cost", "tokens"]]
    for r in results:
        said = [math.nan] * len(shares)
        if r.dropped:
            said = [*r.dropped[:3], *(r.dropped.by_kind.get(kind, math.nan) for kind in KINDS)]
        numbers = [*_cells(r, metrics), *said, r.cost, r.tokens]
        lines.append([r.pool, r.way.name, len(r.way.runs), *("" if math.isnan(x) else x for x in numbers)])
    return lines


def _as_json(r: Result) -> dict[str, Any]:
    """A row of table.json; nan, which JSON lacks, becomes None."""
    row = {
        "pool": r.pool,
        "name": r.way.name,
        "runs": list(r.way.runs),
        "metrics": {m: cell._asdict() for m, cell in r.metrics.items()},
        "values of seeds": {m: list(values) for m, values in r.seeds.items()},
        "differences": {m: cell and cell._asdict() for m, cell in r.differences.items()},
        "dropped": r.dropped and r.dropped._asdict(),
        "cost": r.cost,
        "tokens": r.tokens,
    }
    return json.loads(json.dumps(row), parse_constant=lambda _: None)
