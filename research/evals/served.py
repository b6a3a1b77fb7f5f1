"""vLLM servers in the place of the devices here: for whatever continues prompts by make_generate, and for labels."""

import dataclasses
import sys
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jaxtyping import Float, Int

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


class Asker:
    """Asks servers, each of which has shown once that it has the parameters that are given here.

    Args:
      urls: of the servers.
      served: what they are to have.
      sampling: what they show is drawn so.
    """

    def __init__(self, urls: Sequence[str], served: Served, sampling: SamplingConfig):
        self.served, self.sampling = served, sampling
        self.pool = Pool(urls, self._admit, served.limits, served.say)
        self._names: dict[str, str] = {}  # server -> what it calls the model
        self._prober: probe.Probe | None = None
        self._expected = np.zeros(0, np.float32)

    def __call__(
        self, params: Any, questions: Sequence[Question], ask: Callable[[str, str, Question], Any]
    ) -> list[Any]:
        """What `ask(server, what it calls the model, question)` gives for each question.

        Raises:
          Unavailable: no server is there.
          InputError: one has another model, or refuses what it is asked.
        """
        if self._prober is None:
            self._prober = probe.make_probe(
                self.served.model, self.served.vocab_size, self.sampling, questions[0].prompt
            )
            self._expected = self._prober.expected(params)
        return self.pool.run(questions, lambda server, question: ask(server, self._names[server], question))

    def _admit(self, server: str) -> None:
        self.served.check(server, self.sampling.max_new_tokens + 1)
        self._names[server] = self.served.name(server)
        try:
            self.served.prove(server, self._prober, self._expected, self._names[server])
        except (WrongModel, Refused) as error:
            raise InputError(f"{FLAG}: {error}") from error


class ServedGenerate:
    """See Servers.make_generate."""

    def __init__(self, urls: Sequence[str], served: Served, config: SamplingConfig):
        self.served, self.config, self._asker = served, config, Asker(urls, served, config)

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
        answers = self._asker(params, list(asked.values()), self._ask)
        return _lay_out(len(prompts), self.config.max_new_tokens, dict(zip(asked, answers, strict=True)))

    def _ask(self, server: str, name: str, question: Question) -> Answer:
        return self.served.ask(server, question, self.config, name)


class ServedClasses:
    """The probabilities of a language model's words for classes, each a token that could come next."""

    def __init__(self, urls: Sequence[str], served: Served, label_tokens: Sequence[int]):
        self.served, self.label_tokens = served, tuple(label_tokens)
        self._asker = Asker(urls, served, SamplingConfig(1, temperature=1.0))

    def __call__(self, params: Any, texts: Sequence[Sequence[int]]) -> Float[np.ndarray, "N C"]:
        """The probabilities of the classes after each text, float64, which add up to 1.

        Args:
          params: of the model, which servers are to have.
          texts: ids.

        Raises:
          Unavailable: no server is there.
          InputError: one has another model, or refuses what it is asked.
        """
        questions = [Question([int(token) for token in text], 0) for text in texts]
        log_probs = np.array(self._asker(params, questions, self._ask), np.float64)
        probs = np.exp(log_probs - log_probs.max(axis=1, keepdims=True))
        return probs / probs.sum(axis=1, keepdims=True)

    def _ask(self, server: str, name: str, question: Question) -> list[float]:
        return self.served.ask_among(server, question, self.label_tokens, name)


@dataclasses.dataclass(frozen=True)
class Servers:
    """Servers that have the model of a command.

    Attributes:
      urls: of them.
      limits: how they are asked.
    """

    urls: tuple[str, ...]
    limits: Limits = LIMITS

    def make_generate(self, model: Model, config: SamplingConfig, vocab_size: int | None = None) -> ServedGenerate:
        """See models.generation.make_generate. Log-probabilities are those that tokens were drawn with: the model's
        where nothing is drawn, and at temperature 1 without filters.

        Raises:
          InputError: servers can't draw so, or can't compute what the model does.
        """
        wire.check(config, "--")
        return ServedGenerate(self.urls, self._served(model, vocab_size), config)

    def make_classes(self, model: Model, label_tokens: Sequence[int], vocab_size: int) -> ServedClasses:
        """What tells how probable each of some tokens is after a text.

        Args:
          model: that the servers have.
          label_tokens: ids, one for each class.
          vocab_size: of the tokenizer.

        Raises:
          InputError: servers can't compute what the model does.
        """
        return ServedClasses(self.urls, self._served(model, vocab_size), label_tokens)

    def _served(self, model: Model, vocab_size: int | None) -> Served:
        served = Served(model, model.config.vocab_size if vocab_size is None else vocab_size, self.limits, _say)
        served.check_kind(FLAG)
        return served


def _lay_out(count: int, longest: int, answers: dict[int, Answer]) -> Generated:
    tokens, log_probs = np.zeros((count, longest), np.int32), np.zeros((count, longest), np.float32)
    lengths = np.zeros(count, np.int32)
    for row, answer in answers.items():
        lengths[row] = n = len(answer.tokens)
        tokens[row, :n], log_probs[row, :n] = answer.tokens, answer.log_probs
    return Generated(tokens, lengths, log_probs)


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
