"""The loss beside what it should be: plain formulas on the model's own logits, and simple bounds."""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from research import params as params_lib
from research.diagnosis import series, trial
from research.diagnosis.probes.types import Measured
from research.diagnosis.programs import OFFSETS, Reading
from research.diagnosis.subject import Batch, Subject
from research.objectives.terms import on_data
from research.objectives.types import next_token_targets
from research.run import evaluation
from research.train import means

_BATCHES = 2
_FIRST = ("grad_norm", "supervised_fraction", "supervised_rows", "empty_batch", "nonfinite")


def measure(subject: Subject) -> Measured:
    """
    probe/loss: of batches to train on, as an evaluation computes it; probe/loss_train_mode: as a step does.
    probe/ce_recomputed: the policy's cross-entropy of the supervised tokens, from its logits by a plain formula;
      probe/base_ce: that of the parameters as they were before the first step.
    probe/offset_K: the same of the tokens K places on from the position that predicts, for K of -1, 0 and 2.
    probe/entropy, probe/accuracy: of these predictions, the mean.
    probe/unigram: the entropy of the supervised tokens, taken singly; probe/uniform: the logarithm of the vocabulary.

    Before a run also what the series of some metrics gives, of these steps: the gradient's norms, what is supervised,
    and whether all is finite.
    """
    batches = tuple(trial.few_rows(subject, batch) for batch in subject.batches[:_BATCHES])
    signals: dict[str, float] = {"probe/uniform": math.log(subject.tokenizer.size)}
    if on_data(subject.terms, subject.config.rollout.pairs) and not subject.config.rewards:
        signals["probe/loss"] = _evaluated(subject, batches)
        records = _in_training(subject, batches)
        signals["probe/loss_train_mode"] = float(np.mean([record.get("loss", math.nan) for record in records]))
        signals |= {} if subject.started else _first_metrics(records)
    if subject.models["policy"].config.num_labels or not subject.models["policy"].config.causal:
        return Measured(_known(signals))
    weights = [_weights(subject, batch) for batch in batches]
    if sum(float(w.sum()) for w in weights) == 0:
        return Measured(_known(signals))
    own = [_read(subject, subject.params, batch) for batch in batches]
    began = whole_initial(subject)
    base = own if began is None else [_read(subject, began, batch) for batch in batches]
    signals |= {
        "probe/ce_recomputed": _mean([r.nll for r in own], weights),
        "probe/base_ce": _mean([r.nll for r in base], weights),
        "probe/entropy": _mean([r.entropy for r in own], weights),
        "probe/accuracy": _mean([r.correct for r in own], weights),
        "probe/unigram": _unigram(batches, weights),
    }
    for i, offset in enumerate(OFFSETS):
        if offset != 1:
            there = [_at(subject, batch, offset) for batch in batches]
            signals[f"probe/offset_{offset}"] = _mean([r.offsets[..., i] for r in own], there)
    return Measured(_known(signals))


def whole_initial(subject: Subject) -> Any:
    """The parameters of all roles as they were before the first step; None where that is what they are."""
    if not subject.started:
        return None
    return params_lib.join(subject.initial(), {**subject.frozen, **subject.state.synced})


def supervised(subject: Subject, batch: Batch) -> jax.Array:
    """[B, T], 1 at positions that predict a token that a term counts."""
    mask = jnp.where(batch["loss_mask"] > 0, 1.0, 0.0) if _is_masked(subject) else None
    return next_token_targets(batch, mask)[1]


def _is_masked(subject: Subject) -> bool:
    """Whether `loss_mask` says what is predicted: no term reads plain text alone."""
    fields = {field for term in subject.terms.values() for field in term.objective.fields}
    return bool(fields & {"loss_mask", "pair", "advantage"})


def _at(subject: Subject, batch: Batch, offset: int) -> np.ndarray:
    """[B, T], whether the token so many places on is one that a term counts."""
    name = "loss_mask" if _is_masked(subject) else "segment_ids"
    counted = np.nan_to_num(np.asarray(jax.device_get(batch[name]), np.float64)) > 0
    return np.roll(counted, -offset, axis=1)


def _weights(subject: Subject, batch: Batch) -> np.ndarray:
    return np.asarray(jax.device_get(supervised(subject, batch)), np.float64)


def _read(subject: Subject, params: Any, batch: Batch) -> Reading:
    ends = jnp.asarray(subject.tokenizer.stop, jnp.int32)
    return jax.device_get(subject.programs.read("policy", params, batch, ends))


def _mean(values: list[Any], weights: list[np.ndarray]) -> float:
    """Over what is supervised; where a value is NaN, it is left out."""
    total = count = 0.0
    for value, weight in zip(values, weights, strict=True):
        value = np.asarray(value, np.float64)
        counted = (weight > 0) & ~np.isnan(value)
        total, count = total + float(value[counted].sum()), count + float(counted.sum())
    return total / count if count else math.nan


def _unigram(batches: tuple[Batch, ...], weights: list[np.ndarray]) -> float:
    tokens = [np.roll(np.asarray(jax.device_get(batch["tokens"])), -1, axis=1) for batch in batches]
    targets = np.concatenate([t[w > 0] for t, w in zip(tokens, weights, strict=True)])
    shares = np.unique(targets, return_counts=True)[1] / len(targets)
    return float(-(shares * np.log(shares)).sum())


def _evaluated(subject: Subject, batches: tuple[Batch, ...]) -> float:
    key, frozen = jax.random.PRNGKey(subject.config.seed), {**subject.frozen, **subject.state.synced}
    terms = on_data(subject.terms, subject.config.rollout.pairs)
    size = subject.config.batch_size
    parts = [
        subject.programs.evaluate(
            subject.state.params, frozen, batch, key, subject.state.carry, jnp.asarray(i * size, jnp.int32)
        )
        for i, batch in enumerate(batches)
    ]
    return evaluation.whole_loss(terms, means(parts)).get("loss", math.nan)


def _in_training(subject: Subject, batches: tuple[Batch, ...]) -> list[dict[str, float]]:
    """The metrics of a step on each batch, before its update."""
    rates, records = trial.scaled(subject, 1.0), []
    for batch in batches:
        _, out = subject.parts.step(trial.copied(subject.state), subject.frozen, batch, rates)
        records.append(means([jax.device_get(out)]))
    return records


def _first_metrics(records: list[dict[str, float]]) -> dict[str, float]:
    """Those of metrics that need no update to say something."""
    signals = {}
    for name in dict.fromkeys(name for record in records for name in record):
        if name.partition("/")[0] not in _FIRST:
            continue
        made = series.summary([record[name] for record in records if name in record])
        signals |= {f"{name}.{what}": made[what] for what in ("max", "min", "mean", "median") if what in made}
    return signals


def _known(signals: dict[str, float]) -> dict[str, float]:
    return {name: value for name, value in signals.items() if math.isfinite(value)}
