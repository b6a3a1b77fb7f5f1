"""What a diagnosis is made of: evidence, causes that predict it, and findings."""

import dataclasses
import math
import operator
from collections.abc import Mapping
from typing import Literal

STAGES = ("pretrain", "sft", "classify", "distill", "preference", "reward", "rl")

Relation = Literal["<", ">", "<=", ">=", "==", "!=", "between", "present", "absent"]
Level = Literal["observed", "suspected", "confirmed"]
Verdict = Literal["healthy", "cause found", "can't tell"]

_COMPARISONS = {
    "<": operator.lt,
    ">": operator.gt,
    "<=": operator.le,
    ">=": operator.ge,
    "==": operator.eq,
    "!=": operator.ne,
}


@dataclasses.dataclass(frozen=True)
class Evidence:
    """What was measured of a run.

    Attributes:
      stage: what kind of training it is, one of STAGES.
      started: whether it has taken a step.
      signals: name -> number; one that couldn't be measured isn't there. docs/diagnosis.md lists the names.
      rows: name -> rows of data that show the signal, decoded and short.
    """

    stage: str
    started: bool
    signals: Mapping[str, float]
    rows: Mapping[str, tuple[str, ...]] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Relative:
    """A threshold that is another signal's value, times a factor, plus a number."""

    signal: str
    factor: float = 1.0
    plus: float = 0.0


Threshold = float | Relative


@dataclasses.dataclass(frozen=True)
class Prediction:
    """What a cause says of one signal.

    Attributes:
      signal: its name.
      relation: how it compares with the threshold; "between" is with both ends inside; "present" and "absent" say
        whether it was measured, and have no threshold.
      threshold: a number, or another signal times a factor; of "between" two of them. A NaN or an infinity fulfils no
        comparison but > with an infinity, and "!=".
    """

    signal: str
    relation: Relation
    threshold: Threshold | tuple[Threshold, Threshold] = 0.0

    def holds(self, evidence: Evidence) -> bool | None:
        """Whether it is so; None where the signal, or the one that it is compared with, wasn't measured."""
        value = evidence.signals.get(self.signal)
        if self.relation in ("present", "absent"):
            return (value is not None) == (self.relation == "present")
        limits = [_value(limit, evidence) for limit in self._limits]
        if value is None or None in limits:
            return None
        if self.relation == "between":
            return limits[0] <= value <= limits[1]
        return bool(_COMPARISONS[self.relation](value, limits[0]))

    def text(self, evidence: Evidence) -> str:
        """The signal's value and what it is compared with, as "update_ratio 0 (< 1e-09)"."""
        value = evidence.signals.get(self.signal)
        shown = "not measured" if value is None else number(value)
        if self.relation in ("present", "absent"):
            return f"{self.signal} {shown}"
        limits = " and ".join(_limit_text(limit, evidence) for limit in self._limits)
        return f"{self.signal} {shown} ({self.relation} {limits})"

    @property
    def _limits(self) -> tuple[Threshold, ...]:
        return self.threshold if isinstance(self.threshold, tuple) else (self.threshold,)


@dataclasses.dataclass(frozen=True)
class Cause:
    """Why a run may not learn.

    Attributes:
      name: of the cause, as "lr_too_high".
      group: the part of a run that it lies in, as "optimizer".
      stages: the stages that it applies to.
      predicts: what must be so; the cause is found where all of it holds.
      supports: what may be so, and raises the rank.
      sureness: from 0 to 1, how likely it is where all of `predicts` holds.
      remedy: a command, or a line of the config.
      why: one sentence.
      source: where it is described, or what it was measured on.
      observed: whether the signals are the fault itself (an empty mask), and not symptoms of it.
      explains: causes that follow from this one and rank below it.
      counterfactual: the name of the change in confirm.CHANGES that shows it, or confirm.TWIN; "" where there is none.
      alike: the class of causes that no signal tells from this one; "" where it is alone.
    """

    name: str
    group: str
    stages: tuple[str, ...]
    predicts: tuple[Prediction, ...]
    sureness: float
    remedy: str
    why: str
    source: str
    supports: tuple[Prediction, ...] = ()
    observed: bool = False
    explains: tuple[str, ...] = ()
    counterfactual: str = ""
    alike: str = ""


@dataclasses.dataclass(frozen=True)
class Finding:
    """A cause that was found.

    Attributes:
      cause: the cause.
      level: "observed": the signal is the fault; "suspected": inferred from symptoms; "confirmed": by a counterfactual.
      score: what it was ranked by, the highest first.
      numbers: what was predicted and measured, a line each.
      rows: rows of data that show it.
      confirmation: what the counterfactual gave; "" without one.
    """

    cause: Cause
    level: Level
    score: float
    numbers: tuple[str, ...]
    rows: tuple[str, ...] = ()
    confirmation: str = ""


@dataclasses.dataclass(frozen=True)
class Diagnosis:
    """The answer.

    Attributes:
      verdict: "healthy", "cause found", or "can't tell" where too little was measured.
      findings: the causes that were found, the likeliest first.
      evidence: what they were found by.
      reason: why nothing can be told, or what "healthy" rests on; one sentence.
    """

    verdict: Verdict
    findings: tuple[Finding, ...]
    evidence: Evidence
    reason: str = ""


def number(value: float) -> str:
    """A number as reports show it: four digits, and whole numbers whole."""
    if math.isfinite(value) and value == int(value) and abs(value) < 1e6:
        return f"{int(value)}"
    return f"{value:.4g}"


def _value(limit: Threshold, evidence: Evidence) -> float | None:
    if not isinstance(limit, Relative):
        return limit
    value = evidence.signals.get(limit.signal)
    return None if value is None else value * limit.factor + limit.plus


def _limit_text(limit: Threshold, evidence: Evidence) -> str:
    if not isinstance(limit, Relative):
        return number(limit)
    value, parts = _value(limit, evidence), limit.signal
    if limit.factor != 1:
        parts = f"{number(limit.factor)} x {parts}"
    if limit.plus:
        parts += f" + {number(limit.plus)}"
    return parts if value is None else f"{parts} = {number(value)}"
