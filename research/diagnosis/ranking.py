"""From evidence to a diagnosis: which causes predict what was measured, the likeliest first."""

import dataclasses
from collections.abc import Sequence

from research.diagnosis import derived
from research.diagnosis.causes import CAUSES
from research.diagnosis.types import Cause, Diagnosis, Evidence, Finding, Prediction

_OBSERVED = 0.1  # what the score of a cause that is seen itself has more than that of one that is inferred
_SUPPORT = 0.1  # what full support adds
_STEPS = 20  # a run of fewer can't be told to have learned nothing
_TREND = -1.0  # the slope of a loss that falls, in standard deviations of its noise over the run, is below this


def diagnose(evidence: Evidence, causes: Sequence[Cause] = CAUSES) -> Diagnosis:
    """Which causes are found, and what that makes of the run.

    Where none is found, a run that hasn't begun is healthy as far as was measured, and so is one whose loss falls, or
    is lower at its end, or whose reward rises. Of another one nothing can be told, nor of one of which too little was
    measured.

    Args:
      evidence: what was measured; signals of `derived` are added to it.
      causes: to look for.
    """
    evidence = dataclasses.replace(evidence, signals={**derived.derived(evidence.signals), **evidence.signals})
    findings = ranked([found for cause in causes if (found := finding(cause, evidence)) is not None])
    if findings:
        return Diagnosis("cause found", findings, evidence)
    verdict, reason = _without_findings(evidence, causes)
    return Diagnosis(verdict, (), evidence, reason)


def finding(cause: Cause, evidence: Evidence) -> Finding | None:
    """What speaks for a cause; None where it is of another stage, or not all that it predicts is known to be so."""
    if evidence.stage not in cause.stages or not all(each.holds(evidence) for each in cause.predicts):
        return None
    supports = [each for each in cause.supports if each.holds(evidence)]
    share = len(supports) / len(cause.supports) if cause.supports else 0.0
    named = dict.fromkeys((*cause.predicts, *supports))
    return Finding(
        cause=cause,
        level="observed" if cause.observed else "suspected",
        score=cause.sureness + _OBSERVED * cause.observed + _SUPPORT * share,
        numbers=tuple(each.text(evidence) for each in named),
        rows=tuple(dict.fromkeys(row for each in named for row in evidence.rows.get(each.signal, ())))[:4],
    )


def ranked(findings: Sequence[Finding]) -> tuple[Finding, ...]:
    """The findings, the likeliest first: what another one explains comes after that, however sure it is alone."""
    there = {each.cause.name: each.cause for each in findings}

    def depth(name: str, above: frozenset[str] = frozenset()) -> int:
        """How many causes in a row explain it. Two that explain each other explain nothing."""
        by = [
            other
            for other, cause in there.items()
            if name in cause.explains and other not in above and other not in there[name].explains
        ]
        return max((1 + depth(other, above | {name}) for other in by), default=0)

    return tuple(sorted(findings, key=lambda each: (depth(each.cause.name), -each.score)))


def unknown(causes: Sequence[Cause], evidence: Evidence) -> tuple[Prediction, ...]:
    """What the causes of the stage predict of signals that weren't measured."""
    predictions = [each for cause in causes if evidence.stage in cause.stages for each in cause.predicts]
    return tuple(each for each in dict.fromkeys(predictions) if each.holds(evidence) is None)


def _without_findings(evidence: Evidence, causes: Sequence[Cause]) -> tuple[str, str]:
    """The verdict and its reason where no cause was found."""
    signals = evidence.signals
    known = sum(evidence.stage in cause.stages for cause in causes) - len(_untried(causes, evidence))
    if not known:
        return "can't tell", "nothing that a cause predicts was measured."
    tried = f"none of the {known} causes that could be tried predicts what was measured"
    if not evidence.started:
        return "healthy", f"{tried}, before the first step."
    steps, moved = signals.get("steps", 0.0), _progress(evidence)
    if moved is None or steps < _STEPS:
        return "can't tell", f"{tried}, and {steps:.0f} steps are too few to see whether the run learns."
    if moved:
        return "healthy", f"{tried}, and the run learns."
    return "can't tell", f"{tried}, but the run hasn't learned in {steps:.0f} steps."


def _untried(causes: Sequence[Cause], evidence: Evidence) -> list[Cause]:
    """The causes of the stage of which something that they predict wasn't measured, and nothing was found wrong."""
    own = [cause for cause in causes if evidence.stage in cause.stages]
    return [
        cause
        for cause in own
        if not any(each.holds(evidence) is False for each in cause.predicts)
        and any(each.holds(evidence) is None for each in cause.predicts)
    ]


def _progress(evidence: Evidence) -> bool | None:
    """Whether the run has learned: its loss has fallen, or its reward has risen; None where neither was measured."""
    signals, sign = evidence.signals, 1.0
    name = "loss"
    if evidence.stage == "rl":
        name, sign = "reward", -1.0
    first, last, trend = (signals.get(f"{name}.{what}") for what in ("first", "last", "trend"))
    if first is None or last is None:
        return None
    return sign * (last - first) < 0 or (trend is not None and sign * trend < _TREND)
