"""From the rewards of a rollout to what its tokens are trained with."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float

from research.rollouts import advantages, buffer, gae
from research.rollouts.advantages import AdvantageSpec, Facts, RunningMean
from research.rollouts.collection import Group, Metrics, counted
from research.rollouts.kl_penalty import log_ratios

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
        return {"average": list(RunningMean()), "kl_weight": self.spec.kl.weight}

    def __call__(
        self, groups: Sequence[Group], batch: Mapping[str, np.ndarray], carry: Carry
    ) -> tuple[dict[str, np.ndarray], Carry, Metrics]:
        """The batch fields [N, T] that rewards decide, what is remembered, and what is reported.

        Args:
          groups: P of them, with G answers each.
          batch: fields of their N = P G rows, with those of `scores` that the run has.
          carry: of the rollout before.
        """
        average = RunningMean(*carry["average"])
        weight = carry["kl_weight"] if self.spec.kl.target else self.spec.kl.weight  # which may be another by now
        mask = buffer.predicting(batch)
        kl, metrics = self._kl(batch, mask)
        rewards = counted(groups, self.truncated)
        total = advantages.sum_rewards(rewards, self.weights, self.spec.clip)
        if self.spec.kind == "critic":
            fields, more = self._by_critic(total.reshape(-1), weight * kl, batch, mask)
            metrics |= more
        elif self.spec.kl.weight and self.spec.kind == "none" and self.spec.whiten != "answers":
            fields = self._by_returns(total, weight * kl, mask)
        else:
            if self.spec.kl.weight:
                total -= (weight * kl.sum(axis=1)).reshape(total.shape).astype(np.float32)
            fields = self._by_baseline(groups, total, average, batch)
        if self.spec.whiten == "tokens":
            judged = (mask * ~np.isnan(total).reshape(-1, 1)).astype(np.float32)
            fields["advantage"] = np.asarray(advantages.whiten(fields["advantage"], judged))
        carry = {"average": list(average.after(total, self.spec.decay)), "kl_weight": weight}
        if self.spec.kl.weight:
            metrics["rollout/kl_weight"] = (weight, 1.0)
            carry["kl_weight"] = self.spec.kl.next_weight(weight, metrics["rollout/kl"][0] / len(mask), len(mask))
        return fields, carry, metrics

    def _kl(self, batch: Mapping[str, np.ndarray], mask: Float[np.ndarray, "N T"]) -> tuple[np.ndarray, Metrics]:
        """The estimated KL of each token to the reference, 0 where the reward has none of it; and of an answer, where
        there is a reference."""
        if "reference_log_prob" not in batch:
            return np.zeros_like(mask), {}
        pair = batch.get("old_log_prob", batch.get("sampler_log_prob")), batch["reference_log_prob"]
        metrics = {"rollout/kl": (float(log_ratios(*pair, mask).sum()), float(len(mask)))}
        return self.spec.kl.estimates(*pair, mask) if self.spec.kl.weight else np.zeros_like(mask), metrics

    def _by_baseline(
        self,
        groups: Sequence[Group],
        total: Float[np.ndarray, "P G"],
        average: RunningMean,
        batch: Mapping[str, np.ndarray],
    ) -> dict[str, np.ndarray]:
        """Advantages of answers."""
        facts = Facts(
            lengths=np.stack([group.lengths for group in groups]).astype(np.float32),
            greedy=advantages.sum_rewards(
                np.stack([group.greedy for group in groups])[:, None], self.weights, self.spec.clip
            )[:, 0],
            average=average.value,
        )
        if self.spec.combine == "rewards":  # summed already, with what the KL takes
            spec = dataclasses.replace(self.spec, clip=None)
            values = advantages.advantages(spec, total[:, :, None], np.ones(1), facts)
        else:
            values = advantages.advantages(self.spec, counted(groups, self.truncated), self.weights, facts)
        return {"advantage": buffer.at_prediction(values.reshape(-1), batch)}

    def _by_returns(
        self, total: Float[np.ndarray, "P G"], penalties: Float[np.ndarray, "N T"], mask: Float[np.ndarray, "N T"]
    ) -> dict[str, np.ndarray]:
        """Advantages of tokens without a baseline: what comes of each, without the KL of those before it, which it
        hasn't changed (REINFORCE++, arXiv:2501.03262, equation 8)."""
        scores = total.reshape(-1)
        judged = mask * ~np.isnan(scores)[:, None]
        rewards = gae.token_rewards(scores, penalties, judged)
        each, _ = gae.gae(rewards, np.zeros_like(rewards), judged, gamma=1.0, lam=1.0)
        scale = advantages.divisors(self.spec, total).reshape(-1, 1)
        return {"advantage": (each / scale).astype(np.float32)}

    def _by_critic(
        self,
        scores: Float[np.ndarray, " N"],
        penalties: Float[np.ndarray, "N T"],
        batch: Mapping[str, np.ndarray],
        mask: Float[np.ndarray, "N T"],
    ) -> tuple[dict[str, np.ndarray], Metrics]:
        """Advantages and returns of tokens. From answers that can't be judged the critic learns nothing."""
        values = batch["value"]
        judged = mask * ~np.isnan(scores)[:, None]
        rewards = gae.token_rewards(scores, penalties, judged)
        if self.spec.scale == "batch":
            rewards = np.asarray(advantages.whiten(*(x.astype(np.float32) for x in (rewards, judged)), shift=False))
        each, returns = gae.gae(rewards, values, judged, gamma=self.spec.gamma, lam=self.spec.lam)
        explained = gae.explained_variance(values, returns, judged)
        metrics = {} if np.isnan(explained) else {"rollout/explained_variance": (explained, 1.0)}
        returns = np.where(judged > 0, returns, np.where(mask > 0, values, 0))
        return {"advantage": each.astype(np.float32), "returns": returns.astype(np.float32)}, metrics
