"""Small logits of routers."""

import jax.numpy as jnp

from research.objectives.load_balance import check_all_sources
from research.objectives.types import Batch, Context, Forward, LossOut, Objective


def make() -> Objective:
    """The mean over tokens and layers of logsumexp(router's logits)^2, which keeps the logits of the policy's routers
    near 0, where their softmax is exact (ST-MoE, arXiv:2202.08906, equation 5). All tokens count but padding."""

    def loss(forward: Forward, batch: Batch, context: Context) -> LossOut:
        check_all_sources(forward, batch)
        routing = forward.routing()
        return LossOut(jnp.sum(jnp.mean(routing.squares, axis=0)), jnp.sum(routing.tokens[0]), {})

    return Objective(loss=loss, bits_per_byte=False)
