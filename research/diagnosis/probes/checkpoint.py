"""Parameters beside those that they were to begin with."""

from typing import Any

import jax
import jax.numpy as jnp

from research.diagnosis.probes.parameters import share
from research.diagnosis.probes.types import Measured
from research.diagnosis.subject import Subject
from research.run import assemble, resolve

_CLOSE = 0.01  # as a share: what rounding to 16 bits may change


def measure(subject: Subject) -> Measured:
    """parameters/from_checkpoint: with model.init_from, the share of the policy's trained numbers that were the ones of
    that model before the first step."""
    began = subject.initial()
    if not subject.config.model.init_from or not began.get("policy"):
        return Measured({})
    read = _read(subject)
    return Measured({} if read is None else {"parameters/from_checkpoint": share(_is_close, began["policy"], read)})


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
