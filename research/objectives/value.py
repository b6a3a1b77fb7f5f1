"""A critic: learns the returns of answers, from which advantages are made (generalized advantage estimation)."""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from research.errors import InputError
from research.objectives.classes import class_logits
from research.objectives.types import Batch, Context, Forward, LossOut, Objective, next_token_targets
from research.ranges import Positive


def make(clip: Positive | None = 0.2, trunk: bool = True) -> Objective:
    """Half the squared error of the critic's values, a mean over the answers' tokens. A value is the one number of the
    critic's head (roles.critic.num_labels = 1) at the position that predicts the token.

    Args:
      clip: the larger error counts of the value and the value held within this of the one that the critic had when the
        answers were written, as in PPO; None for no bounds.
      trunk: of a critic that is a head on the policy's trunk: whether its loss moves the trunk too.
    """
    return Value(clip, trunk).objective()


def value_losses(
    values: Float[Array, "B T"], old: Float[Array, "B T"], returns: Float[Array, "B T"], clip: float | None
) -> tuple[Float[Array, "B T"], Float[Array, "B T"]]:
    """Half the squared error of each value, and 1 where that of the clipped value is the larger and so counts
    (arXiv:1707.06347's authors' code; TRL's and verl's PPO)."""
    error = jnp.square(values - returns)
    if clip is None:
        return error / 2, jnp.zeros_like(error)
    bounded = jnp.square(jnp.clip(values, old - clip, old + clip) - returns)
    return jnp.maximum(error, bounded) / 2, (bounded > error).astype(error.dtype)


def critic_values(forward: Forward, trunk: bool = True) -> Float[Array, "B T"]:
    """The critic's values of what stands at each position and before it: at t that of the choice of token t + 1.

    Args:
      forward: the models on the batch.
      trunk: whether a gradient goes on into the hidden states.

    Raises:
      InputError: the role's head predicts tokens, or gives several numbers.
    """
    labels = forward.models["critic"].config.num_labels
    if labels != 1:
        raise InputError(f"roles.critic.num_labels = {labels}: a value is one number. Set it to 1.")
    if trunk:
        return class_logits(forward, role="critic")[..., 0]
    return forward.head("critic").logits(jax.lax.stop_gradient(forward.hidden("critic")))[..., 0]


@dataclasses.dataclass(frozen=True)
class Value:
    """The loss of a critic. The attributes are the options of `make`."""

    clip: float | None
    trunk: bool

    def objective(self) -> Objective:
        """This as an objective."""
        return Objective(
            loss=self.loss,
            fields=("tokens", "segment_ids", "positions", "loss_mask", "value", "returns"),
            trainable=("critic",),
            gather=self.gather,
            bits_per_byte=False,
        )

    def gather(self, forward: Forward, batch: Batch) -> tuple[Float[Array, " B"], Float[Array, " B"]]:
        """The sum of each row's returns, and of how many tokens."""
        weights = next_token_targets(batch, batch["loss_mask"])[1]
        return jnp.sum(batch["returns"] * weights, axis=1), jnp.sum(weights, axis=1)

    def loss(self, forward: Forward, batch: Batch, context: Context) -> LossOut:
        """The loss, and as metrics `explained_variance` (1 - mean squared error / variance of the whole batch's
        returns), `clipped`, the share of tokens whose value was held, and the means `value` and `returns`."""
        weights = next_token_targets(batch, batch["loss_mask"])[1]
        old, returns = batch["value"], batch["returns"]
        values = critic_values(forward, self.trunk).astype(jnp.float32)
        losses, held = value_losses(values, old, returns, self.clip)
        weight, sums, counts = jnp.sum(weights), *context.gathered
        mean = jnp.sum(sums) / jnp.maximum(jnp.sum(counts), 1)
        spread = jnp.sum(weights * jnp.square(returns - mean))
        error = jnp.sum(weights * jnp.square(values - returns))
        metrics = {
            "explained_variance": (spread - error, spread),
            "clipped": (jnp.sum(weights * held), weight),
            "value": (jnp.sum(weights * values), weight),
            "returns": (jnp.sum(weights * returns), weight),
        }
        return LossOut(jnp.sum(weights * losses), weight, metrics, per_token=(losses, weights))
