"""Whether the model can learn a batch by heart: gradients reach what is trained, and targets follow from inputs."""

import math
from typing import Any

import jax
import jax.numpy as jnp

from research.diagnosis.probes.types import Measured
from research.diagnosis.subject import Batch, Subject

STEPS = 20
_SHARE = 0.01  # of its own norm that each parameter moves in a step
_FLOPS = 1.5e12  # of all steps; rows of the batch are left out for it
_FLOOR = 0.05  # root mean square that a parameter counts as at least: adapters begin at 0


def measure(subject: Subject) -> Measured:
    """probe/memorise: the loss of a batch after 20 steps on it, over its loss before; of Adam's direction, each
    parameter by a hundredth of its norm at a step (as LAMB, arXiv:1904.00962), so that no learning rate matters.

    Nothing of a run that has begun, in reinforcement learning, whose loss isn't to become small, and where nothing is
    supervised.
    """
    if subject.started or subject.stage == "rl":
        return Measured({})
    batch, state = _cut(subject), subject.state
    params = state.params
    first = second = jax.tree.map(jnp.zeros_like, params)
    losses = []
    for step in range(1, STEPS + 1):
        grads, metrics = subject.programs.gradients(state.replace(params=params), subject.frozen, batch)
        losses.append(_loss(metrics))
        params, first, second = _move(params, grads, first, second, jnp.asarray(step, jnp.float32))
    _, metrics = subject.programs.gradients(state.replace(params=params), subject.frozen, batch)
    losses.append(_loss(metrics))
    if not losses[0] or not math.isfinite(losses[0]) or not math.isfinite(losses[-1]):
        return Measured({})
    return Measured({"probe/memorise": losses[-1] / losses[0]})


@jax.jit
def _move(params: Any, grads: Any, first: Any, second: Any, step: jax.Array) -> tuple[Any, Any, Any]:
    """A step of Adam's direction, of a fixed length for each parameter."""
    first = jax.tree.map(lambda m, g: 0.9 * m + 0.1 * g, first, grads)
    second = jax.tree.map(lambda v, g: 0.95 * v + 0.05 * jnp.square(g), second, grads)

    def one(p: jax.Array, m: jax.Array, v: jax.Array) -> jax.Array:
        m, v = m / (1 - jnp.power(0.9, step).astype(m.dtype)), v / (1 - jnp.power(0.95, step).astype(v.dtype))
        direction = m / (jnp.sqrt(v) + 1e-12)
        length = jnp.maximum(jnp.linalg.norm(p.ravel()), _FLOOR * math.sqrt(p.size))
        norm = jnp.linalg.norm(direction.ravel())
        return p - direction * jnp.where(norm > 0, _SHARE * length / jnp.where(norm > 0, norm, 1), 0).astype(p.dtype)

    return jax.tree.map(one, params, first, second), first, second


def _loss(metrics: dict[str, tuple[jax.Array, jax.Array]]) -> float:
    total, weight = jax.device_get(metrics["loss"])
    return float(total / weight) if weight else math.nan


def _cut(subject: Subject) -> Batch:
    """The first rows of the first batch, as many as can be afforded; all of them where devices share rows."""
    batch, config = subject.batches[0], subject.config
    row = config.seq_len * sum(each.total for each in subject.parts.roles.flops(config.seq_len).values())
    count = max(int(_FLOPS / max(row * STEPS, 1)), 1)
    if subject.mesh.size > 1 or config.microbatches > 1 or count >= config.batch_size:
        return batch
    return {name: values[:count] for name, values in batch.items()}
