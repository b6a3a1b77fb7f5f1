"""1 for an answer that consists of the tags asked for, such as <think>...</think><answer>...</answer>, else 0."""

import dataclasses
from collections.abc import Sequence

from research.errors import InputError
from research.rollouts.rewards import texts
from research.rollouts.rewards.types import Reward, Sample


def make(tags: Sequence[str] = ("think", "answer"), rest: bool = False) -> Reward:
    """Asks that each tag opens and closes once, in this order, one after the other (arXiv:2501.12948, section 2.2.2).

    Args:
      tags: their names.
      rest: whether other text may stand before, between and after them; white space always may.

    Raises:
      InputError: there is no tag, or one is there twice.
    """
    for tag in tags:
        texts.check_tag("tags", tag)
    if not tags or "" in tags or len(set(tags)) < len(tags):
        raise InputError(f"tags = {tuple(tags)}: names of different tags, at least one.")
    return Format(tuple(tags), rest)


@dataclasses.dataclass(frozen=True)
class Format:
    """The attributes are the options of `make`."""

    tags: tuple[str, ...]
    rest: bool

    def __call__(self, sample: Sample) -> float:
        return float(self._follows(sample.answer))

    def _follows(self, text: str) -> bool:
        marks = [mark for tag in self.tags for mark in (f"<{tag}>", f"</{tag}>")]
        if any(text.count(mark) != 1 for mark in marks):
            return False
        for number, mark in enumerate(marks):
            before, present, text = text.partition(mark)
            if not present or (number % 2 == 0 and before.strip() and not self.rest):
                return False
        return self.rest or not text.strip()
