"""1 for an answer whose last number is the right one, else 0."""

import dataclasses
import decimal

from research.ranges import NotNegative
from research.rollouts.rewards import texts
from research.rollouts.rewards.types import Reward, Sample
from research.sources.verification import last_number


def make(tolerance: NotNegative = 0.0, within: str = "") -> Reward:
    """Compares the last number of the answer with that of the record's response: "It is 1,234.50." has 1234.5.

    Args:
      tolerance: how far off it may be, as a share of the right number.
      within: only what stands in the last <within>...</within> of the answer counts; without that it is wrong.

    Raises:
      InputError: an option that can't be used.
    """
    texts.check_tag("within", within)
    return NumberMatch(tolerance, within)


@dataclasses.dataclass(frozen=True)
class NumberMatch:
    """The attributes are the options of `make`."""

    tolerance: float
    within: str

    def __call__(self, sample: Sample) -> float | None:
        """None where the record has no number."""
        right = last_number(texts.response(sample.record) or "")
        if right is None:
            return None
        number = last_number(texts.between(sample.answer, self.within) or "")
        if number is None:
            return 0.0
        return float(abs(number - right) <= decimal.Decimal(self.tolerance) * abs(right))
