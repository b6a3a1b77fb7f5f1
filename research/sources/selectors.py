"""Which records to keep, by their scores: orders of preference, and how many of each order a budget takes.

Everything here is of arrays: N records in the data's order, S strata. A selector gives an order; a budget takes the
longest beginning of it that it can pay for. Equal scores keep the data's order, and all that is drawn by chance depends
on the seed alone.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence

import numpy as np

from research.errors import InputError


@dataclasses.dataclass(frozen=True)
class Pool:
    """What is selected from.

    Attributes:
      values: [N] float64, the score to select by; NaN where a record has none. [N, D] for k-centre.
      tokens: [N] int64, how long each record is.
      eligible: [N] bool, which of them may be kept.
      center: of `middle`: the quantile that its band lies around.
      temperature: of `gumbel`: log-weights are divided by it.
      seed: of what is drawn by chance.
      most: how many records will be taken at most, so that an order needs no more.
    """

    values: np.ndarray
    tokens: np.ndarray
    eligible: np.ndarray
    center: float = 0.5
    temperature: float = 1.0
    seed: Sequence[int] = (0,)
    most: int = 2**62

    def __getitem__(self, where: np.ndarray) -> "Pool":
        return dataclasses.replace(
            self, values=self.values[where], tokens=self.tokens[where], eligible=self.eligible[where]
        )


@dataclasses.dataclass(frozen=True)
class Budget:
    """How much to keep.

    Attributes:
      amount: up to 1 a share of all there is, above it a number.
      unit: "tokens" or "records". Equal numbers of records aren't equal tokens.
    """

    amount: float
    unit: str = "tokens"

    def sizes(self, tokens: np.ndarray) -> np.ndarray:
        """[N]: what each record takes of the budget."""
        return tokens if self.unit == "tokens" else np.ones_like(tokens)

    def total(self, tokens: np.ndarray) -> float:
        """How much may be kept of these records."""
        return self.amount * float(self.sizes(tokens).sum()) if self.amount <= 1 else self.amount


def top(pool: Pool) -> np.ndarray:
    """The highest scores first."""
    return np.argsort(-pool.values, kind="stable")


def bottom(pool: Pool) -> np.ndarray:
    """The lowest scores first."""
    return np.argsort(pool.values, kind="stable")


def middle(pool: Pool) -> np.ndarray:
    """The scores nearest to a quantile first: a band whose width the budget decides. Quantiles are of tokens, so that
    long records count as what they are."""
    order = np.argsort(pool.values, kind="stable")
    tokens = np.where(pool.eligible, pool.tokens, 0)[order]
    quantile = np.empty(len(order))
    quantile[order] = (np.cumsum(tokens) - tokens / 2) / max(tokens.sum(), 1)
    return np.argsort(np.abs(quantile - pool.center), kind="stable")


def random(pool: Pool) -> np.ndarray:
    """Any order."""
    return np.random.default_rng(pool.seed).permutation(len(pool.tokens))


def gumbel(pool: Pool) -> np.ndarray:
    """A draw without replacement, in which a record's chance is in proportion to exp(score / temperature): the largest
    of score / temperature + Gumbel noise (arXiv:1903.06059; DSIR's selection, arXiv:2302.03169, section 3)."""
    noise = np.random.default_rng(pool.seed).gumbel(size=len(pool.tokens))
    return np.argsort(-(pool.values / pool.temperature + noise), kind="stable")


def kcenter(pool: Pool) -> np.ndarray:
    """Records far from all that were taken before, one after the other: greedy k-centre (Sener and Savarese,
    arXiv:1708.00489, algorithm 1). It begins with the one nearest to the mean. Takes N distances for each one taken."""
    points = pool.values.reshape(len(pool.values), -1)
    places = np.flatnonzero(pool.eligible)
    points = points[places]
    spread = points.std(axis=0)
    points = (points - points.mean(axis=0)) / np.where(spread > 0, spread, 1)
    order, distance = [], np.full(len(points), np.inf)
    current = int(np.argmin((points**2).sum(axis=1))) if len(points) else -1
    for _ in range(min(len(points), pool.most)):
        order.append(current)
        distance = np.minimum(distance, ((points - points[current]) ** 2).sum(axis=1))
        distance[current] = -np.inf
        current = int(np.argmax(distance))
    return places[np.array(order, np.int64)]


SELECTORS: Mapping[str, Callable[[Pool], np.ndarray]] = {
    "top": top,
    "bottom": bottom,
    "middle": middle,
    "random": random,
    "gumbel": gumbel,
    "kcenter": kcenter,
}


def take(order: np.ndarray, pool: Pool, sizes: np.ndarray, budget: float) -> np.ndarray:
    """[K]: the longest beginning of an order that a budget pays for, of those that may be kept; at least one.

    Shorter records that come later don't fill up what is left: that would prefer short ones.
    """
    order = order[pool.eligible[order]]
    spent = np.cumsum(sizes[order])
    return order[: max(1, int(np.searchsorted(spent, budget * (1 + 1e-12), side="right")))]


def select(
    pool: Pool,
    selector: str,
    budget: Budget,
    strata: np.ndarray | None = None,
    weights: Sequence[float] | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """Selects records.

    Args:
      pool: to select from.
      selector: of SELECTORS.
      budget: of all records together.
      strata: [N], the number of each record's stratum; None for one. Each has a part of the budget of its own, and
        quantiles of its own.
      weights: [S], in proportion to which strata get parts of the budget; by default to what they hold.

    Returns:
      keep: [N] bool.
      rank: [N] int64, the place of each kept record in its stratum's order, from 0; -1 of others.

    Raises:
      InputError: no record of a stratum may be kept.
    """
    n = len(pool.tokens)
    strata = np.zeros(n, np.int64) if strata is None else strata
    sizes, whole = budget.sizes(pool.tokens), budget.total(pool.tokens)
    held = np.bincount(strata, sizes)
    parts = np.asarray(held if weights is None else weights, float)
    parts = whole * parts / parts.sum()
    keep, rank = np.zeros(n, bool), np.full(n, -1, np.int64)
    for stratum, part in enumerate(parts):
        own = np.flatnonzero(strata == stratum)
        if not pool.eligible[own].any():
            raise InputError(f"stratum {stratum}: no record of it may be kept.")
        most = int(np.searchsorted(np.cumsum(np.sort(sizes[own])), part, side="right")) + 1
        inner = dataclasses.replace(pool[own], seed=(*pool.seed, stratum), most=most)
        taken = own[take(SELECTORS[selector](inner), inner, sizes[own], part)]
        keep[taken], rank[taken] = True, np.arange(len(taken))
    return keep, rank


def shortfall(pool: Pool, budget: Budget, keep: np.ndarray) -> float:
    """The share of the budget that nothing was found for."""
    whole = budget.total(pool.tokens)
    return max(0.0, 1 - float(budget.sizes(pool.tokens)[keep].sum()) / whole) if whole else math.nan
