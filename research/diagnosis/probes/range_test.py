"""Which learning rates lower the loss: a range test (Smith 2017, arXiv:1506.01186), before a run."""

import math

import jax
import numpy as np

from research.diagnosis import trial
from research.diagnosis.probes.types import Measured
from research.diagnosis.subject import Subject
from research.optim import Rates
from research.train import means

FACTORS = (1.0, 0.1, 10.0, 0.01, 100.0, 0.001, 0.3, 3.0)  # of the run's own rates, the most telling first
_FEWEST = 5  # factors without which nothing is said
_FLOPS = {"cpu": 6e11}  # that the test may take, some 6 s on two cores
_MOST_FLOPS = 1e15  # elsewhere
_WORSE = 0.1  # a rate that raises the loss by so much of itself diverges


def measure(subject: Subject) -> Measured:
    """Steps on the subject's batches at several constant rates, each from the start: twice over the batches.

    range/gain: how much lower the loss of a batch is the second time, at the best rate; range/own_gain: at the run's.
    range/best: that rate; range/own_over_best: the run's rate over it.
    range/diverges_at: the least rate at which the loss rises by a tenth or is no number, over the run's rate.
    Nothing where the run has begun, in reinforcement learning, and where it would take minutes.
    """
    rate = subject.config.optimizer.learning_rate
    factors = FACTORS[: _affordable(subject)]
    if subject.started or subject.stage == "rl" or rate == 0 or len(factors) < _FEWEST:
        return Measured({})
    before = _losses(subject, 0.0)
    gains = {factor: before - _losses(subject, factor) for factor in factors}
    means_ = {factor: float(np.mean(gain)) for factor, gain in gains.items()}
    size = max(abs(float(np.mean(before))), 1e-6)
    bad = [factor for factor, gain in means_.items() if not math.isfinite(gain) or gain < -_WORSE * size]
    fine = {factor: gain for factor, gain in means_.items() if factor not in bad}
    if not np.isfinite(before).all() or not fine:
        return Measured({})
    best = max(fine, key=lambda factor: fine[factor])
    signals = {"range/gain": fine[best], "range/best": rate * best, "range/own_over_best": 1 / best}
    if math.isfinite(means_[1.0]):
        signals["range/own_gain"] = means_[1.0]
    if bad:
        signals["range/diverges_at"] = min(bad)
    return Measured(signals)


def _losses(subject: Subject, factor: float) -> np.ndarray:
    """The loss of each batch the second time, at a constant rate; at a factor of 0 what it is at the start."""
    state, losses = trial.copied(subject.state), []
    passes = 1 if factor == 0 else 2
    for i in range(passes * len(subject.batches)):
        batch = subject.batches[i % len(subject.batches)]
        state, out = subject.parts.step(state, subject.frozen, batch, constant_rates(subject, factor, i))
        losses.append(means([jax.device_get(out)]).get("loss", math.nan))
    return np.asarray(losses[-len(subject.batches) :])


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


def _affordable(subject: Subject) -> int:
    """How many rates can be tried in some seconds, by the model FLOPs of a step."""
    tokens = subject.config.batch_size * subject.config.seq_len
    step = tokens * sum(each.total for each in subject.parts.roles.flops(subject.config.seq_len).values())
    platform = subject.mesh.devices.flat[0].platform
    steps = _FLOPS.get(platform, _MOST_FLOPS) / max(step, 1)
    return int(steps / (2 * len(subject.batches))) - 1
