"""An objective of the tests: the policy learns the next token, and a role `value` how far it is from the row's end."""

import jax
import jax.numpy as jnp

from research.objectives.types import LossOut, Objective, next_token_targets, token_loss


def make(train_policy: bool = True, reference: bool = False) -> Objective:
    """The mean of both losses; with `reference` also the squared distance from that role's hidden states."""

    def loss(forward, batch, context):
        del context
        targets, weights = next_token_targets(batch)
        out = token_loss(forward, targets, weights, z_loss=0.0, label_smoothing=0.0)
        head = forward.head("value")
        values = forward.hidden("value").astype(jnp.float32) @ head.kernel[:, :1].astype(jnp.float32)
        distance = jnp.square(values[:, :, 0] - batch["positions"].astype(jnp.float32) / 16)
        total = out.loss_sum * (1.0 if train_policy else 0.0) + jnp.sum(distance * weights)
        metrics = {**out.metrics, "distance": (jnp.sum(distance * weights), out.weight)}
        if reference:
            gap = forward.hidden() - jax.lax.stop_gradient(forward.hidden("reference"))
            gap = jnp.sum(jnp.square(gap.astype(jnp.float32)), axis=-1)
            total += jnp.sum(gap * weights)
            metrics["gap"] = (jnp.sum(gap * weights), out.weight)
        return LossOut(total, out.weight, metrics)

    return Objective(
        loss,
        trainable=("policy", "value") if train_policy else ("value",),
        frozen=(*(() if train_policy else ("policy",)), *(("reference",) if reference else ())),
    )
