"""Performance gap recovered: how much of the way from weak supervisor to strong ceiling a student has come.

PGR = (student - weak) / (ceiling - weak), in accuracy on the same test examples (Burns et al., arXiv:2312.09390,
section 3.1). Several seeds of one pair of sizes and one loss make a group. A group's PGR is the ratio of means over
seeds and examples, not the mean of the seeds' ratios: one seed with a gap near 0 would decide that.
"""

import dataclasses
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from research.errors import InputError

DRAWS, LEVEL = 2000, 0.95
PREDICTIONS = ("weak", "student", "ceiling")
_NEEDED = ("weak_size", "strong_size", "loss", "seed", *PREDICTIONS, "weak_params", "strong_params")
_CHUNK = 2**22  # indices drawn at once


class Estimate(NamedTuple):
    """A value and its 95 % interval; nan where it isn't defined."""

    value: float
    low: float
    high: float


class Predictions(NamedTuple):
    """A model's answers to the test examples.

    Attributes:
      path: of the file.
      gold: [N] int64, the true class.
      answers: [N] int64, the most probable class.
      confidence: [N] float64, the probability of the answer.
    """

    path: str
    gold: np.ndarray
    answers: np.ndarray
    confidence: np.ndarray

    @property
    def right(self) -> np.ndarray:
        """[N] bool."""
        return self.answers == self.gold


class Calibration(NamedTuple):
    """Whether a supervisor knows when it is right (Guo et al., arXiv:1706.04599, section 2), over all of its seeds.

    Attributes:
      name: of the supervisor.
      seeds: how many.
      accuracy, confidence: means over seeds and examples.
      errors: of each seed the expected calibration error: the mean over examples of |right - confidence| of their bin.
      bins: [K, 3], of each bin of all seeds the mean confidence, the share that is right, and the count.
    """

    name: str
    seeds: int
    accuracy: float
    confidence: float
    errors: tuple[float, ...]
    bins: np.ndarray


class Missing(NamedTuple):
    """A cell that is left out, and why."""

    cell: Mapping[str, Any]
    reason: str


@dataclasses.dataclass(frozen=True)
class Group:
    """What the seeds of one pair of sizes and one loss show.

    Attributes:
      weak_size, strong_size, loss: of its cells.
      weak_params, strong_params: numbers of parameters.
      seeds: of its cells.
      examples: N, of the test set.
      estimates: name -> Estimate. weak, student, ceiling: accuracies. gap: ceiling - weak. pgr, and pgr_clipped to
        [0, 1]: nan where `excluded`. agreement: how often the student says what its supervisor says; agreement_right
        and agreement_wrong: among the examples where the supervisor is right, and wrong.
      excluded: why there is no PGR; "" where there is.
      points: weak, student, ceiling and pgr -> value of each seed; the pgr of a seed without a gap is nan.
      base: the loss that `difference` is from: the first of the pair of sizes; "" for that one itself.
      difference: of the student's accuracy from that of the base's, on the same examples and seeds; None where their
        seeds differ.
    """

    weak_size: str
    strong_size: str
    loss: str
    weak_params: float
    strong_params: float
    seeds: tuple[int, ...]
    examples: int
    estimates: Mapping[str, Estimate]
    excluded: str
    points: Mapping[str, tuple[float, ...]] = dataclasses.field(default_factory=dict)
    base: str = ""
    difference: Estimate | None = None


def read_predictions(path: str) -> Predictions:
    """Reads {"gold": class, "probs": [C floats]} lines; the answer is the first of the most probable classes.

    {"rewards": [of chosen, of rejected]} of a pair is read too: its true class is 0, that the chosen answer is the
    better one, which is also the answer where its reward is the higher one; of equal rewards it is 1.

    Raises:
      InputError: a line has no such fields, or holds no probabilities.
    """
    gold, answers, confidence = [], [], []
    with open(path, "rb") as lines:
        for number, line in enumerate(lines, start=1):
            try:
                record = json.loads(line)
                of_pair = "rewards" in record
                values = np.asarray(record["rewards" if of_pair else "probs"], np.float64)
                gold.append(0 if of_pair else int(record["gold"]))
            except (ArithmeticError, ValueError, KeyError, TypeError, RecursionError) as error:
                raise InputError(
                    f'{path}:{number}: no {{"gold": class, "probs": [...]}} ({type(error).__name__}: {error}). Label '
                    "records that have their true class with understudy label, or pairs with understudy score --reward."
                ) from None
            if of_pair and values.shape != (2,):
                raise InputError(f"{path}:{number}: rewards = {record['rewards']}: a pair has two. Score pairs.")
            if values.ndim != 1 or not np.isfinite(values).all() or not 0 <= gold[-1] < len(values):
                raise InputError(
                    f"{path}:{number}: gold = {gold[-1]}, probs = {values.tolist()}: probs must be finite numbers, and "
                    "gold the number of one of them. Label the records again."
                )
            answers.append(int(values[0] <= values[1]) if of_pair else int(values.argmax()))
            confidence.append(1 / (1 + math.exp(-min(abs(values[0] - values[1]), 700.0))) if of_pair else values.max())
    if not gold:
        raise InputError(f"{path}: is empty. Label the test records again.")
    return Predictions(path, np.array(gold), np.array(answers), np.array(confidence, np.float64))


def measure(
    cells: Sequence[Mapping[str, Any]], *, draws: int = DRAWS, seed: int = 0
) -> tuple[list[Group], list[Missing]]:
    """Reads the predictions of cells, and groups them over seeds.

    Args:
      cells: {"weak_size", "strong_size", "loss", "seed", "weak", "student", "ceiling", "weak_params",
        "strong_params"} each; weak, student and ceiling are paths that `read_predictions` takes.
      draws, seed: of the bootstrap.

    Returns:
      the groups in the order of their first cells, and the cells that a file is missing of.

    Raises:
      InputError: a cell lacks a key or comes twice, a file can't be read, or two files of a group aren't about the
        same examples.
    """
    _check_cells(cells)
    predictions: dict[str, Predictions] = {}
    groups: dict[tuple, list[tuple[Mapping[str, Any], list[Predictions]]]] = {}
    missing = []
    for cell in cells:
        absent = [key for key in PREDICTIONS if not Path(cell[key]).is_file()]
        if absent:
            missing.append(Missing(cell, "; ".join(f"{key}: there is no {cell[key]}" for key in absent)))
            continue
        for key in PREDICTIONS:
            if cell[key] not in predictions:
                predictions[cell[key]] = read_predictions(cell[key])
        groups.setdefault(_key(cell), []).append((cell, [predictions[cell[key]] for key in PREDICTIONS]))
    measured = []
    for key, members in groups.items():
        base = next(other for other in groups if other[:2] == key[:2])
        group = _group(members, draws, seed)
        if base != key:
            difference = _difference(members, groups[base], draws, seed)
            group = dataclasses.replace(group, base=str(base[2]), difference=difference)
        measured.append(group)
    return measured, missing


def calibrations(cells: Sequence[Mapping[str, Any]], bins: int = 10) -> list[Calibration]:
    """How well each supervisor of a study knows when it is right.

    Args:
      cells: see `measure`; those without a file of the weak model are left out.
      bins: of equal width between 0 and 1.
    """
    files: dict[tuple, dict[str, None]] = {}
    for cell in cells:
        if Path(cell["weak"]).is_file():
            files.setdefault((cell["weak_size"], cell["loss"]), {})[cell["weak"]] = None
    named: dict[tuple[str, ...], str] = {}
    for (size, loss), paths in files.items():
        another = any(name.split(" of ")[0] == str(size) for name in named.values())
        named.setdefault(tuple(paths), f"{size} of {loss}" if another else str(size))
    return [_calibration(name, [read_predictions(path) for path in paths], bins) for paths, name in named.items()]


def _calibration(name: str, seeds: Sequence[Predictions], count: int) -> Calibration:
    pooled = [np.concatenate([getattr(each, field) for each in seeds]) for field in ("confidence", "right")]
    parts = [_bins(each.confidence, each.right, count) for each in seeds]
    errors = tuple(float(np.sum(np.abs(p[:, 0] - p[:, 1]) * p[:, 2]) / p[:, 2].sum()) for p in parts)
    return Calibration(
        name, len(seeds), float(pooled[1].mean()), float(pooled[0].mean()), errors, _bins(*pooled, count)
    )


def _bins(confidence: np.ndarray, right: np.ndarray, count: int) -> np.ndarray:
    """[K, 3], see Calibration; bins without examples are left out."""
    place = np.clip((confidence * count).astype(int), 0, count - 1)
    return np.array(
        [
            (confidence[place == i].mean(), right[place == i].mean(), float(np.sum(place == i)))
            for i in range(count)
            if np.any(place == i)
        ]
    )


def _difference(
    members: Sequence[tuple[Mapping[str, Any], list[Predictions]]],
    base: Sequence[tuple[Mapping[str, Any], list[Predictions]]],
    draws: int,
    seed: int,
) -> Estimate | None:
    """Of the accuracy of a group's student from that of another's: seeds and examples are drawn once for both."""
    own, others = ({cell["seed"]: each[1].right for cell, each in group} for group in (members, base))
    if own.keys() != others.keys() or len({len(right) for right in (*own.values(), *others.values())}) > 1:
        return None
    parts = np.array([[own[s] for s in own], [others[s] for s in own]], np.float32)
    resampled = resample(parts, draws=draws, seed=seed)
    low, high = np.quantile(resampled[:, 0] - resampled[:, 1], [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    value = parts.mean(axis=(1, 2), dtype=np.float64)
    return Estimate(float(value[0] - value[1]), float(low), float(high))


def _key(cell: Mapping[str, Any]) -> tuple:
    """What the cells of a group have in common."""
    return tuple(cell[key] for key in ("weak_size", "strong_size", "loss"))


def _check_cells(cells: Sequence[Mapping[str, Any]]) -> None:
    seen = set()
    for cell in cells:
        if lacking := [key for key in _NEEDED if key not in cell]:
            raise InputError(
                f"cell {dict(cell)}: lacks {', '.join(lacking)}. Add what is needed: {', '.join(_NEEDED)}."
            )
        if (*_key(cell), cell["seed"]) in seen:
            raise InputError(f"cells: {_key(cell)} with seed {cell['seed']} comes twice. Leave one of them out.")
        seen.add((*_key(cell), cell["seed"]))


def _group(members: Sequence[tuple[Mapping[str, Any], list[Predictions]]], draws: int, seed: int) -> Group:
    cell, (first, *_) = members[0]
    for _, predictions in members:
        for other in predictions:
            if not np.array_equal(first.gold, other.gold):
                raise InputError(
                    f"{first.path} and {other.path} aren't about the same test records in the same order: "
                    f"{len(first.gold)} and {len(other.gold)} lines, with other true classes. Label the same file."
                )
    answers = np.array([[p.answers for p in predictions] for _, predictions in members])  # [S, 3, N]
    estimates = estimate(answers[:, 0], answers[:, 1], answers[:, 2], first.gold, draws=draws, seed=seed)
    gap, excluded = estimates["gap"], ""
    if gap.value <= 0:
        excluded = f"ceiling {estimates['ceiling'].value:.4f} <= weak {estimates['weak'].value:.4f}"
    elif gap.low <= 0:
        excluded = f"the interval of ceiling - weak, [{gap.low:.4f}, {gap.high:.4f}], includes 0"
    if excluded:
        estimates |= dict.fromkeys(("pgr", "pgr_clipped"), Estimate(math.nan, math.nan, math.nan))
    return Group(
        **{key: cell[key] for key in ("weak_size", "strong_size", "loss", "weak_params", "strong_params")},
        seeds=tuple(each["seed"] for each, _ in members),
        examples=len(first.gold),
        estimates=estimates,
        excluded=excluded,
        points=_points(answers == first.gold),
    )


def _points(right: np.ndarray) -> dict[str, tuple[float, ...]]:
    """The values of each seed; right: [S, 3, N] bool, of weak, student and ceiling."""
    shares = right.mean(axis=2)
    gaps = shares[:, 2] - shares[:, 0]
    pgr = np.divide(shares[:, 1] - shares[:, 0], gaps, out=np.full(len(gaps), math.nan), where=gaps > 0)
    return {name: tuple(x.tolist()) for name, x in zip((*PREDICTIONS, "pgr"), (*shares.T, pgr), strict=True)}


def estimate(
    weak: np.ndarray, student: np.ndarray, ceiling: np.ndarray, gold: np.ndarray, *, draws: int = DRAWS, seed: int = 0
) -> dict[str, Estimate]:
    """Returns the estimates of a group; see Group.

    Args:
      weak, student, ceiling: [S, N] int, the answers of each in each seed.
      gold: [N] int, the true class.
      draws, seed: of the bootstrap, see `resample`.
    """
    right = {"weak": weak == gold, "student": student == gold, "ceiling": ceiling == gold}
    agree = student == weak
    parts = np.stack([*right.values(), agree, agree & right["weak"], agree & ~right["weak"]]).astype(np.float32)
    values = _derive(parts.mean(axis=(1, 2), dtype=np.float64))
    resampled = _derive(resample(parts, draws=draws, seed=seed))
    tail = (1 - LEVEL) / 2
    estimates = {}
    for name, value in values.items():
        numbers = resampled[name][~np.isnan(resampled[name])]
        with np.errstate(invalid="ignore"):  # between two infinite draws
            low, high = np.quantile(numbers, [tail, 1 - tail]) if len(numbers) else (math.nan, math.nan)
        estimates[name] = Estimate(float(value), float(low), float(high))
    return estimates


def resample(parts: np.ndarray, *, draws: int = DRAWS, seed: int = 0) -> np.ndarray:
    """Means of `parts` under a hierarchical bootstrap: seeds and examples are drawn with replacement, independently.

    All seeds are measured on the same examples, so one draw of examples serves them all, and all quantities: weak,
    student and ceiling stay paired. With one seed, what varies is the examples alone.

    Args:
      parts: [Q, S, N] float32: quantity, seed, example.
      draws: R.
      seed: of the draws, which depend on it, S and N alone.

    Returns:
      [R, Q] float64.
    """
    quantities, seeds, examples = parts.shape
    of_seeds, of_examples = (np.random.default_rng([seed, i]) for i in range(2))
    samples = of_seeds.integers(seeds, size=(draws, seeds))
    times = np.stack([(samples == s).sum(axis=1) for s in range(seeds)], axis=1)  # [R, S]
    flat = parts.reshape(quantities * seeds, examples).T
    sums = np.empty((draws, quantities))
    step = max(1, _CHUNK // examples)
    for start in range(0, draws, step):
        rows = min(step, draws - start)
        index = of_examples.integers(examples, size=(rows, examples)) + np.arange(rows)[:, None] * examples
        counts = np.bincount(index.reshape(-1), minlength=rows * examples).reshape(rows, examples)
        each = (counts.astype(np.float32) @ flat).astype(np.float64)  # whole numbers below 2**24, so exact
        each = each.reshape(rows, quantities, seeds)
        sums[start : start + rows] = np.einsum("rqs,rs->rq", each, times[start : start + rows])
    return sums / (seeds * examples)


def _derive(means: np.ndarray) -> dict[str, np.ndarray]:
    """Estimates from the means [..., Q] of `estimate`'s parts.

    Where a draw has no gap the ratio isn't defined; it is taken as infinite, with the sign of student - weak, so that a
    doubtful gap makes the interval wider and not narrower.
    """
    weak, student, ceiling, agree, agree_right, agree_wrong = np.moveaxis(means, -1, 0)
    gap, gain = ceiling - weak, student - weak
    with np.errstate(divide="ignore", invalid="ignore"):
        pgr = np.where(gap > 0, gain / gap, np.where(gain == 0, 0.0, np.copysign(np.inf, gain)))
        return {
            "weak": weak,
            "student": student,
            "ceiling": ceiling,
            "gap": gap,
            "pgr": pgr,
            "pgr_clipped": np.clip(pgr, 0, 1),
            "agreement": agree,
            "agreement_right": agree_right / weak,
            "agreement_wrong": agree_wrong / (1 - weak),
        }
