"""The KL to a reference as a part of the reward, and the controller of its weight."""

import dataclasses

import numpy as np
from jaxtyping import Float

from research import ranges
from research.errors import InputError, did_you_mean
from research.ops.policy_losses import kl_estimate
from research.ranges import NotNegative, Size

ESTIMATORS = ("k1", "k2", "k3")
_MOST_LOG_RATIO = 20.0  # e^20 is far beyond any use, and squared still finite in float32
_MOST_CHANGE = 0.2


@dataclasses.dataclass(frozen=True)
class KlPenalty:
    """What a token's reward is lowered by where the policy has left the reference.

    Attributes:
      weight: of the KL in the reward, or where it begins; 0 for none.
      estimator: of log p - log p_ref = d at the sampled tokens, as in joschu.net/blog/kl-approx.html: "k1" is d, "k2"
        d^2 / 2, "k3" e^-d - 1 + d. Only k1 gives the gradient of KL(policy || reference), since the reward is a
        constant: docs/rl.md has what the others give.
      clip: each token's estimate is held within -clip and clip; 0 for no bounds.
      target: the controller steers to this KL of an answer, in nats, summed over its tokens; 0 keeps the weight.
      horizon: answers in which the controller changes the weight by its part of the error (arXiv:1909.08593, section
        2.2, whose K is answers / horizon).
    """

    weight: NotNegative = 0.0
    estimator: str = "k1"
    clip: NotNegative = 0.0
    target: NotNegative = 0.0
    horizon: Size = 10_000

    def __post_init__(self) -> None:
        where = "advantage.kl"
        if self.estimator not in ESTIMATORS:
            known = did_you_mean(self.estimator, ESTIMATORS)
            raise InputError(f"{where}.estimator = {self.estimator!r}: must be one of {', '.join(ESTIMATORS)}.{known}")
        ranges.check(self, where)

    def check(self) -> None:
        """Raises InputError where a field has no effect."""
        where = "advantage.kl"
        for field in () if self.weight else dataclasses.fields(self):
            if getattr(self, field.name) != field.default:
                value = getattr(self, field.name)
                raise InputError(f"{where}.{field.name} = {value!r}: has no effect with {where}.weight = 0. Set that.")
        if self.horizon != KlPenalty.horizon and not self.target:
            raise InputError(f"{where}.horizon = {self.horizon}: is the controller's. Set {where}.target, too.")

    def estimates(
        self, log_probs: Float[np.ndarray, "N T"], reference: Float[np.ndarray, "N T"], mask: Float[np.ndarray, "N T"]
    ) -> Float[np.ndarray, "N T"]:
        """The estimated KL at each token of the mask, to be multiplied by the weight; 0 elsewhere."""
        values = kl_estimate(self.estimator, log_ratios(log_probs, reference, mask), _bounded_exp)
        return np.clip(values, -self.clip, self.clip) if self.clip else values

    def next_weight(self, weight: float, kl: float, answers: int) -> float:
        """The weight after a rollout of so many answers, in which it was `weight` and the mean KL of an answer `kl`:
        weight (1 + clip(kl / target - 1, -0.2, 0.2) answers / horizon); without a target the same."""
        if not self.target:
            return weight
        error = min(max(kl / self.target - 1, -_MOST_CHANGE), _MOST_CHANGE)
        return weight * max(1 + error * answers / self.horizon, 0.0)


def log_ratios(
    log_probs: Float[np.ndarray, "N T"], reference: Float[np.ndarray, "N T"], mask: Float[np.ndarray, "N T"]
) -> Float[np.ndarray, "N T"]:
    """log p - log p_ref at each token of the mask, whose sum over an answer has KL(policy || reference) as its mean; 0
    elsewhere."""
    return np.where(mask > 0, np.asarray(log_probs, np.float64) - reference, 0.0)


def _bounded_exp(x: Float[np.ndarray, "N T"]) -> Float[np.ndarray, "N T"]:
    return np.exp(np.minimum(x, _MOST_LOG_RATIO))
