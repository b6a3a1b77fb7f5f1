"""Whether neighbouring batches are alike: whether the data is in an order."""

import numpy as np
from jaxtyping import Float

from research.diagnosis.probes.types import Measured
from research.diagnosis.subject import Subject

_READ = ("tokens", "segment_ids", "positions", "loss_mask")
_PAIRS = 16  # of neighbouring batches


def measure(subject: Subject) -> Measured:
    """
    data/order.autocorrelation: the correlation of a feature's mean in a batch with that in the next, of the feature
      by which batches differ most.
    data/order.spread: the variance of that feature's means, over what rows drawn by chance would give.

    Pairs of neighbouring batches are read that lie evenly over an epoch, since an order may show over its whole alone.
    The features, of each row: shares of kinds of tokens (below 64, from 64 to 96, from 96 on, modulo 128), the length
    of documents and the share that is supervised.
    """
    if subject.config.rewards:
        return Measured({})
    rows = np.stack([_features(batch) for batch in _batches(subject)])  # batches, rows, features
    if rows.shape[1] < 2:
        return Measured({})
    means, within = rows.mean(axis=1), rows.var(axis=1).mean(axis=0)
    centred = means - means.mean(axis=0)
    variance = centred.var(axis=0)
    real = variance > 1e-12
    if not real.any():
        return Measured({})
    neighbours = (centred[::2] * centred[1::2]).mean(axis=0)[real] / variance[real]
    spread = (variance * rows.shape[1])[real] / np.maximum(within[real], 1e-12)
    # The feature whose batches differ more than chance has it, and hang together.
    best = int(np.argmax(np.minimum(np.maximum(neighbours, 0), 1) * np.minimum(spread, 100.0)))
    signals = {"data/order.autocorrelation": float(neighbours[best]), "data/order.spread": float(spread[best])}
    return Measured(signals)


def _batches(subject: Subject) -> list[dict[str, np.ndarray]]:
    """Two neighbouring batches from each of some places of an epoch, on the host."""
    source, size = subject.inputs.source, subject.config.batch_size
    rows = sum(len(each) for each, _ in subject.inputs.data.train)
    apart = max(rows // size // _PAIRS, 2)  # batches from a pair to the next
    batches = []
    for pair in range(_PAIRS):
        state = {**source.init(), "row": pair * apart * size}
        for _ in range(2):
            batch, state = source.next(state)
            batches.append({name: np.asarray(batch[name]) for name in _READ})
    return batches


def _features(batch: dict[str, np.ndarray]) -> Float[np.ndarray, "B N"]:
    """The features of each row."""
    real = batch["segment_ids"] > 0
    count = np.maximum(real.sum(axis=1), 1)
    kinds = batch["tokens"] % 128
    low, high = kinds < 64, kinds >= 96
    shares = [low, ~low & ~high, high, batch["tokens"] % 2 == 0]
    columns = [(share & real).sum(axis=1) / count for share in shares]
    columns.append(np.where(real, batch["positions"], 0).max(axis=1).astype(np.float64))
    columns.append((batch["loss_mask"] * real).sum(axis=1) / count)
    return np.stack(columns, axis=1).astype(np.float64)
