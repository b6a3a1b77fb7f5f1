"""Whether another base of RoPE would suit the parameters that the policy begins with."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from research.diagnosis import trial
from research.diagnosis.probes import loss
from research.diagnosis.probes.types import Measured
from research.diagnosis.programs import Batch, Params, reading
from research.diagnosis.subject import Subject
from research.models import transformer
from research.objectives.types import Forward
from research.run.assemble import Parts

_FACTORS = (10.0, 0.1)  # of the config's base: those in use are 1e4, 1e5, 5e5 and 1e6


def measure(subject: Subject) -> Measured:
    """parameters/rope_base_gain: with model.init_from, by how much another base of RoPE, ten times as large or a tenth,
    lowers the cross-entropy of the parameters as they were before the first step, as a share; the better of the two.

    A model that was trained with the base that the config has gets worse with any other. Texts must have some hundred
    tokens for it to show.
    """
    policy = subject.models["policy"].config
    reads_tokens = policy.causal and not policy.num_labels
    if not subject.config.model.init_from or policy.positions != "rope" or not reads_tokens or subject.config.rewards:
        return Measured({})
    batch = trial.few_rows(subject, subject.batches[0])
    weights = np.asarray(jax.device_get(loss.supervised(subject, batch)), np.float64)
    if not weights.sum():
        return Measured({})
    began = loss.whole_initial(subject)
    params, ends = subject.params if began is None else began, jnp.asarray(subject.tokenizer.stop, jnp.int32)
    own = _mean(subject.programs.read("policy", params, batch, ends).nll, weights)
    best = min(_mean(subject.programs.jit(at)(params, batch, ends), weights) for at in _AT)
    return Measured({"parameters/rope_base_gain": (own - best) / own} if own > 0 and np.isfinite(own - best) else {})


def _mean(values: jax.Array, weights: np.ndarray) -> float:
    return float((np.asarray(jax.device_get(values), np.float64) * weights).sum() / weights.sum())


def _nll(factor: float, parts: Parts, params: Params, batch: Batch, ends: Int[Array, " N"]) -> Float[Array, "B T"]:
    """The negative log-probability of each next token, with the config's base of RoPE times a factor."""
    model = parts.models["policy"]
    config = dataclasses.replace(model.config, rope_theta=factor * model.config.rope_theta)
    other = model._replace(hidden=functools.partial(transformer.hidden, config, model.rules))
    return reading(Forward({**parts.models, "policy": other}, params, batch), "policy", ends).nll


_AT = tuple(functools.partial(_nll, factor) for factor in _FACTORS)
