"""Next-token prediction on sources that a bandit draws: those that are hard to predict come more often."""

from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp

from research.errors import InputError
from research.objectives.types import (
    Batch,
    Context,
    Forward,
    LossOut,
    Objective,
    good_answers,
    next_token_targets,
    token_loss,
)
from research.ops.domains import Arms, by_source, first_arms, next_arms
from research.ranges import Fraction


def make(names: Sequence[str] = (), smoothing: Fraction = 0.9) -> Objective:
    """Cross-entropy of the tokens that sft learns, on batches whose rows are drawn from data.sources with chances that
    EXP3 learns from their losses; see ops.domains.next_arms. The metrics `weight/NAME` say how probable each source is.

    The host waits for each step before it draws the next batch.

    Args:
      names: of data.sources, each of which has a weight, that isn't looked at: at first all are as likely.
      smoothing: how much of a running mean of rewards a step keeps, in [0, 1).
    """
    if len(names) < 2 or len(set(names)) < len(names):
        raise InputError(f"names = {list(names)}: names the sources of data.sources, two or more, each once.")
    order = tuple(sorted(names))

    def loss(forward: Forward, batch: Batch, context: Context) -> LossOut:
        targets, weights = next_token_targets(batch, good_answers(batch))
        out = token_loss(forward, targets, weights, z_loss=0.0, label_smoothing=0.0)
        values = jax.lax.stop_gradient(jnp.where(weights > 0, out.per_token[0] * weights, 0))
        sums = tuple(jnp.sum(by_source(x, batch["source"], len(order)), axis=0) for x in (values, weights))
        one = jnp.ones((), jnp.float32)
        chances = {f"weight/{name}": (context.carry.weights[i], one) for i, name in enumerate(order)}
        return out._replace(metrics=out.metrics | chances, statistics=sums)

    def init_carry(batch: Mapping[str, jax.ShapeDtypeStruct]) -> Arms:
        del batch
        return first_arms(len(order))

    return Objective(
        loss=loss,
        fields=("tokens", "segment_ids", "positions", "loss_mask", "source"),
        init_carry=init_carry,
        update=lambda carry, sums: next_arms(carry, *sums, smoothing=smoothing),
        sources=order,
        chances=lambda carry: carry.weights,
    )
