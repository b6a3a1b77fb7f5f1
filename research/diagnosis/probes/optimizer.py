"""What the optimizer does with a gradient: where its step points, and how much it remembers."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from research.diagnosis import trial
from research.diagnosis.probes.types import Measured
from research.diagnosis.subject import Subject
from research.train import means

_BATCHES = 2
_OF_TOKENS = ("pretrain", "sft", "distill")


def measure(subject: Subject) -> Measured:
    """
    optimizer/descent: by how much, as a share, a step of a hundredth of the learning rate lowers the loss of the batch
      that it is made on; absent where it changes nothing, and in reinforcement learning.
    optimizer/gradient_left: the norm of the gradient that a step gives for a batch in which nothing is supervised, over
      that of the batch; of runs that have begun, whose loss is one of tokens.
    optimizer/count: the updates that the optimizer's moments have counted, over those that the run has made.
    """
    signals = {}
    if (count := _count(subject.state.opt_state)) is not None and int(subject.state.updates) > 0:
        signals["optimizer/count"] = count / int(subject.state.updates)
    if not subject.config.rewards:
        few = [trial.few_rows(subject, batch) for batch in subject.batches[:_BATCHES]]
        falls = [fall for batch in few if (fall := _descent(subject, batch)) is not None]
        if falls:
            signals["optimizer/descent"] = float(np.mean(falls))
    if subject.started and subject.stage in _OF_TOKENS:
        left = _left(subject, trial.few_rows(subject, subject.batches[0]))
        signals |= {} if left is None else {"optimizer/gradient_left": left}
    return Measured(signals)


def _descent(subject: Subject, batch: dict[str, jax.Array]) -> float | None:
    """How much lower the loss of a batch is after a small step on it; None where it is the same, or isn't finite."""
    rates = trial.scaled(subject, 0.01)
    after, out = subject.parts.step(trial.copied(subject.state), subject.frozen, batch, rates)
    _, again = subject.parts.step(after, subject.frozen, batch, rates)
    before, now = (means([jax.device_get(each)]).get("loss", np.nan) for each in (out, again))
    if not np.isfinite([before, now]).all() or before == now or before == 0:
        return None
    return float((before - now) / abs(before))


def _left(subject: Subject, batch: dict[str, jax.Array]) -> float | None:
    """What is in a gradient beside the batch's own; None where a norm isn't finite, or 0 for the batch."""
    nothing = {name: jnp.zeros_like(batch[name]) for name in ("loss_mask", "segment_ids")}
    norms = []
    for each in (batch, {**batch, **nothing}):
        _, out = subject.parts.step(trial.copied(subject.state), subject.frozen, each, trial.scaled(subject, 1.0))
        norms.append(means([jax.device_get(out)]).get("grad_norm", np.nan))
    return norms[1] / norms[0] if np.isfinite(norms).all() and norms[0] > 0 else None


def _count(opt_state: Any) -> float | None:
    """The least of the counts that moments are corrected by; None where there are none."""
    counts = []

    def visit(node: Any) -> None:
        if hasattr(node, "count") and hasattr(node, "mu"):
            counts.append(float(np.asarray(node.count)))
        elif isinstance(node, tuple | list):
            for each in node:
                visit(each)
        elif isinstance(node, dict):
            for each in node.values():
                visit(each)
        elif hasattr(node, "inner_states"):
            visit(dict(node.inner_states))
        elif hasattr(node, "inner_state"):
            visit(node.inner_state)

    visit(opt_state)
    return min(counts) if counts else None
