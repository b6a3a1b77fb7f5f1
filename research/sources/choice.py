"""A choice among scored records: what was asked for, and what comes of it."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from research.errors import InputError, did_you_mean
from research.sources import scores, selectors

FILE = "file"
_MOST_STRATA = 1000


@dataclasses.dataclass(frozen=True)
class Request:
    """What to choose. Names are those of the flags of `understudy select`.

    Attributes:
      scores: a file of scores.
      by: the scores to choose by; none for random.
      keep: of selectors.SELECTORS.
      amount, unit: see selectors.Budget.
      min, max: bounds of the score; None for none.
      drop: scores that are true of what isn't kept.
      stratify: "file" or a score; None for one stratum.
      weights: stratum -> its part; None for what each holds.
      center, temperature, seed: see selectors.Pool.
      ordered: the order is that of training.
    """

    scores: str
    keep: str
    by: Sequence[str] | None = None
    amount: float = 1.0
    unit: str = "tokens"
    min: float | None = None
    max: float | None = None
    drop: Sequence[str] = ()
    stratify: str | None = None
    weights: Mapping[str, float] | None = None
    center: float = 0.5
    temperature: float = 1.0
    seed: int = 0
    ordered: bool = False

    def about(self) -> dict[str, Any]:
        """What a selection says of how it was made: the fields that aren't at their defaults."""
        values = dataclasses.asdict(self)
        return {
            field.name: values[field.name]
            for field in dataclasses.fields(self)
            if field.default is dataclasses.MISSING or values[field.name] != field.default
        } | {"ordered": self.ordered}


@dataclasses.dataclass(frozen=True, eq=False)
class Choice:
    """What comes of a request.

    Attributes:
      request: it.
      table: the scores, N records.
      values: [N] float64, the score; of kcenter the first coordinate. None for random without bounds.
      eligible: [N] bool, which could be kept.
      strata: names of the strata.
      stratum: [N] int64.
      keep: [N] bool.
      rank: [N] int64, see selectors.select.
      short: the share of the room that nothing was found for.
    """

    request: Request
    table: scores.Table
    values: np.ndarray | None
    eligible: np.ndarray
    strata: Sequence[str]
    stratum: np.ndarray
    keep: np.ndarray
    rank: np.ndarray
    short: float


def choose(request: Request) -> Choice:
    """Chooses records.

    Raises:
      InputError: the scores can't be read, a name is unknown, or nothing of a stratum may be kept.
    """
    table = scores.read(request.scores)
    points = [table.column(name, "--by") for name in request.by or ()]
    values = points[0] if points else None
    eligible = _eligible(request, table, points)
    if not eligible.any():
        raise InputError(
            f"--scores = {request.scores}: no record may be kept. Loosen --min, --max or --drop, or choose by another "
            "score."
        )
    strata, stratum = _strata(request, table)
    weights = _weights(request, strata)
    where = np.stack(points, axis=1) if request.keep == "kcenter" else values
    pool = selectors.Pool(
        np.zeros(len(table)) if where is None else where,
        table.tokens,
        eligible,
        request.center,
        request.temperature,
        (request.seed,),
    )
    for i, name in enumerate(strata):
        if not eligible[stratum == i].any():
            raise InputError(
                f"--stratify = {request.stratify}: of {name} no record may be kept. Loosen --min, --max or --drop, or "
                "leave it out of the scores."
            )
    budget = selectors.Budget(request.amount, request.unit)
    keep, rank = selectors.select(pool, request.keep, budget, stratum, weights)
    return Choice(
        request, table, values, eligible, strata, stratum, keep, rank, selectors.shortfall(pool, budget, keep)
    )


def _eligible(request: Request, table: scores.Table, points: Sequence[np.ndarray]) -> np.ndarray:
    eligible = np.ones(len(table), bool)
    for values in points:
        eligible &= np.isfinite(values)
    if request.min is not None:
        eligible &= points[0] >= request.min
    if request.max is not None:
        eligible &= points[0] <= request.max
    for name in request.drop:
        eligible &= ~(table.column(name, "--drop") > 0)
    return eligible


def _strata(request: Request, table: scores.Table) -> tuple[Sequence[str], np.ndarray]:
    """The names of the strata, and the number of each record's [N]."""
    if request.stratify is None:
        return ("all",), np.zeros(len(table), np.int64)
    if request.stratify == FILE:
        return table.files, table.file.astype(np.int64)
    values = table.column(request.stratify, "--stratify")
    distinct, stratum = np.unique(values, return_inverse=True)
    if len(distinct) > _MOST_STRATA:
        raise InputError(
            f"--stratify = {request.stratify}: has {len(distinct):,} values, and strata are at most {_MOST_STRATA:,}. "
            "Name a score of few values, such as a label."
        )
    return tuple(f"{value:.15g}" for value in distinct), stratum.reshape(-1)


def _weights(request: Request, strata: Sequence[str]) -> list[float] | None:
    weights = request.weights
    if weights is None:
        return None
    for name, weight in weights.items():
        if name not in strata:
            raise InputError(f"--weights: there is no stratum {name!r}.{did_you_mean(name, strata)}")
        if isinstance(weight, bool) or not isinstance(weight, int | float) or not 0 < weight < np.inf:
            raise InputError(f"--weights: {name} = {weight!r}: must be a number above 0.")
    if lacking := [name for name in strata if name not in weights]:
        raise InputError(f"--weights: the stratum {lacking[0]!r} has none. Give one to each.")
    return [float(weights[name]) for name in strata]
