"""Whether a model reads where its tokens stand."""

import jax.numpy as jnp
import numpy as np

from research.diagnosis import trial
from research.diagnosis.probes import perturb
from research.diagnosis.probes.types import Measured
from research.diagnosis.subject import Subject


def measure(subject: Subject) -> Measured:
    """probe/positions_matter: by how much the policy's last hidden states change where the distances between tokens are
    tripled, the root mean square over that of the states."""
    batch = trial.few_rows(subject, subject.batches[0])
    positions, most = np.asarray(batch["positions"]), subject.models["policy"].config.max_length - 1
    apart = {**batch, "positions": jnp.asarray(np.minimum(3 * positions, most).astype(positions.dtype))}
    plain, moved = (np.asarray(perturb.hidden(subject, each)) for each in (batch, apart))
    real = np.asarray(batch["segment_ids"]) > 0
    change, size = (float(np.square(x[real], dtype=np.float64).sum()) for x in (plain - moved, plain))
    return Measured({"probe/positions_matter": float((change / size) ** 0.5)} if size > 0 else {})
