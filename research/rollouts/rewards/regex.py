"""1 for an answer in which a regular expression is found, else 0.

Some expressions take for ever with some texts: an answer is then not judged, after the entry's `seconds`.
"""

import dataclasses
import re

from research.errors import InputError
from research.rollouts.rewards.types import Reward, Sample


def make(pattern: str, whole: bool = False) -> Reward:
    """Looks for `pattern`, a regular expression of Python, in which `.` is any character but the end of a line.

    Args:
      pattern: it may begin with flags, as in "(?s)" for a `.` that is any character.
      whole: all of the answer must match, white space around it aside.

    Raises:
      InputError: it is no regular expression.
    """
    try:
        return Regex(re.compile(pattern), whole)
    except (re.error, RecursionError, OverflowError) as error:
        raise InputError(f"pattern = {pattern!r}: is no regular expression ({error}).") from error


@dataclasses.dataclass(frozen=True)
class Regex:
    """The attributes are the options of `make`, the pattern compiled."""

    pattern: re.Pattern[str]
    whole: bool

    def __call__(self, sample: Sample) -> float:
        if self.whole:
            return float(self.pattern.fullmatch(sample.answer.strip()) is not None)
        return float(self.pattern.search(sample.answer) is not None)
