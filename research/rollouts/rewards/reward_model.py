"""The reward of a reward model in a role of the run, or of an ensemble: its head has a number for each member.

It is read at the answer's last token, as training a reward model does. No process judges it: the run's own devices do
(rollouts/model_rewards.py).
"""

import dataclasses

import numpy as np
from jaxtyping import Float

from research.errors import InputError, did_you_mean
from research.ranges import NotNegative

COMBINE = ("mean", "min", "variance")


def make(role: str = "reward", combine: str = "mean", penalty: NotNegative = 0.0) -> "ModelReward":
    """Reads a role, of which nothing is trained.

    Args:
      role: of config.roles, a model with num_labels of at least 1.
      combine: of an ensemble's rewards, "mean"; "min", the worst of them; or "variance", their mean less `penalty`
        times their variance. The last two are pessimistic: WCO and UWO of arXiv:2310.02743, section 3.
      penalty: see `combine`.

    Raises:
      InputError: there is no such way, or the penalty has no effect.
    """
    if combine not in COMBINE:
        raise InputError(f"combine = {combine!r}: no such way.{did_you_mean(combine, COMBINE)}")
    if (combine == "variance") != (penalty > 0):
        raise InputError(f"penalty = {penalty}: goes with combine = 'variance'. Set both, or neither.")
    return ModelReward(role, combine, penalty)


@dataclasses.dataclass(frozen=True)
class ModelReward:
    """The attributes are the options of `make`."""

    role: str
    combine: str
    penalty: float

    def combined(self, members: Float[np.ndarray, "N M"]) -> Float[np.ndarray, " N"]:
        """One reward of those of the members."""
        if self.combine == "min":
            return members.min(axis=1)
        return members.mean(axis=1) - self.penalty * members.var(axis=1)
