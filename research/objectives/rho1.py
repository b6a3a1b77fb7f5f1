"""Selective language modelling: of each batch the tokens that the policy could still learn, by a reference model."""

import jax.numpy as jnp

from research.objectives import excess
from research.objectives.types import Batch, Context, Forward, LossOut, Objective
from research.ops.top_share import top_share
from research.ranges import Part


def make(keep: Part = 0.6) -> Objective:
    """Cross-entropy of the share `keep` of the batch's tokens whose excess loss is the highest (Rho-1,
    arXiv:2404.07965, equations 3 to 5): the policy's loss less that of the role `reference`, a model of good data.

    The threshold is that of the whole batch, however it is cut. What counts is what sft learns: of plain text all.

    Args:
      keep: k, in (0, 1]; 1 is ordinary training.
    """

    def gather(forward: Forward, batch: Batch) -> excess.Excess:
        return excess.read(forward, batch)

    def loss(forward: Forward, batch: Batch, context: Context) -> LossOut:
        del batch
        chosen = top_share(context.gathered.values, context.gathered.counted, keep)[context.rows]
        own = excess.Excess(*(jnp.take(value, context.rows, axis=0) for value in context.gathered))
        return excess.selected_loss(forward, own, chosen)

    return Objective(loss=loss, fields=excess.FIELDS, frozen=(excess.REFERENCE,), gather=gather)
