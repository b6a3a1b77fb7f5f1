"""0 for an answer of a length that is wanted, and less the further it is from that, down to -1."""

import dataclasses

from research.errors import InputError, did_you_mean
from research.ranges import Count
from research.rollouts.rewards.types import Reward, Sample

UNITS = ("tokens", "characters", "words")


def make(least: Count = 0, most: Count = 0, over: Count = 0, unit: str = "tokens") -> Reward:
    """-min(1, d / over), where an answer is d too short or too long; -1 for any d above 0 where `over` is 0.

    With least = most it is how near the answer comes to one length (arXiv:2503.04697, equation 1, bounded). The soft
    punishment of DAPO is most = L_max - L_cache and over = L_cache: see overlong.

    Args:
      least, most: the lengths that are wanted; most = 0 has no bound.
      over: by how much an answer is off that gets -1.
      unit: what is counted: "tokens" (the one that ends the answer included), "characters" or "words".

    Raises:
      InputError: an option that can't be used, or there is no bound.
    """
    if unit not in UNITS:
        raise InputError(f"unit = {unit!r}: no such unit.{did_you_mean(unit, UNITS)}")
    if not least and not most:
        raise InputError("most = 0: says nothing beside least = 0. Set either.")
    if most and most < least:
        raise InputError(f"most = {most}: is less than least = {least}. Change either.")
    return Length(least, most, over, unit)


@dataclasses.dataclass(frozen=True)
class Length:
    """The attributes are the options of `make`."""

    least: int
    most: int
    over: int
    unit: str

    def __call__(self, sample: Sample) -> float:
        sizes = {"tokens": sample.tokens, "characters": len(sample.answer), "words": len(sample.answer.split())}
        size = sizes[self.unit]
        off = max(self.least - size, size - self.most if self.most else 0, 0)
        return -min(1.0, off / self.over) if off and self.over else -float(off > 0)
