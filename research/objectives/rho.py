"""Online batch selection: of a large batch the documents that the policy could still learn, by a reference model."""

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from research.objectives import excess
from research.objectives.types import Batch, Context, Forward, LossOut, Objective
from research.ops import documents
from research.ops.top_share import top_share
from research.ranges import Part


class Gathered(NamedTuple):
    """Of all rows of the batch.

    Attributes:
      excess: of the tokens.
      means: [B, N], the mean excess loss of each document's tokens, its reducible loss.
      present: [B, N], whether there is such a document, and something to learn in it.
    """

    excess: excess.Excess
    means: Float[Array, "B N"]
    present: Bool[Array, "B N"]


def make(keep: Part = 0.1) -> Objective:
    """Cross-entropy of the share `keep` of the batch's documents whose mean excess loss is the highest (RHO-LOSS,
    arXiv:2206.07137, algorithm 1): the policy's loss less that of the role `reference`, which has learned held-out
    data. The documents are weighed by their tokens, as in sft.

    `batch_size` is that of the large batch. Its forward and backward pass is that of all rows.

    Args:
      keep: n_b / n_B, in (0, 1].
    """

    def gather(forward: Forward, batch: Batch) -> Gathered:
        read = excess.read(forward, batch)
        number, count = batch["segment_ids"] - 1, batch["tokens"].shape[1]
        tokens = documents.sums(read.weights, number, count)
        means = documents.sums(read.values * read.weights, number, count) / jnp.maximum(tokens, 1)
        return Gathered(read, means, tokens > 0)

    def loss(forward: Forward, batch: Batch, context: Context) -> LossOut:
        whole = context.gathered
        chosen = top_share(whole.means, whole.present, keep)[context.rows]
        tokens = documents.spread(chosen.astype(jnp.float32), batch["segment_ids"] - 1) > 0
        own = excess.Excess(*(jnp.take(value, context.rows, axis=0) for value in whole.excess))
        present = whole.present[context.rows]
        shares = {"documents": (jnp.sum(chosen).astype(jnp.float32), jnp.sum(present).astype(jnp.float32))}
        return excess.selected_loss(forward, own, tokens, shares)

    return Objective(loss=loss, fields=excess.FIELDS, frozen=(excess.REFERENCE,), gather=gather)
