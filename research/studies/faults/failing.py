"""A reward that fails on every answer, to be planted."""

from research.rollouts.rewards.types import Sample


def judge(sample: Sample) -> float | None:
    """Raises ValueError whatever the answer."""
    raise ValueError(f"the answer {sample.answer!r} can't be judged")
