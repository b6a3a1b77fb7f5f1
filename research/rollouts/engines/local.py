"""The engine that answers with the run's own devices: our jitted decoder, with continuous batching."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jaxtyping import UInt

from research.devices import distributed
from research.errors import InputError
from research.models.generation import Generate, make_generate
from research.models.sampling import SamplingConfig
from research.models.transformer import Model
from research.rollouts.engines.types import Answers


class Local:
    """See engines.types.Engine.

    Args:
      model: the policy.
      vocab_size: of the tokenizer; ids from here on are never sampled.
      prompts: the most prompts of one call. Fewer take as much memory and less time.
      longest: the most tokens of a prompt.
      slots: how many rows are decoded at once; 0: all.
    """

    def __init__(self, model: Model, vocab_size: int, *, prompts: int, longest: int, slots: int = 0):
        self.model, self.vocab_size, self.prompts, self.longest = model, vocab_size, prompts, longest
        self.slots = slots
        self._programs: dict[SamplingConfig, Generate] = {}
        self._params: Any = None
        self._version = -1

    def sync(self, params: Any, version: int) -> None:
        self._params, self._version = params, version

    def generate(
        self, prompts: Sequence[Sequence[int]], n: int, sampling: SamplingConfig, key: UInt[np.ndarray, "2"]
    ) -> Answers:
        """See Engine. Every number n and every sampling compiles once.

        Raises:
          InputError: sampling leaves no room for a prompt, or has a stop token beyond the vocabulary.
        """
        count = len(prompts) * n
        padded, lengths = np.zeros((self.prompts, self.longest), np.int32), np.zeros(self.prompts, np.int32)
        for i, prompt in enumerate(prompts):
            lengths[i], padded[i, self.longest - len(prompt) :] = len(prompt), prompt
        out = self._program(sampling)(self._params, padded, lengths, key, slots=self.slots or None, each=n)
        tokens, lengths, log_probs = (x[:count] for x in jax.device_get(tuple(out)))
        last = np.take_along_axis(tokens, np.maximum(lengths - 1, 0)[:, None], axis=1)[:, 0]
        stopped = (lengths > 0) & np.isin(last, sampling.stop_tokens)
        return Answers(tokens, lengths, log_probs, stopped, np.full(count, self._version, np.int32))

    def report(self) -> dict[str, tuple[float, float]]:
        return {}

    def _program(self, sampling: SamplingConfig) -> Callable[..., Any]:
        if sampling not in self._programs:
            try:
                program = make_generate(self.model, sampling, self.vocab_size, of_draws=True)
            except InputError as error:
                raise InputError(str(error).replace("sampling.", "rollout.", 1)) from error
            self._programs[sampling] = distributed.one_at_a_time(program)
        return self._programs[sampling]
