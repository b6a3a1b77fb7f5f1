"""Mixtures: the grammar of data.path, and the order in which rows of several parts are drawn."""

import math
import re
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any

import numpy as np

from research.errors import InputError


def parse(field: str, path: str) -> tuple[list[str], list[float] | None]:
    """Parses "0.7*a,0.3*b" into the entries and their weights, None where none has one.

    Raises:
      InputError: an entry is empty, a weight isn't positive, or some entries have a weight and others none.
    """
    paths, weights = [], []
    for entry in (entry.strip() for entry in path.split(",")):
        weighted = re.fullmatch(r"([-+]?(?:\d+\.?\d*|\.\d+)(?:[eE][-+]?\d+)?)\*(.+)", entry)
        weight = float(weighted[1]) if weighted else None
        if weighted and not 0 < weight < math.inf:
            raise InputError(f"{field}: the weight of {entry!r} must be greater than 0. Leave the entry out instead.")
        paths.append(weighted[2] if weighted else entry)
        weights.append(weight)
    if not all(paths):
        raise InputError(f"{field}: {path!r} has an empty entry. Name a file, or tasks:NAME, or another source.")
    if None in weights and any(weights):
        raise InputError(
            f"{field}: in {path!r} some entries have a weight and some have none. Weigh all or none; a path with a "
            "comma is named in data.sources."
        )
    return paths, None if None in weights else weights


FEW_ROWS = 4096


def row_order(sizes: Sequence[int], weights: Sequence[float], seed: int | None) -> Callable[[int], tuple[int, int]]:
    """The endless order in which rows are drawn from several parts: place in the run -> (part, row).

    To be called before the process has threads: while Grain is imported, imports of other threads fail.

    Args:
      sizes: rows of each part. Each comes once in an epoch of its part.
      weights: parts are drawn in proportion to them.
      seed: of the order within each part, a new one each epoch; None keeps the rows' own.
    """
    if len(sizes) == 1 and (seed is None or sizes[0] < FEW_ROWS):
        rows = np.arange(sizes[0]) if seed is None else _epochs(0, sizes[0], seed)
        return lambda place: (0, int(rows[place % len(rows)]))
    import grain  # 0.2 s that one part of few rows does without

    order = grain.MapDataset.mix([_part_order(grain, k, n, seed) for k, n in enumerate(sizes)], weights)
    return lambda place: order[place]


def _part_order(grain: ModuleType, part: int, n_rows: int, seed: int | None) -> Any:
    order = grain.MapDataset.range(n_rows)
    if seed is not None and n_rows < FEW_ROWS:
        order = grain.MapDataset.source(_epochs(part, n_rows, seed))
    elif seed is not None:
        order = order.shuffle(seed=int(np.random.SeedSequence([seed, part]).generate_state(1)[0]))
    return order.repeat().map(lambda row: (part, row))


def _epochs(part: int, n_rows: int, seed: int) -> np.ndarray:
    """Rows of many epochs, each in an order of its own. Grain's shuffle tries about 2^16 / n_rows numbers for each that
    it gives: 10 ms a row where there are two."""
    rng = np.random.default_rng([seed, part])
    return rng.permuted(np.tile(np.arange(n_rows), (2**16 // n_rows, 1)), axis=1).reshape(-1)
