"""The same documents in the tokens of two tokenizers, for teachers whose tokenizer isn't the policy's."""

from collections.abc import Mapping

import numpy as np

from research.sources import fields as table

FIELDS = table.group("parallel")

Batch = Mapping[str, np.ndarray]


def fields(batch: Batch, teacher: Batch, sizes: tuple[np.ndarray, np.ndarray]) -> dict[str, np.ndarray]:
    """What a teacher reads beside a batch, and where it has read the same.

    Args:
      batch, teacher: tokens, segment_ids, positions and loss_mask, [B, T], of the same documents in the same rows.
      sizes: of either tokenizer, how many bytes of text each token stands for, [V] int32.

    Returns:
      teacher_tokens, teacher_segment_ids, teacher_positions: [B, T] int32.
      teacher_at: [B, T] int32. Of a position that predicts a supervised token, the teacher's position in that row that
        does so after the same bytes of supervised text; -1 where the teacher's tokens have no boundary there.
    """
    B, T = batch["tokens"].shape
    (at,) = table.empty(("teacher_at",), B, {"time": T}).values()
    most = max(int(size.max()) for size in sizes) * T + 1  # bytes of a row
    keys, rows, times = _read_so_far(batch, sizes[0], most)
    teacher_keys, _, teacher_times = _read_so_far(teacher, sizes[1], most)
    _, here, there = np.intersect1d(keys, teacher_keys, assume_unique=True, return_indices=True)
    at[rows[here], times[here]] = teacher_times[there]
    values = {f"teacher_{name}": teacher[name] for name in ("tokens", "segment_ids", "positions")}
    return values | {"teacher_at": at}


def _read_so_far(batch: Batch, sizes: np.ndarray, most: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Positions that predict a supervised token: (document and bytes read, as one number; row; time), each [N]."""
    segments, T = batch["segment_ids"].astype(np.int64), batch["tokens"].shape[1]
    supervised = (batch["loss_mask"] > 0) & (segments > 0)
    tokens = np.where(supervised, batch["tokens"], 0)  # virtual tokens, which aren't, have ids of no tokenizer
    read = np.cumsum(np.where(supervised, sizes[tokens], 0), axis=1, dtype=np.int64)
    predicts = np.zeros(segments.shape, bool)
    predicts[:, :-1] = (segments[:, 1:] == segments[:, :-1]) & supervised[:, 1:]
    row, time = np.nonzero(predicts)
    # Documents of a row hold the same text for both, so that what was read before them may count or not, but for what
    # was cut off: it is taken away.
    first = time - batch["positions"][row, time]
    before = np.where(first > 0, read[row, first - 1], 0)
    key = (row * (T + 1) + segments[row, time]) * most + read[row, time] - before
    # An end of an answer stands for no text: what predicts it has read the same as what predicts the next answer.
    _, start, which = np.unique(key, return_index=True, return_inverse=True)
    return key * T + np.arange(len(key)) - start[which], row, time
