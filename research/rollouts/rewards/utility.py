"""The planted utility of an answer to a generated preference's prompt: the truth that reward models learn a part of.

With a weight of 0 it only reports what a policy that learns from a reward model has truly gained.
"""

from research.rollouts.rewards.types import Reward, Sample
from research.sources import verification


def make() -> Reward:
    """Judges answers to prompts of data.path = "preferences:..."; see sources.preferences."""
    return utility


def utility(sample: Sample) -> float | None:
    """From -2 to 3; None where the record has no planted utility."""
    return verification.utility(sample.record, sample.answer)
