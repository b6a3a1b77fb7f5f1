"""Which learning rates lower the loss: a range test (Smith 2017, arXiv:1506.01186), before a run."""

import math

import jax

from research.diagnosis import trial
from research.diagnosis.probes.types import Measured
from research.diagnosis.subject import Batch, Subject
from research.optim import Rates
from research.train import means

FACTORS = (1.0, 0.1, 10.0, 0.01, 100.0)  # of the run's own rates
_FEW = (1.0, 0.01, 100.0)  # where all would take too long
_FURTHER = (1e4, 1e6)  # tried where the highest rate was the best
_UPDATES, _FEW_UPDATES = 6, 4
_FLOPS = {"cpu": 3e12}  # that the test may take, half a minute on two cores
_MOST_FLOPS = 1e15  # elsewhere
_WORSE = 0.1  # a rate that raises the loss by so much of itself diverges


def measure(subject: Subject) -> Measured:
    """Some updates on one batch at several constant rates, each from the start.

    range/gain: how much lower the loss of the batch is after them, at the best rate; range/own_gain: at the run's.
    range/best: that rate; range/own_over_best: the run's rate over it.
    range/diverges_at: the least rate at which the loss rises by a tenth or is no number, over the run's rate.
    probe/memorise: the loss of the batch after the updates at the best rate, over its loss before.
    Nothing where the run has begun, in reinforcement learning, and where it would take minutes.
    """
    rate, batch = subject.config.optimizer.learning_rate, trial.few_rows(subject, subject.batches[0])
    factors, updates = _affordable(subject, batch)
    if subject.started or subject.stage == "rl" or rate == 0 or not factors:
        return Measured({})
    losses = {factor: _losses(subject, batch, factor, updates) for factor in factors}
    for factor in _FURTHER:
        if _best(losses) == max(losses):
            losses[factor] = _losses(subject, batch, factor, updates)
    best, before = _best(losses), losses[1.0][0]
    if best is None or not math.isfinite(before):
        return Measured({})
    gains = {factor: before - after for factor, (_, after) in losses.items()}
    signals = {"range/gain": gains[best], "range/best": rate * best, "range/own_over_best": 1 / best}
    if before > 0:
        signals["probe/memorise"] = losses[best][1] / before
    if math.isfinite(gains[1.0]):
        signals["range/own_gain"] = gains[1.0]
    bad = [factor for factor, each in losses.items() if _diverges(*each)]
    if bad:
        signals["range/diverges_at"] = min(bad)
    return Measured(signals)


def _best(losses: dict[float, tuple[float, float]]) -> float | None:
    """The factor with the lowest loss; None where it diverges with all."""
    fine = {factor: after for factor, (before, after) in losses.items() if not _diverges(before, after)}
    return min(fine, key=lambda factor: fine[factor], default=None)


def _diverges(before: float, after: float) -> bool:
    return not math.isfinite(after) or after > before + _WORSE * max(abs(before), 1e-6)


def _losses(subject: Subject, batch: Batch, factor: float, updates: int) -> tuple[float, float]:
    """The loss of a batch before and after updates on it at a constant rate."""
    state, losses = trial.copied(subject.state), []
    for i in range(updates + 1):
        state, out = subject.parts.step(state, subject.frozen, batch, constant_rates(subject, factor, i))
        losses.append(means([jax.device_get({"loss": out["loss"]})]).get("loss", math.nan))
    return losses[0], losses[-1]


def constant_rates(subject: Subject, factor: float, updates: int) -> Rates:
    """What the step must be given so that an update is made at the run's highest rates times a factor, whatever the
    schedule has at that update. Where that has 0, nothing moves."""
    step = subject.programs.step
    own = trial.scaled(subject, factor)
    shares = {name: float(step.schedule(updates, 1.0)) for name in ("",)}
    shares |= {name: float(schedule(updates, 1.0)) for name, schedule in step.group_schedules.items()}
    return {
        name: jax.device_put(rate / shares[name], rate.sharding) if shares[name] else rate for name, rate in own.items()
    }


def _affordable(subject: Subject, batch: Batch) -> tuple[tuple[float, ...], int]:
    """The factors that can be tried, and after how many updates each; none where that would take minutes."""
    most = _FLOPS.get(subject.mesh.devices.flat[0].platform, _MOST_FLOPS)
    step = batch["tokens"].shape[0] * trial.row_flops(subject)
    for factors, updates in ((FACTORS, _UPDATES), (_FEW, _FEW_UPDATES)):
        if len(factors) * (updates + 1) * step <= most:
            return factors, updates
    return (), 0
