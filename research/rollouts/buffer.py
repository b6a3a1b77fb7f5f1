"""The answers of a rollout as rows of a batch, and the order in which they are trained on.

A row is what stands in front of documents, a prompt and one answer to it. Axes: N rows, T tokens.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jaxtyping import Float, Int

from research.rollouts.collection import Group

Arrays = dict[str, np.ndarray]

# What rows may have before models and rewards say anything of them.
WRITTEN = (
    *("tokens", "segment_ids", "positions", "loss_mask", "source", "virtual"),
    *("sampler_log_prob", "pair", "side"),
)


def lay_out(
    groups: Sequence[Group], seq_len: int, virtual: range, truncated: str, prompts_end: int | None = None
) -> Arrays:
    """The rows of all answers, those of a group one after the other, as batch fields [N, T].

    Args:
      groups: of a rollout; each prompt leaves room for its answers.
      seq_len: T.
      virtual: ids of the tokens in front of each document.
      truncated: what becomes of answers that were cut off; see RolloutSpec.
      prompts_end: where the prompts of all rows end; None where each begins at 0.
    """
    rows = [(group, answer) for group in groups for answer in range(len(group.lengths))]
    batch = empty(len(rows), seq_len)
    batch["sampler_log_prob"] = np.zeros((len(rows), seq_len), np.float32)
    for row, (group, answer) in enumerate(rows):
        first = 0 if prompts_end is None else prompts_end - len(virtual) - len(group.prompt.tokens)
        start, end = write(batch, row, first, virtual, group, answer)
        if not (group.stopped[answer] or truncated == "train"):
            batch["loss_mask"][row] = 0
        batch["sampler_log_prob"][row, start - 1 : end - 1] = group.log_probs[answer, : end - start]
    return batch


def empty(rows: int, seq_len: int) -> Arrays:
    """So many rows of padding, [rows, T], with the fields of any answer."""
    names = ("tokens", "segment_ids", "positions", "source", "virtual")
    batch: Arrays = {name: np.zeros((rows, seq_len), np.int32) for name in names}
    return batch | {"loss_mask": np.zeros((rows, seq_len), np.float32)}


def write(batch: Arrays, row: int, first: int, virtual: range, group: Group, answer: int) -> tuple[int, int]:
    """Writes a prompt and one of its answers behind what a row has, from position `first` on, as the row's next
    document; returns where the answer begins and ends."""
    length = int(group.lengths[answer])
    asked = first + len(virtual)
    start = asked + len(group.prompt.tokens)
    end = start + length
    segment = batch["segment_ids"][row].max() + 1
    batch["tokens"][row, first:asked] = virtual
    batch["tokens"][row, asked:start] = group.prompt.tokens
    batch["tokens"][row, start:end] = group.tokens[answer, :length]
    batch["virtual"][row, first:asked] = 1
    batch["segment_ids"][row, first:end] = segment
    batch["positions"][row, first:end] = np.arange(end - first)
    batch["source"][row, first:end] = group.prompt.source
    batch["loss_mask"][row, start:end] = 1
    return start, end


def predicting(batch: Mapping[str, np.ndarray]) -> Float[np.ndarray, "N T"]:
    """1 where an answer's token is predicted, one before it; 0 elsewhere."""
    return (np.pad(batch["loss_mask"][:, 1:], ((0, 0), (0, 1))) > 0).astype(np.float32)


def at_prediction(values: np.ndarray, batch: Mapping[str, np.ndarray]) -> np.ndarray:
    """[N, T] float32: a number of each row [N], or of each token [N, T], where an answer's token is predicted, one
    before it; 0 elsewhere."""
    values = values[:, None] if values.ndim == 1 else np.pad(values[:, 1:], ((0, 0), (0, 1)))
    return np.where(predicting(batch) > 0, values, 0).astype(np.float32)


def put(values: Mapping[str, np.ndarray], like: Mapping[str, jax.ShapeDtypeStruct]) -> dict[str, jax.Array]:
    """Arrays that every process has whole -> global arrays of the dtypes and shardings of `like`."""
    return {name: _put(np.asarray(values[name], x.dtype), x.sharding) for name, x in like.items()}


def parts(rows: Mapping[str, np.ndarray], like: Mapping[str, jax.ShapeDtypeStruct]) -> Iterator[dict[str, jax.Array]]:
    """The rows, whose number is a multiple of B, as global arrays [B, ...] like `like`, one batch after the other."""
    B, N = next(iter(like.values())).shape[0], len(next(iter(rows.values())))
    for first in range(0, N, B):
        yield put({name: rows[name][first : first + B] for name in like}, like)


def _put(value: np.ndarray, sharding: Any) -> jax.Array:
    return jax.make_array_from_callback(value.shape, sharding, lambda index: value[index])


def minibatch(
    seed: Sequence[int], rows: int, batch_size: int, served: int, *, together: int = 1, microbatches: int = 1
) -> Int[np.ndarray, " B"]:
    """The rows of the update that comes after `served` others of the same rollout: every epoch has all of them once, in
    an order of its own.

    Args:
      seed: of the rollout.
      rows: N, of the rollout.
      batch_size: B.
      served: updates made.
      together: so many rows stay together, in each of `microbatches` one after the other; a step takes every
        microbatches-th row for one (see train.TrainStep).
    """
    epoch, number = divmod(served, rows // batch_size)
    order = np.random.default_rng([*seed, epoch]).permutation(rows // together).astype(np.int32)
    size = batch_size // together
    groups = order[number * size : (number + 1) * size].reshape(microbatches, -1, 1)
    own = groups * np.int32(together) + np.arange(together, dtype=np.int32)
    return own.reshape(microbatches, -1).T.reshape(-1)
