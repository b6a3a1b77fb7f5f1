"""The best and the worst answer to each prompt as a comparison, for the objective preference (online DPO,
arXiv:2402.04792)."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float

from research.rollouts import advantages, buffer
from research.rollouts.buffer import Arrays
from research.rollouts.collection import Group, Metrics, counted

FIELDS = ("pair", "side")


@dataclasses.dataclass(frozen=True)
class Pairing:
    """Makes rows of groups: of each one, with the better answer in front, as preferences of data lie.

    A group whose answers all get one reward, or of which fewer than two are judged, gives a row of padding.

    Attributes:
      seq_len: T.
      virtual: ids of the tokens in front of each document.
      weights: of the rewards.
      truncated: what becomes of answers that were cut off; see RolloutSpec.
    """

    seq_len: int
    virtual: range
    weights: Float[np.ndarray, " R"]
    truncated: str

    def lay_out(self, groups: Sequence[Group]) -> Arrays:
        """The rows of P groups, as batch fields [P, T]; each prompt leaves room for two of its answers."""
        batch = buffer.empty(len(groups), self.seq_len)
        batch |= {"pair": np.zeros_like(batch["tokens"]), "side": np.full_like(batch["tokens"], -1)}
        rewards = advantages.sum_rewards(counted(groups, self.truncated), self.weights)
        for row, same in enumerate(advantages.agree(rewards)):
            if same:
                continue
            end = 0
            for side, answer in enumerate((np.nanargmax(rewards[row]), np.nanargmin(rewards[row]))):
                first = end
                _, end = buffer.write(batch, row, first, self.virtual, groups[row], int(answer))
                batch["side"][row, first:end] = side
            batch["pair"][row, :end] = 1
        return batch


class NoCredit:
    """In the place of Credit where answers are compared: all that rewards say lies in the rows."""

    def init(self) -> dict[str, Any]:
        """Nothing is remembered from rollout to rollout."""
        return {}

    def __call__(
        self, groups: Sequence[Group], batch: Mapping[str, np.ndarray], carry: dict[str, Any]
    ) -> tuple[Arrays, dict[str, Any], Metrics]:
        """No fields, and nothing to report: the share of groups without a pair is `rollout/agreeing`."""
        return {}, carry, {}
