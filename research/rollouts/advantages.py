"""Advantages: how much better an answer is than what was to be expected.

An advantage is a reward less a baseline, divided by a scale. `KINDS` has a row for each baseline: its function and
where it was published. Rewards of answers are small and live on the host: functions of [P, G] are numpy's, compute in
float64 and return float32. `whiten`, the one function of tokens [B, T], is JAX's and computes in float32.

NaN is the reward of an answer that can't be judged. Such an answer counts in no mean and no deviation, and its
advantage is 0. Where all judged answers of a group have one reward, what is compared with the group is exactly 0.

Axes: P prompts, G answers to each, R rewards, B rows, T tokens.
"""

import dataclasses
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from research import ranges
from research.errors import InputError, did_you_mean
from research.ranges import Fraction, Positive, Real, Share
from research.rollouts.kl_penalty import KlPenalty

SCALES = ("group", "batch", "none")
WHITENINGS = ("none", "answers", "tokens")
COMBINATIONS = ("rewards", "advantages")


@dataclasses.dataclass(frozen=True)
class AdvantageSpec:
    """How advantages are made of rewards: the config's `advantage`.

    Attributes:
      kind: the baseline, of KINDS.
      scale: what the difference is divided by: the standard deviation of its group's rewards, of the batch's, or
        "none".
      whiten: "answers": advantages then get mean 0 and deviation 1 over the batch's answers; "tokens": over its tokens,
        so that a long answer counts for more.
      combine: several rewards are summed by weight before they are compared ("rewards"), or each is compared by itself
        and the results are summed by weight ("advantages"; GDPO, arXiv:2601.05242).
      clip: (least, greatest) of the summed reward; None for none.
      epsilon: what is added to deviations. TRL has 1e-4, verl 1e-6.
      decay: of "ema": the share of itself that the running mean keeps at each rollout.
      gamma: of "critic": what the return loses with each token that it is further off.
      lam: of "critic": lambda of generalized advantage estimation, from 0, which trusts the critic, to 1, which trusts
        the rewards that came.
      kl: the KL to the role `reference` as a part of the reward.
    """

    kind: str = "group"
    scale: str = "group"
    whiten: str = "none"
    combine: str = "rewards"
    clip: tuple[Real, Real] | None = None
    epsilon: Positive = 1e-4
    decay: Fraction = 0.9
    gamma: Share = 1.0
    lam: Share = 0.95
    kl: KlPenalty = KlPenalty()

    def __post_init__(self) -> None:
        ranges.check(self, "advantage")
        for name, known in (("kind", KINDS), ("scale", SCALES), ("whiten", WHITENINGS), ("combine", COMBINATIONS)):
            value = getattr(self, name)
            if value not in known:
                raise InputError(
                    f"advantage.{name} = {value!r}: must be one of {', '.join(known)}.{did_you_mean(value, known)}"
                )
        if self.clip is not None and not (len(self.clip) == 2 and self.clip[0] < self.clip[1]):
            raise InputError(f"advantage.clip = {self.clip}: must be (least, greatest) of a reward, or None.")
        apart = self.combine == "advantages"
        if apart and (self.clip is not None or {"greedy", "average"} & set(KINDS[self.kind].reads)):
            what = f"kind = {self.kind!r}" if self.clip is None else f"clip = {self.clip}"
            raise InputError(
                f"advantage.{what}: is about the summed reward, and combine = 'advantages' sums none. "
                "Leave one of them out."
            )
        self._check_tokens()

    def _check_tokens(self) -> None:
        """Raises InputError where what is of tokens doesn't go together."""
        critic = self.kind == "critic"
        if critic and self.scale == "group":
            raise InputError(
                "advantage.scale = 'group': kind = 'critic' compares tokens with the critic's values, and not with a "
                "group. Set it to 'none', or to 'batch', which divides the tokens' rewards by their deviation."
            )
        for name, value in (("whiten", "answers"), ("combine", "advantages")):
            if critic and getattr(self, name) == value:
                raise InputError(
                    f"advantage.{name} = {value!r}: advantages of kind = 'critic' are of tokens. Leave it out."
                )
        if self.kl.weight and (self.combine == "advantages" or "greedy" in KINDS[self.kind].reads):
            what = "combine = 'advantages'" if self.combine == "advantages" else f"kind = {self.kind!r}"
            raise InputError(
                f"advantage.kl.weight = {self.kl.weight}: is a part of the summed reward of what was sampled, and "
                f"{what} compares others. Leave one of them out."
            )

    def _check_rows(self, rows: int) -> None:
        """Raises InputError where the only answer of a rollout would be compared with itself."""
        alone = {"kind": "batch", "whiten": "answers"} | ({} if self.kind == "critic" else {"scale": "batch"})
        for name, value in alone.items() if rows == 1 else ():
            if getattr(self, name) == value:
                raise InputError(
                    f"advantage.{name} = {value!r}: compares the answers of a rollout, and there is one. Raise "
                    "batch_size or rollout.prompts."
                )

    @property
    def fields(self) -> tuple[str, ...]:
        """The batch fields that advantages are made of, besides rewards."""
        return (("value",) if self.kind == "critic" else ()) + (
            ("old_log_prob", "reference_log_prob") if self.kl.weight else ()
        )

    def check(self, answers: int, rows: int) -> None:
        """Checks what needs the sizes of a rollout, and that each field has an effect.

        Args:
          answers: to each prompt.
          rows: all answers of a rollout.

        Raises:
          InputError: there are too few for the baseline or the scale, or a field has no effect.
        """
        for name in ("gamma", "lam"):
            value = getattr(self, name)
            if value != getattr(AdvantageSpec, name) and self.kind != "critic":
                raise InputError(
                    f"advantage.{name} = {value}: is of kind = 'critic', and kind = {self.kind!r}. Leave it out."
                )
        if self.decay != AdvantageSpec.decay and self.kind != "ema":
            raise InputError(
                f"advantage.decay = {self.decay}: is of kind = 'ema', and kind = {self.kind!r}. Leave it out."
            )
        divided = self.whiten == "answers" or (self.scale != "none" and self.kind != "critic")
        if self.epsilon != AdvantageSpec.epsilon and not divided:
            raise InputError(
                f"advantage.epsilon = {self.epsilon}: is added to the deviation of answers, and with kind = "
                f"{self.kind!r}, scale = {self.scale!r} and whiten = {self.whiten!r} nothing is divided by one. Leave "
                "it out."
            )
        self.kl.check()
        self._check_rows(rows)
        if answers > 1:
            return
        for name, value, small in (
            ("kind", self.kind, KINDS[self.kind].compares),
            ("scale", self.scale, self.scale == "group"),
        ):
            if small:
                raise InputError(
                    f"advantage.{name} = {value!r}: compares the answers to one prompt, and rollout.answers = "
                    f"{answers}. Raise it to 2 or more, or take kind = 'batch' with scale = 'batch' or 'none'."
                )


class Facts(NamedTuple):
    """What a baseline may read besides rewards.

    Attributes:
      lengths: tokens of each answer.
      greedy: the reward of each prompt's greedy answer; NaN where it can't be judged: then the others' advantage is 0.
      average: the running mean of rewards before this batch; 0 before the first.
    """

    lengths: Float[np.ndarray, "P G"] | None = None
    greedy: Float[np.ndarray, " P"] | None = None
    average: float = 0.0


_NO_FACTS = Facts()


@dataclasses.dataclass(frozen=True)
class Kind:
    """A baseline.

    Attributes:
      function: (rewards [P, G], facts) -> baselines [P, G]. Where the reward is NaN its value means nothing.
      source: the paper, and the equation.
      compares: it is of the answers to one prompt, of which there are to be 2 or more.
      reads: the Facts that it reads.
    """

    function: Callable[[Float[np.ndarray, "P G"], Facts], Float[np.ndarray, "P G"]]
    source: str
    compares: bool = False
    reads: tuple[str, ...] = ()


class RunningMean(NamedTuple):
    """A running mean of rewards, with what its weights add up to, so that it is a mean from the first batch on."""

    total: float = 0.0
    weight: float = 0.0

    @property
    def value(self) -> float:
        """The mean; 0 before the first batch."""
        return self.total / self.weight if self.weight else 0.0

    def after(self, rewards: Float[np.ndarray, "*N"], decay: float) -> "RunningMean":
        """The mean that has seen the judged rewards of one more batch."""
        judged = ~np.isnan(rewards)
        if not judged.any():
            return self
        mean = float(np.mean(rewards[judged], dtype=np.float64))
        return RunningMean(decay * self.total + (1 - decay) * mean, decay * self.weight + 1 - decay)


def group(rewards: Float[np.ndarray, "P G"], facts: Facts) -> Float[np.ndarray, "P G"]:
    """The mean of the prompt's answers."""
    return np.broadcast_to(_mean(rewards, 1), rewards.shape)


def leave_one_out(rewards: Float[np.ndarray, "P G"], facts: Facts) -> Float[np.ndarray, "P G"]:
    """The mean of the prompt's other answers. NaN where there is none."""
    judged = ~np.isnan(rewards)
    others = np.sum(judged, axis=1, keepdims=True) - 1
    total = np.sum(np.where(judged, rewards, 0), axis=1, keepdims=True)
    return np.where(others > 0, (total - np.where(judged, rewards, 0)) / np.maximum(others, 1), np.nan)


def batch(rewards: Float[np.ndarray, "P G"], facts: Facts) -> Float[np.ndarray, "P G"]:
    """The mean of all answers."""
    return np.broadcast_to(_mean(rewards, None), rewards.shape)


def ema(rewards: Float[np.ndarray, "P G"], facts: Facts) -> Float[np.ndarray, "P G"]:
    """The running mean of the answers of earlier batches."""
    return np.full_like(rewards, facts.average)


def greedy(rewards: Float[np.ndarray, "P G"], facts: Facts) -> Float[np.ndarray, "P G"]:
    """The reward of the answer that is made of the likeliest tokens."""
    return np.broadcast_to(np.asarray(facts.greedy, np.float64)[:, None], rewards.shape)


def opo(rewards: Float[np.ndarray, "P G"], facts: Facts) -> Float[np.ndarray, "P G"]:
    """The mean of the prompt's answers, each weighed by its length. That has the least variance where the squared norm
    of an answer's gradient grows as its length."""
    weights = np.where(np.isnan(rewards), 0.0, np.asarray(facts.lengths, np.float64))
    total = np.sum(weights, axis=1, keepdims=True)
    mean = np.sum(weights * np.nan_to_num(rewards), axis=1, keepdims=True) / np.maximum(total, 1)
    return np.broadcast_to(np.where(total > 0, mean, _mean(rewards, 1)), rewards.shape)


def none(rewards: Float[np.ndarray, "P G"], facts: Facts) -> Float[np.ndarray, "P G"]:
    """0."""
    return np.zeros_like(rewards)


KINDS: dict[str, Kind] = {
    "group": Kind(
        group,
        "GRPO, arXiv:2402.03300, section 4.1.2; with scale = 'none' Dr. GRPO, arXiv:2503.20783",
        compares=True,
    ),
    "gpg": Kind(
        group,
        "GPG, arXiv:2504.02546: group, times (answers / answers in groups that don't agree)",
        compares=True,
    ),
    "leave_one_out": Kind(leave_one_out, "RLOO, arXiv:2402.14740", compares=True),
    "opo": Kind(opo, "OPO, arXiv:2505.23585", compares=True, reads=("lengths",)),
    "batch": Kind(batch, "REINFORCE++, arXiv:2501.03262, with whitening over answers"),
    "ema": Kind(ema, "reinforcement comparison, Williams 1992, doi:10.1007/BF00992696", reads=("average",)),
    "greedy": Kind(greedy, "ReMax, arXiv:2310.10505", reads=("greedy",)),
    "critic": Kind(none, "PPO, arXiv:1707.06347, with arXiv:1506.02438: the critic's values of tokens; see gae"),
    "none": Kind(none, "REINFORCE, Williams 1992, doi:10.1007/BF00992696, without a baseline"),
}


def sum_rewards(
    rewards: Float[np.ndarray, "P G R"], weights: Float[np.ndarray, " R"], clip: tuple[float, float] | None = None
) -> Float[np.ndarray, "P G"]:
    """The rewards of each answer, summed by weight and clipped, in float32. Those that can't judge it are left out; NaN
    where none can."""
    total = np.sum(np.nan_to_num(np.asarray(rewards, np.float64)) * weights, axis=2)
    total = total if clip is None else np.clip(total, *clip)
    return np.where(np.all(np.isnan(rewards), axis=2), np.nan, total).astype(np.float32)


def agree(rewards: Float[np.ndarray, "P G"]) -> Bool[np.ndarray, " P"]:
    """Whether all judged answers to a prompt have one reward, so that a comparison says nothing; also where fewer than
    two are judged."""
    judged = ~np.isnan(rewards)
    most = np.max(np.where(judged, rewards, -np.inf), axis=1)
    least = np.min(np.where(judged, rewards, np.inf), axis=1)
    return (np.sum(judged, axis=1) < 2) | (most == least)


def advantages(
    spec: AdvantageSpec,
    rewards: Float[np.ndarray, "P G R"],
    weights: Float[np.ndarray, " R"],
    facts: Facts = _NO_FACTS,
) -> Float[np.ndarray, "P G"]:
    """The advantage of each answer, in float32: never NaN, 0 where it can't be judged.

    Args:
      spec: see AdvantageSpec. Whitening over tokens is `whiten`, and isn't done here.
      rewards: each reward's judgement of each answer to each prompt; NaN where it has none.
      weights: of the rewards.
      facts: what spec.kind reads.
    """
    if spec.combine == "rewards":
        values = of_reward(spec, sum_rewards(rewards, weights, spec.clip), facts)
    else:
        each = [of_reward(spec, rewards[:, :, r], facts) for r in range(rewards.shape[2])]
        values = np.sum(np.nan_to_num(np.stack(each, axis=2)) * np.asarray(weights, np.float64), axis=2)
        values = np.where(np.all(np.isnan(rewards), axis=2), np.nan, values)
    if spec.whiten == "answers":
        values = (values - _mean(values, None)) / (_deviation(values, None) + spec.epsilon)
    return np.nan_to_num(values).astype(np.float32)


def of_reward(spec: AdvantageSpec, rewards: Float[np.ndarray, "P G"], facts: Facts) -> Float[np.ndarray, "P G"]:
    """(reward - baseline) / scale of one reward, in float64; NaN where there is no reward or no baseline."""
    kind, rewards = KINDS[spec.kind], np.asarray(rewards, np.float64)
    values = rewards - kind.function(rewards, facts)
    same = agree(rewards)[:, None]
    if kind.compares:  # exact, where rounding of the mean would be divided by next to nothing
        values = np.where(same & ~np.isnan(values), 0.0, values)
    if spec.kind == "gpg":
        judged = ~np.isnan(rewards)
        values = values * (np.sum(judged) / max(np.sum(judged & ~same), 1))
    return values / divisors(spec, rewards)


def divisors(spec: AdvantageSpec, rewards: Float[np.ndarray, "P G"]) -> Float[np.ndarray, "P G"]:
    """What spec.scale divides the differences of each answer by: 1 where all that it is of have one reward, whose
    deviation, 0, is no scale."""
    if spec.scale == "none":
        return np.ones(rewards.shape)
    each = np.asarray(rewards, np.float64).reshape((-1, rewards.shape[1]) if spec.scale == "group" else (1, -1))
    values = np.where(agree(each)[:, None], 1.0, _deviation(each, 1) + spec.epsilon)
    return np.broadcast_to(values, rewards.shape)


def whiten(
    values: Float[Array, "B T"], mask: Float[Array, "B T"], *, shift: bool = True, epsilon: float = 1e-8
) -> Float[Array, "B T"]:
    """(values - mean) / sqrt(unbiased variance + epsilon) over the tokens of `mask`; 0 at all others.

    Args:
      values: of each token.
      mask: 1 at those that count, else 0. With none or one there is nothing to whiten, and the result is 0.
      shift: whether the mean is subtracted; PPO's rewards keep it.
      epsilon: added to the variance, as in verl's masked_whiten.
    """
    count = jnp.sum(mask)
    mean = jnp.sum(mask * values) / jnp.maximum(count, 1)
    centred = jnp.where(mask > 0, values - mean, 0)
    variance = jnp.sum(jnp.square(centred)) / jnp.maximum(count - 1, 1)
    scaled = centred * jax.lax.rsqrt(variance + epsilon)
    return scaled if shift else jnp.where(mask > 0, scaled + mean, 0)


def _mean(values: Float[np.ndarray, "P G"], axis: int | None) -> Float[np.ndarray, "..."]:
    """The mean of what is no NaN, with the axis kept; NaN where there is nothing."""
    judged = ~np.isnan(values)
    count = np.sum(judged, axis=axis, keepdims=True)
    total = np.sum(np.where(judged, values, 0), axis=axis, keepdims=True)
    return np.where(count > 0, total / np.maximum(count, 1), np.nan)


def _deviation(values: Float[np.ndarray, "P G"], axis: int | None) -> Float[np.ndarray, "..."]:
    """The unbiased standard deviation of what is no NaN, with the axis kept; 0 where there are fewer than two."""
    judged = ~np.isnan(values)
    squares = np.where(judged, np.square(values - _mean(values, axis)), 0)
    count = np.sum(judged, axis=axis, keepdims=True)
    return np.sqrt(np.sum(squares, axis=axis, keepdims=True) / np.maximum(count - 1, 1))
