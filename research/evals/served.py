"""Completions by vLLM servers in the place of the devices here, for whatever continues prompts by make_generate."""

import dataclasses
import sys
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jaxtyping import Int

from research.errors import InputError
from research.models.sampling import SamplingConfig
from research.models.slots import Generated
from research.models.transformer import Model
from research.rollouts.engines import probe, wire
from research.rollouts.engines.client import Refused
from research.rollouts.engines.pool import Limits, Pool
from research.rollouts.engines.served import Served, WrongModel
from research.rollouts.engines.wire import Answer, Question

FLAG = "--servers"
LIMITS = Limits(answer_seconds=600.0, outage_seconds=120.0, field=FLAG, option="")


@dataclasses.dataclass(frozen=True)
class Servers:
    """Servers that have the model of a command.

    Attributes:
      urls: of them.
      limits: how they are asked.
    """

    urls: tuple[str, ...]
    limits: Limits = LIMITS

    def make_generate(self, model: Model, config: SamplingConfig, vocab_size: int | None = None) -> "ServedGenerate":
        """See models.generation.make_generate. Log-probabilities are those that tokens were drawn with: the model's
        where nothing is drawn, and at temperature 1 without filters.

        Raises:
          InputError: servers can't draw so, or can't compute what the model does.
        """
        wire.check(config, "--")
        served = Served(model, model.config.vocab_size if vocab_size is None else vocab_size, self.limits, _say)
        served.check_kind(FLAG)
        return ServedGenerate(self.urls, served, config)


class ServedGenerate:
    """See Servers.make_generate. Every server shows once that it has the parameters that are given here."""

    def __init__(self, urls: Sequence[str], served: Served, config: SamplingConfig):
        self.served, self.config = served, config
        self.pool = Pool(urls, self._admit, served.limits, served.say)
        self._names: dict[str, str] = {}  # server -> what it calls the model
        self._prober: probe.Probe | None = None
        self._expected = np.zeros(0, np.float32)

    def __call__(
        self,
        params: Any,
        prompts: Int[np.ndarray, "B P"],
        lengths: Int[np.ndarray, " B"],
        key: jax.Array,
        rows: Int[np.ndarray, " B"] | None = None,
        *,
        slots: int | None = None,
    ) -> Generated:
        """See make_generate.

        Raises:
          Unavailable: no server is there.
          InputError: one has another model, or refuses what it is asked.
        """
        prompts, lengths = np.asarray(prompts), np.asarray(lengths)
        numbers = np.arange(len(prompts)) if rows is None else np.asarray(rows)
        seeds = jax.random.key_data(key) if jax.dtypes.issubdtype(key.dtype, jax.dtypes.prng_key) else key
        asked = {
            row: Question(prompts[row, prompts.shape[1] - lengths[row] :].tolist(), wire.seed(seeds, int(numbers[row])))
            for row in np.flatnonzero(lengths)
        }
        if self._prober is None:
            first = next(iter(asked.values())).prompt
            self._prober = probe.make_probe(self.served.model, self.served.vocab_size, self.config, first)
            self._expected = self._prober.expected(params)
        answers = self.pool.run(list(asked.values()), self._ask)
        return _lay_out(len(prompts), self.config.max_new_tokens, dict(zip(asked, answers, strict=True)))

    def _ask(self, server: str, question: Question) -> Answer:
        return self.served.ask(server, question, self.config, self._names[server])

    def _admit(self, server: str) -> None:
        self.served.check(server, self.config.max_new_tokens + 1)
        self._names[server] = self.served.name(server)
        try:
            self.served.prove(server, self._prober, self._expected, self._names[server])
        except (WrongModel, Refused) as error:
            raise InputError(f"{FLAG}: {error}") from error


def _lay_out(count: int, longest: int, answers: dict[int, Answer]) -> Generated:
    tokens, log_probs = np.zeros((count, longest), np.int32), np.zeros((count, longest), np.float32)
    lengths = np.zeros(count, np.int32)
    for row, answer in answers.items():
        lengths[row] = n = len(answer.tokens)
        tokens[row, :n], log_probs[row, :n] = answer.tokens, answer.log_probs
    return Generated(tokens, lengths, log_probs)


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
