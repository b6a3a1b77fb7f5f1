"""Parameters beside those that they began with."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from research.diagnosis.probes.types import Measured
from research.diagnosis.subject import Subject


def measure(subject: Subject) -> Measured:
    """
    parameters/changed: the share of trained numbers that have changed since the first step.
    parameters/distance: how far they are from where they began, as a share of their norm there.
    """
    if not subject.started:
        return Measured({})
    began = subject.initial()
    change, norm = jax.device_get(_norms(subject.state.params, began))
    distance = float(np.sqrt(change / max(norm, 1e-30)))
    changed = share(_differs, subject.state.params, began)
    return Measured({"parameters/changed": changed, "parameters/distance": distance})


def share(count: Callable[[jax.Array, jax.Array], jax.Array], a: Any, b: Any) -> float:
    """The share of the numbers of two trees of which something holds, as `count` counts it in two arrays."""
    pairs = list(zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True))
    counts = jax.device_get([count(x, y) for x, y in pairs])
    return float(sum(map(int, counts)) / max(sum(x.size for x, _ in pairs), 1))


def _differs(a: jax.Array, b: jax.Array) -> jax.Array:
    return jnp.sum(a != b.astype(a.dtype))


@jax.jit
def _norms(a: Any, b: Any) -> tuple[jax.Array, jax.Array]:
    pairs = list(zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True))
    difference = sum(jnp.sum(jnp.square(x.astype(jnp.float32) - y.astype(jnp.float32))) for x, y in pairs)
    return difference, sum(jnp.sum(jnp.square(y.astype(jnp.float32))) for _, y in pairs)
