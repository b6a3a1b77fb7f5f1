"""Next-token prediction on every token of every document."""

from research.objectives.types import Batch, Context, Forward, LossOut, Objective, next_token_targets, token_loss
from research.ranges import Fraction, NotNegative


def make(z_loss: NotNegative = 0.0, label_smoothing: Fraction = 0.0) -> Objective:
    """Cross-entropy of each token given those before it in its document; not of a prefix that the model sees whole.

    Args:
      z_loss: weight of logsumexp(logits)^2, which keeps logits near zero (PaLM, arXiv:2204.02311, section 5).
      label_smoothing: probability mass spread evenly over the vocabulary (arXiv:1512.00567, section 7).
    """

    def loss(forward: Forward, batch: Batch, context: Context) -> LossOut:
        targets, weights = next_token_targets(batch, forward.unseen(batch))
        return token_loss(forward, targets, weights, z_loss=z_loss, label_smoothing=label_smoothing)

    return Objective(loss=loss)
