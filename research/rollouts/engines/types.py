"""What an engine is: it answers prompts with the parameters that it was handed last."""

from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np
from jaxtyping import Bool, Float, Int, UInt

from research.models.sampling import SamplingConfig


class Answers(NamedTuple):
    """n answers to each of some prompts: those to prompt i are rows n i to n i + n - 1.

    Attributes:
      tokens: int32; 0 after the end of an answer.
      lengths: int32, tokens of each answer up to and including the one that ends it.
      log_probs: float32, log of the probability that each token was drawn with, after temperature and truncation; 0
        after the end.
      stopped: whether the answer ended with one of the stop tokens ("stop"); else it was cut off ("length").
      versions: int32, of the parameters that wrote each.
    """

    tokens: Int[np.ndarray, "R N"]
    lengths: Int[np.ndarray, " R"]
    log_probs: Float[np.ndarray, "R N"]
    stopped: Bool[np.ndarray, " R"]
    versions: Int[np.ndarray, " R"]


class Engine(Protocol):
    """Writes answers. All processes of a run call it together, with the same arguments, and get the same answers."""

    def sync(self, params: Any, version: int) -> None:
        """Takes the parameters of the policy, which answers are written with from now on.

        Args:
          params: frozen and trained ones joined. The next update may delete them.
          version: a number that answers carry.
        """

    def generate(
        self, prompts: Sequence[Sequence[int]], n: int, sampling: SamplingConfig, key: UInt[np.ndarray, "2"]
    ) -> Answers:
        """Answers each prompt n times.

        Args:
          prompts: ids, without virtual tokens.
          n: answers to each.
          sampling: how tokens are chosen.
          key: raw random key: the same arguments give the same answers.
        """

    def report(self) -> dict[str, tuple[float, float]]:
        """What is to be reported of the time since this was called last: metric -> (sum, weight)."""
