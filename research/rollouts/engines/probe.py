"""What a server is to say after one prompt, by our own model: it is asked before it is trusted."""

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from research.devices import distributed, sharding
from research.models import sampling as sampling_lib
from research.models.sampling import SamplingConfig
from research.models.transformer import Model

SHOWN = 5  # of the likeliest tokens, which are compared
WARNED = 0.02  # the mean difference of log-probabilities, in nats, from which on a line says so
REFUSED = 0.2  # and from which on the server isn't used
_LONGEST = 64  # tokens of the prompt
_LEAST = -50.0  # log-probabilities below this are compared as this


@dataclasses.dataclass(frozen=True, eq=False)
class Probe:
    """The log-probabilities of the token after a prompt.

    Attributes:
      model: our own.
      vocab_size: of the tokenizer.
      sampling: of the run.
      prompt: ids; the first of them, where there are many.
    """

    model: Model
    vocab_size: int
    sampling: SamplingConfig
    prompt: tuple[int, ...]

    def expected(self, params: Any) -> Float[np.ndarray, " V"]:
        """Log-probabilities of all ids, as answers are drawn. Every process calls it."""
        log_probs, ids = jax.device_get(self._program(params))
        values = np.full(self.model.config.vocab_size, -np.inf, np.float32)
        values[ids] = log_probs
        return values

    @functools.cached_property
    def _program(self) -> Callable[[Any], Any]:
        rows = max(1, sharding.axis_parts("batch", self.model.rules))
        size = _LONGEST * max(1, sharding.axis_parts("time", self.model.rules))
        ids = np.zeros((rows, size), np.int32)
        real = np.zeros((rows, size), np.int32)
        ids[:, : len(self.prompt)], real[:, : len(self.prompt)] = self.prompt, 1
        batch = {"tokens": ids, "segment_ids": real, "positions": np.arange(size, dtype=np.int32)[None] * real}
        return distributed.one_at_a_time(jax.jit(functools.partial(self._next, batch=batch)))

    def _next(self, params: Any, batch: Mapping[str, np.ndarray]) -> tuple[Float[Array, " C"], Int[Array, " C"]]:
        arrays = {name: jnp.asarray(x) for name, x in batch.items()}
        hidden = self.model.hidden(params, arrays)[:, len(self.prompt) - 1]
        logits = sampling_lib.next_logits(self.model.unembed(params), hidden, self.vocab_size)
        ids = jnp.broadcast_to(jnp.arange(logits.shape[1], dtype=jnp.int32)[None], logits.shape)
        if self.sampling.temperature:
            logits, ids = sampling_lib.filter_logits(logits, self.sampling)
        return sharding.replicate(jax.nn.log_softmax(logits, axis=1)[0]), sharding.replicate(ids[0])


def make_probe(model: Model, vocab_size: int, sampling: SamplingConfig, prompt: Sequence[int]) -> Probe:
    """A probe with the beginning of a prompt."""
    return Probe(model, vocab_size, sampling, tuple(int(token) for token in prompt[:_LONGEST]))


def difference(expected: Float[np.ndarray, " V"], shown: Mapping[int, float]) -> float:
    """The mean size of the difference between what a server shows and what is expected of these tokens, in nats; of
    ids that the model hasn't, infinity."""
    if any(not 0 <= token < len(expected) for token in shown):
        return float("inf")
    gaps = [abs(max(value, _LEAST) - max(float(expected[token]), _LEAST)) for token, value in shown.items()]
    return float(np.mean(gaps))
