"""From the rewards of a rollout to what its tokens are trained with."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float

from research.rollouts import advantages, buffer
from research.rollouts.advantages import AdvantageSpec, Facts, RunningMean
from research.rollouts.collection import Group, Metrics, counted

Carry = dict[str, Any]  # what is remembered from rollout to rollout: of JSON types, in every checkpoint


@dataclasses.dataclass(frozen=True)
class Credit:
    """Makes advantages.

    Attributes:
      spec: how.
      weights: of the rewards.
      truncated: what becomes of answers that were cut off; see RolloutSpec.
    """

    spec: AdvantageSpec
    weights: Float[np.ndarray, " R"]
    truncated: str

    def init(self) -> Carry:
        """What is remembered before the first rollout."""
        return {"average": list(RunningMean())}

    def __call__(
        self, groups: Sequence[Group], batch: Mapping[str, np.ndarray], carry: Carry
    ) -> tuple[dict[str, np.ndarray], Carry, Metrics]:
        """The batch fields [N, T] that rewards decide, what is remembered, and what is reported.

        Args:
          groups: P of them, with G answers each.
          batch: fields of their N = P G rows, with those of `scores` that the run has.
          carry: of the rollout before.
        """
        rewards, average = counted(groups, self.truncated), RunningMean(*carry["average"])
        facts = Facts(
            lengths=np.stack([group.lengths for group in groups]).astype(np.float32),
            greedy=advantages.sum_rewards(
                np.stack([group.greedy for group in groups])[:, None], self.weights, self.spec.clip
            )[:, 0],
            average=average.value,
        )
        values = advantages.advantages(self.spec, rewards, self.weights, facts).reshape(-1)
        placed = buffer.at_prediction(values, batch)
        if self.spec.whiten == "tokens":
            mask = buffer.at_prediction(np.ones_like(values), batch)
            placed = np.asarray(advantages.whiten(placed, mask))
        total = advantages.sum_rewards(rewards, self.weights, self.spec.clip)
        return {"advantage": placed}, {"average": list(average.after(total, self.spec.decay))}, {}
