"""What the stages of a model's life gave: the same measures after each, and how the true reward left the proxy.

The true reward is the planted utility of answers, the proxy what a reward model says of them. A policy that is trained
on the proxy drifts away from the one that it began as; Gao et al. (arXiv:2210.10760) draw both rewards over the square
root of that KL, and where the proxy still rises while the truth falls, it is optimised too far.
"""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float

from research import files
from research.errors import InputError
from research.run.metrics import read_metrics
from research.studies import stages
from research.studies.answers import ANSWERS_FILE
from research.studies.means import Mean, mean

TEXT, RIGHT, TRUE, PROXY = "text/loss", "answers/exact_match", "answers/utility", "answers/reward"
KL, LENGTH, PAIRS = "answers/kl", "answers/length", "eval/utility/accuracy"
MEASURES = (TEXT, RIGHT, TRUE, PROXY, KL, LENGTH)  # after each stage that leaves a policy
ROLLOUT = {
    "kl": "train/rollout/kl",
    "proxy": "train/reward/proxy",
    "true": "train/reward/true",
}  # of a run with rewards
PRETRAIN, SFT, REWARD, POLICY, BEST_OF = "pretrain", "sft", "reward", "policy", "best_of"
POINTS = 15  # of a curve


@dataclasses.dataclass(frozen=True)
class Phase:
    """A stage of the life, one run a seed.

    Attributes:
      name: as the report calls it.
      kind: PRETRAIN, SFT, REWARD, POLICY or BEST_OF, which says what it is for.
      runs: workdirs of the training; () where nothing is trained.
      answers: folders that studies.answers wrote; () of a reward model.
    """

    name: str
    kind: str
    runs: Sequence[str]
    answers: Sequence[str]

    @property
    def seeds(self) -> int:
        return len(self.runs or self.answers)


class Scale(NamedTuple):
    """What puts a reward model's numbers into the units of the truth: over the answers of the policy that began, they
    get the mean and the deviation of their true rewards."""

    shift: float
    factor: float

    def __call__(self, proxy: Any) -> Any:
        return self.shift + self.factor * proxy


class Curve(NamedTuple):
    """Of a policy on its way, [seeds, points] each: KL from its start in nats of an answer, proxy (scaled) and true
    reward."""

    kl: Float[np.ndarray, "S P"]
    proxy: Float[np.ndarray, "S P"]
    true: Float[np.ndarray, "S P"]


class Fall(NamedTuple):
    """From where the truth was the highest to the end: how much the true reward and the proxy have changed since, over
    seeds; and the mean KL at either place."""

    true: Mean
    proxy: Mean
    kl_at_best: float
    kl_at_end: float


def read_answers(folder: str) -> list[dict[str, Any]]:
    """The answers that studies.answers wrote into a folder.

    Raises:
      InputError: there are none.
    """
    path = Path(folder) / ANSWERS_FILE
    if not path.exists():
        raise InputError(f"{folder}: holds no {ANSWERS_FILE}. Name a folder that studies.answers wrote.")
    return [answer for _, answer in files.read_json_lines(path, "Write the answers anew.")]


def scale_of(answers: Sequence[Mapping[str, float]]) -> Scale:
    """The scale by the answers of the policy that began; of rewards that are all the same, only the shift."""
    true, proxy = (np.array([line[name] for line in answers]) for name in ("utility", "reward"))
    factor = float(true.std() / proxy.std()) if proxy.std() else 1.0
    return Scale(float(true.mean() - factor * proxy.mean()), factor)


def measures(phase: Phase, scales: Sequence[Scale], start: Phase) -> dict[str, list[float]]:
    """Measure -> its value of each seed; the measures that the phase has.

    Args:
      phase: to measure.
      scales: of each seed.
      start: the phase whose policy the others begin with. Of BEST_OF, which is its policy, it has the loss of text.
    """
    if phase.kind == REWARD:
        return {PAIRS: [_last(run, PAIRS) for run in phase.runs]}
    if phase.kind == BEST_OF:
        each = [best_of_n(read_answers(folder), _samples(folder)) for folder in phase.answers]
        values = {name: [one[name] for one in each] for name in MEASURES if name != TEXT}
        values = {TEXT: [_last(folder, TEXT) for folder in start.answers], **values}
    else:
        values = {name: [_last(folder, name) for folder in phase.answers] for name in MEASURES}
    values[PROXY] = [scale(value) for scale, value in zip(scales, values[PROXY], strict=True)]
    return values


def first(run: str, metric: str) -> float:
    """What a run's first evaluation, before its first step, says of a metric."""
    return _values(run, f"eval/{metric}")[0]


def best_of_n(answers: Sequence[Mapping[str, Any]], n: int) -> dict[str, float]:
    """What the answer with the highest proxy of n is on average, from N answers to each prompt, without bias: of those
    that are i-th from below, C(i - 1, n - 1) / C(N, n) of all choices of n have it as their best (Nakano et al.,
    arXiv:2112.09332, appendix I). Its KL is at most log n - (n - 1) / n.

    Args:
      answers: those to one prompt follow each other.
      n: from 1 to N.
    """
    groups = _by_prompt(answers)
    N = len(groups[0])
    weights = np.array([math.comb(i - 1, n - 1) / math.comb(N, n) for i in range(1, N + 1)])
    names = {RIGHT: "exact_match", TRUE: "utility", PROXY: "reward", LENGTH: "length"}
    values = np.zeros(len(names))
    for group in groups:
        rows = np.array([[line[name] for name in names.values()] for line in group], np.float64)
        values += weights @ rows[np.argsort([line["reward"] for line in group], kind="stable")]
    means = dict(zip(names, (values / len(groups)).tolist(), strict=True))
    return means | {KL: math.log(n) - (n - 1) / n}


def best_of_curve(phase: Phase, scales: Sequence[Scale]) -> Curve:
    """Of the best of 1, 2, 4, ... answers, up to as many as there are."""
    rows = []
    for folder, scale in zip(phase.answers, scales, strict=True):
        answers, most = read_answers(folder), _samples(folder)
        sizes = [2**i for i in range(most.bit_length()) if 2**i < most] + [most]
        each = [best_of_n(answers, n) for n in sizes]
        rows.append([[one[KL] for one in each], [scale(one[PROXY]) for one in each], [one[TRUE] for one in each]])
    return Curve(*np.array(rows).swapaxes(0, 1))


def training_curve(phase: Phase, scales: Sequence[Scale]) -> Curve | None:
    """Of a run with rewards, by the lines of its log, in means of neighbours, at most POINTS; None of one without."""
    each = [[_values(run, metric, missing=True) for metric in ROLLOUT.values()] for run in phase.runs]
    points = min(POINTS, *(len(values) for series in each for values in series))
    if not points:
        return None
    rows = []
    for series, scale in zip(each, scales, strict=True):
        kl, proxy, true = ([part.mean() for part in np.array_split(values, points)] for values in series)
        rows.append([kl, scale(np.array(proxy)), true])
    return Curve(*np.array(rows).swapaxes(0, 1))


def fall(curve: Curve) -> Fall:
    """How far the truth has fallen since it was the highest. The place of a seed is the one where the others are best
    on average, so that it isn't chosen by the same noise that is then reported; of one seed its own."""
    seeds, points = curve.true.shape
    places = []
    for seed in range(seeds):
        others = np.delete(curve.true, seed, axis=0) if seeds > 1 else curve.true
        places.append(int(others.mean(axis=0).argmax()))
    at = np.arange(seeds), np.array(places)
    changes = [mean((values[:, points - 1] - values[at]).tolist()) for values in (curve.true, curve.proxy)]
    return Fall(*changes, float(curve.kl[at].mean()), float(curve.kl[:, -1].mean()))


def costs(phase: Phase) -> dict[str, float]:
    """Seconds of all seeds, by the clock and of CPUs, of training and of what was measured afterwards; without tries
    that were killed."""
    out = {}
    for part, folders in (("training", phase.runs), ("measuring", phase.answers)):
        spent = [files.read_json(Path(folder) / stages.COST, {}) for folder in folders]
        out |= {f"{part} {name}": math.fsum(x.get(name, 0.0) for x in spent) for name in ("seconds", "cpu_seconds")}
    return out


def _by_prompt(answers: Sequence[Mapping[str, Any]]) -> list[list[Mapping[str, Any]]]:
    """The answers to each prompt."""
    groups: list[list[Mapping[str, Any]]] = []
    for line in answers:
        if groups and groups[-1][0]["number"] == line["number"]:
            groups[-1].append(line)
        else:
            groups.append([line])
    return groups


def _samples(folder: str) -> int:
    return len(_by_prompt(read_answers(folder))[0])


def _last(folder: str, metric: str) -> float:
    return _values(folder, metric)[-1]


def _values(folder: str, metric: str, missing: bool = False) -> list[float]:
    """The values of a metric in a folder with metrics, in order.

    Raises:
      InputError: there are none, and `missing` is False.
    """
    values = [record[metric] for record in read_metrics(folder) if metric in record]
    if not values and not missing:
        raise InputError(f"{folder}: has no metric {metric}. Look at what its stage measures.")
    return values
