"""The excess loss of a batch's tokens: what the policy could still learn of them. What objectives that select share."""

from typing import Any, NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from research.objectives.types import Batch, Forward, LossOut, good_answers, next_token_targets
from research.ops.losses import cross_entropy, target_log_probs

REFERENCE = "reference"
FIELDS = ("tokens", "segment_ids", "positions", "loss_mask")


class Excess(NamedTuple):
    """Of each token, without a gradient.

    Attributes:
      targets: [B, T], the token that each position is to predict.
      weights: [B, T], 1 where it is one to be learned, else 0.
      values: [B, T], the policy's -log p(target) less the reference's; 0 where nothing is learned.
    """

    targets: Int[Array, "B T"]
    weights: Float[Array, "B T"]
    values: Float[Array, "B T"]

    @property
    def counted(self) -> Bool[Array, "B T"]:
        return self.weights > 0


def read(forward: Forward, batch: Batch) -> Excess:
    """The excess loss of the tokens that `sft` would learn: of plain text all.

    Raises:
      InputError: one of the two models doesn't predict the next token.
    """
    targets, weights = next_token_targets(batch, good_answers(batch))
    log_p, reference = (
        target_log_probs(forward.hidden(role), forward.next_token_head(role), targets, frozen=True).target
        for role in ("policy", REFERENCE)
    )
    return Excess(targets, weights, jnp.where(weights > 0, reference - log_p, 0))


def selected_loss(
    forward: Forward, excess: Excess, chosen: Bool[Array, "B T"], more: dict[str, tuple[Any, Any]] | None = None
) -> LossOut:
    """Cross-entropy of the chosen tokens, divided by their number.

    Metrics are `nll` of all tokens, whether chosen or not, so that runs that select differently can be compared;
    `selected_nll` and `accuracy` of the chosen; `selected`, their share; `excess` of all and `selected_excess`.
    """
    weights = excess.weights * chosen.astype(jnp.float32)
    out = cross_entropy(forward.hidden(), forward.next_token_head(), excess.targets, weights)
    total, kept = jnp.sum(excess.weights), out.weight_sum
    metrics = {
        "nll": (jnp.sum(jnp.where(excess.counted, out.nll * excess.weights, 0)), total),
        "selected_nll": (out.nll_sum, kept),
        "accuracy": (out.correct_sum, kept),
        "selected": (kept, total),
        "excess": (jnp.sum(excess.values * excess.weights), total),
        "selected_excess": (jnp.sum(excess.values * weights), kept),
    }
    return LossOut(out.loss_sum, kept, metrics | (more or {}), per_token=(out.loss, weights))
