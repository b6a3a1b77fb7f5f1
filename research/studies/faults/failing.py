"""A reward that fails on every answer, to be planted."""

from research.rollouts.rewards.types import Reward, Sample


def make() -> Reward:
    """The reward."""

    def reward(sample: Sample) -> float | None:
        raise ValueError(f"the answer {sample.text!r} can't be judged")

    return reward
