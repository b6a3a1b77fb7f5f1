"""DAPO's soft punishment of answers that are too long (arXiv:2503.14476, equation 13)."""

from research.errors import InputError
from research.ranges import Size
from research.rollouts.rewards import length
from research.rollouts.rewards.types import Reward


def make(longest: Size, margin: Size) -> Reward:
    """0 up to longest - margin tokens, from there falling to -1 at `longest`, and -1 beyond.

    Args:
      longest: L_max of the paper; rollout.max_new_tokens in most runs.
      margin: L_cache: over how many of the last tokens the punishment grows.

    Raises:
      InputError: the margin isn't within the length.
    """
    if margin >= longest:
        raise InputError(f"margin = {margin}: must be below longest = {longest}.")
    return length.make(most=longest - margin, over=margin)
