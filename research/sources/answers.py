"""What is said of the documents of a store that answer prompts: which are compared, and how good they are.

A unit is what one row must hold whole: the answers of a comparison, or any other document alone.
"""

from collections.abc import Sequence

import numpy as np

from research.errors import InputError
from research.sources.comparisons import Comparison

# Of each document: the number of its unit, whose documents are neighbours; its rank there, -1 where nothing is
# compared; margin, score and preference (of the pair, how probably the chosen answer is the better one), NaN where
# nobody says them; and the verdict, -1 where there is none. In rows, a document may be a prompt of `head` tokens, and
# then what lies at the address `tail`: the answer to another prompt. Else `tail` is -1.
_SAID = (
    *(("unit", "<i8"), ("side", "<i4"), ("margin", "<f4"), ("score", "<f4"), ("preference", "<f4")),
    ("desirable", "<i4"),
)
DTYPE = np.dtype([*_SAID, ("head", "<i8"), ("tail", "<i8")])


def nothing(count: int) -> np.ndarray:
    """[count] DTYPE: of documents of which nothing is said, each a unit of its own."""
    values = np.zeros(count, DTYPE)
    values["unit"] = np.arange(count)
    values["side"] = values["desirable"] = values["tail"] = -1
    values["margin"] = values["score"] = values["preference"] = np.nan
    return values


def of_comparison(comparison: Comparison) -> np.ndarray:
    """[K] DTYPE: of a comparison's answers, as unit 0."""
    values = nothing(len(comparison.answers))
    values["unit"] = 0
    if len(values) > 1:
        values["side"] = np.arange(len(values))
    values["score"] = comparison.scores
    values["margin"] = comparison.margin
    values["preference"] = comparison.probability
    if comparison.desirable is not None:
        values["desirable"] = comparison.desirable
    return values


def numbered(answers: Sequence[np.ndarray]) -> np.ndarray:
    """Joins what `of_comparison` gives of several; units are numbered in order."""
    joined = np.concatenate(answers)
    joined["unit"] = np.repeat(np.arange(len(answers)), [len(each) for each in answers])
    return joined


def field_names(answers: np.ndarray) -> tuple[str, ...]:
    """The batch fields that say what is said of documents."""
    names: tuple[str, ...] = ("pair", "side") if np.any(answers["side"] >= 0) else ()
    for name in ("margin", "score", "preference"):
        names += () if np.all(np.isnan(answers[name])) else (name,)
    return names + (("desirable",) if np.any(answers["desirable"] >= 0) else ())


def field_values(answers: np.ndarray, row: np.ndarray) -> dict[str, np.ndarray]:
    """Batch fields of documents that lie in rows: name -> [S].

    Args:
      answers: [S] DTYPE, in the order of the rows.
      row: [S] int64, the row of each, in rising order.
    """
    compared = answers["side"] >= 0
    number = np.cumsum(answers["side"] == 0)
    before = np.concatenate([[0], number])[np.searchsorted(row, row)]  # of the rows in front
    return {
        "pair": np.where(compared, number - before, 0),
        "side": answers["side"],
        "margin": np.nan_to_num(answers["margin"]),
        "score": answers["score"],
        "preference": np.nan_to_num(answers["preference"], nan=1.0),
        "desirable": answers["desirable"],
    }


def addresses(answers: np.ndarray, start: np.ndarray, position: np.ndarray) -> np.ndarray:
    """[N] int64: where each token lies.

    Args:
      answers: [N] DTYPE, of its document.
      start: [N] int64, where that begins.
      position: [N] int64, in its document.
    """
    elsewhere = (answers["tail"] >= 0) & (position >= answers["head"])
    return np.where(elsewhere, answers["tail"] - answers["head"], start) + position


def partners(key: np.ndarray) -> np.ndarray:
    """[S] int64: for each document one of another prompt, as good as drawn by chance, and the same in any order.

    Args:
      key: [S] uint64, equal for equal prompts.

    Raises:
      InputError: all have one prompt.
    """
    order = np.argsort(key, kind="stable")
    first = np.flatnonzero(np.diff(key[order], prepend=~key[order[:1]]))
    if len(first) == 1:
        raise InputError(
            "data: all answers are to one prompt, and the objective wants answers to others too. Give more data."
        )
    count = np.diff(first, append=len(key))
    nth = np.arange(len(key)) - np.repeat(first, count)
    following = np.roll(np.arange(len(first)), -1)
    result = np.empty(len(key), np.int64)
    result[order] = order[np.repeat(first[following], count) + nth % np.repeat(count[following], count)]
    return result


def starts(units: np.ndarray) -> np.ndarray:
    """[U] int64: where each unit begins among documents [S], of which those of one are neighbours."""
    return np.flatnonzero(np.diff(units, prepend=-1))


def whole(fits: np.ndarray, units: np.ndarray) -> np.ndarray:
    """[S] bool: which documents are of units of which all fit."""
    if not len(units):
        return fits
    first = starts(units)
    return np.repeat(np.minimum.reduceat(fits, first), np.diff(first, append=len(units)))


def fitted(length: np.ndarray, units: np.ndarray, room: int, virtual: int) -> np.ndarray:
    """[S] int64: the lengths of documents, cut as far as their units are to fit into a row: the longest first.

    Args:
      length: [S] int64.
      units: [S] int64, of which each document is; those of one are neighbours.
      room: T.
      virtual: tokens that stand in front of each document.
    """
    if not len(length):
        return length
    first = starts(units)
    count = np.diff(first, append=len(units))
    left = room - virtual * count
    fits = np.add.reduceat(length, first) <= left
    length = length.copy()
    for i in np.flatnonzero(~fits):
        unit = slice(first[i], first[i] + count[i])
        length[unit] = _levelled(length[unit], left[i])
    return length


def _levelled(length: np.ndarray, room: int) -> np.ndarray:
    """[K]: lengths cut to one greatest length, so that their sum fits."""
    order = np.argsort(length, kind="stable")
    result = np.zeros_like(length)
    for left, i in zip(range(len(length), 0, -1), order, strict=True):
        result[i] = min(length[i], max(room, 0) // left)
        room -= result[i]
    return result
