"""One model as servers have it: whether it is the right one, and its answers to questions."""

import concurrent.futures
import dataclasses
import math
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float

from research.errors import InputError
from research.models.sampling import SamplingConfig
from research.models.transformer import Model
from research.rollouts.engines import client, probe, wire
from research.rollouts.engines.client import Refused
from research.rollouts.engines.pool import NOTICE_SECONDS, Dropped, Limits, Say
from research.rollouts.engines.weights import ServerError
from research.rollouts.engines.wire import Answer, Question


@dataclasses.dataclass(frozen=True, eq=False)
class Served:
    """What servers are to have, and how they are asked.

    Attributes:
      model: our own.
      vocab_size: of the tokenizer.
      limits: of requests.
      say: prints a line.
    """

    model: Model
    vocab_size: int
    limits: Limits
    say: Say

    @property
    def padding(self) -> range:
        """Ids of the model that no token has."""
        return range(self.vocab_size, self.model.config.vocab_size)

    def check_kind(self, section: str) -> None:
        """Checks that servers can compute what the model does, before any is asked.

        Args:
          section: for errors: "rollout.engine = 'vllm'" or "--servers".

        Raises:
          InputError: they can't.
        """
        adapter = self.model.adapter
        if adapter is not None and (adapter.virtual_tokens or adapter.prefix):
            raise InputError(f"{section}: servers put no soft prompt and no prefix before documents. Use 'local'.")
        if self.model.config.prefix:
            raise InputError(f"{section}: servers read prompts causally, and this is a prefix LM. Use 'local'.")

    def name(self, server: str) -> str:
        """What a server calls its model.

        Raises:
          ServerError: it doesn't answer, or serves none.
        """
        self._is_well(server)
        return self._models(server)[0]["id"]

    def check(self, server: str, most: int) -> None:
        """Checks what a server says of its model, while it may serve any weights of it.

        Args:
          server: its URL.
          most: the most tokens of a prompt and its answer together.

        Raises:
          ServerError: it doesn't answer.
          InputError: it has a model of another size, or answers in no way that is known here.
        """
        self._is_well(server)
        length = self._models(server)[0].get("max_model_len")
        if isinstance(length, int) and length < most:
            raise InputError(
                f"{server}: its longest document has {length} tokens (max_model_len), and prompts with answers have up "
                f"to {most}. Start it with --max-model-len={most}, or lower rollout.max_new_tokens."
            )
        question, sampling = Question([self.model.config.vocab_size], 0), SamplingConfig(1)
        try:
            client.ask(server, wire.ROUTE, self._body(server, question, sampling), seconds=self.limits.brief_seconds)
        except Refused as error:
            if error.status == 404:
                raise InputError(f"{server}: has no route {wire.ROUTE}. Use vLLM 0.32 or newer.") from error
            return  # as a server of this vocabulary does
        raise InputError(
            f"{server}: takes the id {question.prompt[0]}, and the model here has {self.model.config.vocab_size} ids. "
            "It serves another model: start it with this one, as understudy export writes it."
        )

    def ask(self, server: str, question: Question, sampling: SamplingConfig, name: str) -> Answer:
        """An answer of a server, whose model is called `name`.

        Raises:
          ServerError: the server is lost.
          Refused: it won't answer.
          Dropped: what it says is no answer.
        """
        body = wire.request(question, sampling, name, self.padding)
        reply = client.ask(server, wire.ROUTE, body, seconds=self.limits.answer_seconds)
        try:
            return wire.read(reply, sampling, self.vocab_size)
        except Dropped as error:
            raise Dropped(error.kind, f"{server}: {error}") from error
        except ServerError as error:
            raise ServerError(f"{server}: {error}") from error

    def ask_among(self, server: str, question: Question, tokens: Sequence[int], name: str) -> list[float]:
        """The log-probability of each of some tokens after the prompt, where one of them is to come next.

        Raises:
          ServerError, Refused, Dropped: see `ask`.
        """
        body = wire.request_among(question, tokens, name)
        reply = client.ask(server, wire.ROUTE, body, seconds=self.limits.answer_seconds)
        try:
            return wire.read_among(reply, tokens)
        except Dropped as error:
            raise Dropped(error.kind, f"{server}: {error}") from error

    def prove(self, server: str, prober: probe.Probe, expected: Float[np.ndarray, " V"], name: str) -> tuple[str, ...]:
        """Has a server show that its log-probabilities are ours, and returns the versions that it says it has.

        Raises:
          ServerError: it doesn't answer, or they are far from ours.
        """
        sampling = dataclasses.replace(prober.sampling, max_new_tokens=1)
        body = wire.request(Question(prober.prompt, 0), sampling, name, self.padding, probe.SHOWN)
        reply = client.ask(server, wire.ROUTE, body, seconds=self.limits.answer_seconds)
        try:
            answer, shown = wire.read(reply, sampling, self.vocab_size), wire.shown(reply)
        except Dropped as error:
            raise ServerError(f"{server}: {error}") from error
        gap = probe.difference(expected, shown)
        if not gap < probe.REFUSED:
            raise WrongModel(
                f"{server}: its log-probabilities are {gap:.3g} nats from ours. It has other weights or another model, "
                "or gives those before temperature and truncation: start it with --logprobs-mode processed_logprobs."
            )
        if gap > probe.WARNED:
            self.say(f"warning  {server}: the likeliest tokens' log-probabilities are {gap:.3g} nats from ours")
        return answer.stamps

    def wait(self, servers: Sequence[str], check: Callable[[str], None]) -> None:
        """Checks servers, and waits until one of them answers; says which others don't.

        Raises:
          InputError: one is the wrong one.
          Unavailable: none answers for limits.outage_seconds.
        """
        began, told, limit = time.monotonic(), -math.inf, self.limits.outage_seconds
        pause, longest = self.limits.pauses
        while True:
            faults = _faults(servers, check)
            waited = time.monotonic() - began
            if len(faults) < len(servers):
                for why in faults.values():
                    self.say(f"warning  {why}. It is used once it answers.")
                return
            if waited >= limit:
                raise self.limits.unavailable(waited, faults.values())
            if waited - told >= NOTICE_SECONDS:
                whys = "; ".join(map(str, faults.values()))
                self.say(f"no server answers yet; waiting for up to {limit:g} s: {whys}")
                told = waited
            time.sleep(min(pause, max(0.0, limit - waited)))
            pause = min(2 * pause, longest)

    def _is_well(self, server: str) -> None:
        client.ask(server, "/health", seconds=self.limits.brief_seconds)

    def _models(self, server: str) -> list[dict[str, Any]]:
        try:
            return client.models(server, self.limits.brief_seconds)
        except Refused as error:
            if error.status not in (401, 403):
                raise
            raise InputError(f"{error}. Give the servers' key in the environment variable {client.KEY}.") from error

    def _body(self, server: str, question: Question, sampling: SamplingConfig) -> dict[str, Any]:
        return wire.request(question, sampling, self._models(server)[0]["id"], range(0))


def _faults(servers: Sequence[str], check: Callable[[str], None]) -> dict[str, ServerError]:
    """Which servers can't be checked now, and why; all are asked at once."""
    faults: dict[str, ServerError] = {}
    with concurrent.futures.ThreadPoolExecutor(len(servers)) as pool:
        for server, done in {server: pool.submit(check, server) for server in servers}.items():
            try:
                done.result()
            except ServerError as error:
                faults[server] = error
    return faults


class WrongModel(ServerError):
    """A server whose answers aren't those of the model here."""
