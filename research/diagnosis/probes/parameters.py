"""Parameters beside those that they were to begin with, and those that they began with."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from research.diagnosis.probes.types import Measured
from research.diagnosis.subject import Subject
from research.run import assemble, resolve

_CLOSE = 0.01  # as a share: what rounding to 16 bits may change


def measure(subject: Subject) -> Measured:
    """
    parameters/from_checkpoint: with model.init_from, the share of the policy's trained numbers that were that model's
      before the first step.
    parameters/changed: the share of trained numbers that have changed since.
    parameters/distance: how far they are from where they began, as a share of their norm there.
    """
    signals: dict[str, float] = {}
    began = subject.initial()
    if subject.config.model.init_from and began.get("policy"):
        read = _read(subject)
        if read is not None:
            signals["parameters/from_checkpoint"] = _share(_is_close, began["policy"], read)
    if subject.started:
        signals["parameters/changed"] = _share(_differs, subject.state.params, began)
        change, norm = jax.device_get(_norms(subject.state.params, began))
        signals["parameters/distance"] = float(np.sqrt(change / max(norm, 1e-30)))
    return Measured(signals)


def _read(subject: Subject) -> Any:
    """What the run is to begin with, read again; None where that has other parameters than the state."""
    config, bases = resolve.with_checkpoints(subject.config, None)
    with jax.set_mesh(subject.mesh):
        read = assemble.initial(config, subject.parts, bases, subject.mesh)[0].params["policy"]
    same = jax.tree.structure(read) == jax.tree.structure(subject.state.params["policy"])
    return read if same else None


def _is_close(a: jax.Array, b: jax.Array) -> jax.Array:
    a, b = a.astype(jnp.float32), b.astype(jnp.float32)
    return jnp.sum(jnp.abs(a - b) <= _CLOSE * jnp.abs(b) + 1e-8)


def _differs(a: jax.Array, b: jax.Array) -> jax.Array:
    return jnp.sum(a != b.astype(a.dtype))


def _share(count: Any, a: Any, b: Any) -> float:
    """The share of the numbers of two trees of which something holds."""
    pairs = list(zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True))
    counts = jax.device_get([count(x, y) for x, y in pairs])
    return float(sum(map(int, counts)) / max(sum(x.size for x, _ in pairs), 1))


@jax.jit
def _norms(a: Any, b: Any) -> tuple[jax.Array, jax.Array]:
    pairs = list(zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True))
    difference = sum(jnp.sum(jnp.square(x.astype(jnp.float32) - y.astype(jnp.float32))) for x, y in pairs)
    return difference, sum(jnp.sum(jnp.square(y.astype(jnp.float32))) for _, y in pairs)
