"""Whether a model reads where its tokens stand."""

import jax
import jax.numpy as jnp

from research.diagnosis.probes import loss, perturb
from research.diagnosis.probes.types import Measured
from research.diagnosis.subject import Subject


def measure(subject: Subject) -> Measured:
    """probe/positions_matter: by how much the policy's last hidden states change where the distances between tokens are
    tripled, the root mean square over that of the states."""
    batch = loss.few_rows(subject, subject.batches[0])
    most = subject.models["policy"].config.max_length - 1
    apart = {**batch, "positions": jnp.minimum(3 * batch["positions"], most)}
    plain, moved = (perturb.hidden(subject, each) for each in (batch, apart))
    real = (batch["segment_ids"] > 0)[..., None]
    change, size = (jnp.sum(jnp.where(real, jnp.square(x), 0.0)) for x in (plain - moved, plain))
    change, size = jax.device_get((change, size))
    return Measured({"probe/positions_matter": float((change / size) ** 0.5)} if size > 0 else {})
