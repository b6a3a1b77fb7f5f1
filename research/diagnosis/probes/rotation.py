"""Whether another base of RoPE would suit the parameters that the policy begins with."""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from research.diagnosis import trial
from research.diagnosis.probes import loss
from research.diagnosis.probes.types import Measured
from research.diagnosis.programs import Batch, Params
from research.diagnosis.programs import reading as read
from research.diagnosis.subject import Subject
from research.models import transformer
from research.objectives.types import Forward
from research.run.assemble import Parts

_BATCHES = 2
_FACTORS = (10.0, 0.1)  # of the config's base: those in use are 1e4, 1e5, 5e5 and 1e6


def measure(subject: Subject) -> Measured:
    """
    parameters/rope_base_gain: with model.init_from, by how much another base of RoPE, ten times as large or a tenth,
      lowers the cross-entropy of all tokens, of the parameters as they were before the first step, as a share; the
      better of the two.
    parameters/rope_base_certainty: that gain over its standard error.

    A model that was trained with the base that the config has gets worse with any other. The longer texts are, the more
    it shows.
    """
    policy = subject.models["policy"].config
    reads_tokens = policy.causal and not policy.num_labels
    if not subject.config.model.init_from or policy.positions != "rope" or not reads_tokens or subject.config.rewards:
        return Measured({})
    began = loss.whole_initial(subject)
    params, ends = subject.params if began is None else began, jnp.asarray(subject.tokenizer.stop, jnp.int32)
    own: list[np.ndarray] = []
    others: list[list[np.ndarray]] = [[] for _ in _AT]
    for batch in (trial.few_rows(subject, batch) for batch in subject.batches[:_BATCHES]):
        reading = jax.device_get(subject.programs.read("policy", params, batch, ends))
        real = np.asarray(reading.weights) > 0
        own.append(np.asarray(reading.nll, np.float64)[real])
        for values, at in zip(others, _AT, strict=True):
            values.append(np.asarray(subject.programs.jit(at)(params, batch, ends), np.float64)[real])
    losses = np.concatenate(own)
    gains = max((losses - np.concatenate(values) for values in others), key=np.mean) if len(losses) > 1 else losses[:0]
    if not len(gains) or not np.isfinite(gains).all() or losses.mean() <= 0:
        return Measured({})
    error = max(float(gains.std()) / math.sqrt(len(gains)), 1e-12)
    return Measured(
        {
            "parameters/rope_base_gain": float(gains.mean() / losses.mean()),
            "parameters/rope_base_certainty": float(gains.mean()) / error,
        }
    )


def _nll(factor: float, parts: Parts, params: Params, batch: Batch, ends: Int[Array, " N"]) -> Float[Array, "B T"]:
    """The negative log-probability of each next token, with the config's base of RoPE times a factor."""
    model = parts.models["policy"]
    config = dataclasses.replace(model.config, rope_theta=factor * model.config.rope_theta)
    other = model._replace(hidden=functools.partial(transformer.hidden, config, model.rules))
    return read(Forward({**parts.models, "policy": other}, params, batch), "policy", ends).nll


_AT = tuple(functools.partial(_nll, factor) for factor in _FACTORS)
