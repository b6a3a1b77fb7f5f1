"""What the models that a run learns from say of its data, and the reference of preferences."""

import jax
import jax.numpy as jnp
import numpy as np

from research.diagnosis import trial
from research.diagnosis.probes import loss
from research.diagnosis.probes.types import Measured
from research.diagnosis.subject import Subject
from research.objectives.types import next_token_targets

REFERENCE = "reference"


def measure(subject: Subject) -> Measured:
    """
    teacher/ce: the teacher's cross-entropy of the supervised tokens; of several teachers the lowest.
    teacher/difference: how far the teacher's is from the policy's before the run, the mean over these tokens.
    pairs/reference_gap: the same of the reference, in nats a token.
    """
    frozen = [role for term in subject.terms.values() for role in term.objective.frozen]
    if subject.config.rewards or not frozen:
        return Measured({})
    began = loss.whole_initial(subject)
    began = subject.params if began is None else began
    signals: dict[str, float] = {}
    for role in dict.fromkeys(frozen):
        if not _comparable(subject, role):
            continue
        own, gap = _compared(subject, role, began)
        if role == REFERENCE:
            signals["pairs/reference_gap"] = gap
        else:
            signals["teacher/ce"] = min(own, signals.get("teacher/ce", own))
            signals["teacher/difference"] = min(gap, signals.get("teacher/difference", gap))
    return Measured(signals)


def _comparable(subject: Subject, role: str) -> bool:
    """Whether a role predicts the tokens that the policy predicts."""
    own = {name for term in subject.terms.values() for name in term.objective.own_tokens}
    policy, other = subject.models["policy"].config, subject.models[role].config
    same = other.vocab_size == policy.vocab_size and not other.num_labels and other.causal
    return role in subject.params and role not in own and same and not subject.models[role].of


def _compared(subject: Subject, role: str, began: dict) -> tuple[float, float]:
    """A role's cross-entropy, and how far it is from that of the policy as it began."""
    ends, total, apart, count = jnp.asarray(subject.tokenizer.stop, jnp.int32), 0.0, 0.0, 0.0
    for batch in (trial.few_rows(subject, batch) for batch in subject.batches[:2]):
        _, weights = next_token_targets(batch, batch["loss_mask"])
        other = subject.programs.read(role, subject.params, batch, ends).nll
        policy = subject.programs.read("policy", began, batch, ends).nll
        weights, other, policy = (np.asarray(x, np.float64) for x in jax.device_get((weights, other, policy)))
        weights = (weights > 0).astype(np.float64)
        total, count = total + float((weights * other).sum()), count + float(weights.sum())
        apart += float((weights * np.abs(other - policy)).sum())
    return total / max(count, 1.0), apart / max(count, 1.0)
