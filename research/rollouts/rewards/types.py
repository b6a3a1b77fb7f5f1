"""What a reward is: a function from an answer to a number."""

from collections.abc import Mapping
from typing import Any, NamedTuple, Protocol

LARGEST = 3e38  # size of a reward or a weight; float32 has no more


class Sample(NamedTuple):
    """One answer to one prompt.

    Attributes:
      record: of the data: `prompt` or `messages`, perhaps `response`, `task`, and whatever fields of its own it has.
      prompt: as the model saw it, special tokens left out.
      answer: what the model wrote, special tokens left out.
      tokens: how many tokens the answer has, the one that ends it included.
      finish: "stop" where the model ended the answer, "length" where it was cut off.
    """

    record: Mapping[str, Any]
    prompt: str
    answer: str
    tokens: int
    finish: str


class Reward(Protocol):
    """Judges an answer: a finite number, or None where it can't be judged, which keeps it out of baselines.

    It runs in worker processes, each of which makes its own from the config. An InputError ends the run; any other
    exception costs the sample. The same sample always gets the same number.
    """

    def __call__(self, sample: Sample) -> float | None: ...
