"""What a reward is: a function from answers to numbers."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, Protocol


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
    """Judges answers. It may hold what it likes; it is pickled into the worker processes that run it.

    A number for each sample, in their order; None where the sample can't be judged, which keeps it out of baselines.
    """

    def __call__(self, samples: Sequence[Sample]) -> Sequence[float | None]: ...
