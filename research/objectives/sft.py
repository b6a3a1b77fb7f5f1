"""Supervised fine-tuning: next-token prediction on the responses alone."""

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
from research.ranges import Fraction, NotNegative


def make(z_loss: NotNegative = 0.0, label_smoothing: Fraction = 0.0) -> Objective:
    """Cross-entropy of the tokens that the source marked in `loss_mask`: a prompt's response or the assistant's turns,
    their end-of-sequence token included; of answers that are compared the best, of those with a verdict the desirable.
    z_loss and label_smoothing as in next_token."""

    def loss(forward: Forward, batch: Batch, context: Context) -> LossOut:
        targets, weights = next_token_targets(batch, good_answers(batch))
        return token_loss(forward, targets, weights, z_loss=z_loss, label_smoothing=label_smoothing)

    return Objective(loss=loss, fields=("tokens", "segment_ids", "positions", "loss_mask"))
