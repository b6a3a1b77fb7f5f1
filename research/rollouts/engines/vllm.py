"""The engine that answers by vLLM: one or many servers, asked over HTTP.

Process 0 speaks with them, and all processes take its answers. The servers get the policy's weights before each rollout
(weights.py). An answer that was written with other weights than those that it was asked of is dropped.
"""

import dataclasses
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from jax.experimental import multihost_utils
from jaxtyping import Float, UInt

from research.devices import distributed
from research.errors import InputError, Unavailable
from research.models.sampling import SamplingConfig
from research.rollouts.engines import probe, wire
from research.rollouts.engines.client import Refused
from research.rollouts.engines.pool import Dropped, Pool
from research.rollouts.engines.served import Served, WrongModel
from research.rollouts.engines.types import Answers
from research.rollouts.engines.weights import ServerError, Weights
from research.rollouts.engines.wire import Answer, Question

_BEAT_SECONDS = 5.0  # between two words of process 0 to those that wait for it


@dataclasses.dataclass
class _Serving:
    """A version that a server has been brought to.

    Attributes:
      version: of the weights.
      doubted: whether it has answered with others since.
    """

    version: int
    doubted: bool = False


class Vllm:
    """See engines.types.Engine.

    Args:
      urls: of the servers.
      weights: brings the policy's parameters to them.
      served: what they are to have.
      prober: what they are asked before they are trusted.
      staleness: by how many updates a server's weights may be older than the policy, where it can't take newer ones.
      stopped: whether answers that are under way are to be given up.
    """

    def __init__(
        self,
        urls: Sequence[str],
        weights: Weights,
        served: Served,
        prober: probe.Probe,
        *,
        staleness: int = 0,
        stopped: Callable[[], bool] = lambda: False,
    ):
        self.weights, self.served, self.prober, self.staleness = weights, served, prober, staleness
        self.pool = Pool(urls, self._admit, served.limits, served.say, stopped)
        self._version = -1
        self._expected: dict[int, Float[np.ndarray, " V"]] = {}  # version -> see Probe, of those that may be served
        self._names: dict[int, tuple[str, str]] = {}  # version -> what requests call it, and what answers do
        self._serving: dict[str, _Serving] = {}  # server -> what this process has committed there
        self._stage_seconds = self._weights_seconds = self._behind = 0.0  # since the last report
        self._answers = 0

    def check(self, most: int) -> None:
        """Checks the servers before the run begins, and waits for one of them.

        Args:
          most: the most tokens of a prompt and its answer together.

        Raises:
          InputError: a server has another model, or one of them can't do what is asked.
          Unavailable: none answers.
        """
        self.served.check_kind("rollout.engine = 'vllm'")
        wire.check(self.prober.sampling, "rollout.")
        urls = [server.url for server in self.pool.servers]
        self._on_main(lambda: self.served.wait(urls, lambda server: self.served.check(server, most)))

    def sync(self, params: Any, version: int) -> None:
        """See Engine. Servers take the version when they are asked next."""
        began = time.perf_counter()
        self.weights.stage(params, version)
        expected = self.prober.expected(params)
        self._expected = {v: x for v, x in self._expected.items() if version - self.staleness <= v < version}
        self._expected[version] = expected
        if distributed.main():
            self._names = {v: names for v, names in self._names.items() if v in self._expected}
            self._names[version] = self.weights.model(version), self.weights.stamp(version)
        self._version = version
        self.pool.readmit()
        self._stage_seconds += time.perf_counter() - began

    def generate(
        self, prompts: Sequence[Sequence[int]], n: int, sampling: SamplingConfig, key: UInt[np.ndarray, "2"]
    ) -> Answers:
        """See Engine. The same arguments are the same requests; vLLM may answer them in other words beside others.

        Raises:
          Unavailable: no server was there for limits.outage_seconds, or `stopped` said so.
          InputError: a server refuses what it is asked, or has another model.
        """
        questions = [Question(prompt, wire.seed(key, i * n + j)) for i, prompt in enumerate(prompts) for j in range(n)]
        answers = self._on_main(lambda: self.pool.run(questions, lambda server, q: self._ask(server, q, sampling)))
        laid_out = _lay_out(answers, len(questions), sampling.max_new_tokens)
        if distributed.several():
            laid_out = Answers(*multihost_utils.broadcast_one_to_all(tuple(laid_out)))
        self._behind += float(np.sum(self._version - laid_out.versions))
        self._answers += len(questions)
        return laid_out

    def report(self) -> dict[str, tuple[float, float]]:
        """What has been counted since this was called last, as metrics."""
        counts = self.pool.read_counts()
        up = sum(server.up for server in self.pool.servers)
        metrics = {
            f"rollout/{name}": (float(counts.get(name, 0)), 1.0)
            for name in ("dropped/version", "dropped/malformed", "retried", "lost")
        }
        metrics |= {
            "rollout/servers": (float(up), 1.0),
            "rollout/behind": (self._behind, float(self._answers)),
            "rollout/seconds/staging": (self._stage_seconds, 1.0),
            "rollout/seconds/weights": (self._weights_seconds, 1.0),
        }
        self._stage_seconds = self._weights_seconds = self._behind = 0.0
        self._answers = 0
        return metrics

    def _ask(self, server: str, question: Question, sampling: SamplingConfig) -> tuple[Answer, int]:
        """An answer, and the version that it was written with."""
        serving = self._serving[server]
        name, stamp = self._names[serving.version]
        try:
            answer = self.served.ask(server, question, sampling, name)
        except Refused as error:
            if error.status == 404:  # it was started anew, and has no such adapter
                raise ServerError(str(error)) from error
            raise
        if answer.stamps != (stamp,):
            serving.doubted = True
            said = ", ".join(answer.stamps) or "none"
            raise Dropped("version", f"{server}: wrote an answer with the weights {said}, and not with {stamp}")
        return answer, serving.version

    def _admit(self, server: str) -> None:
        """Brings a server to the newest version, and has it show that it has that.

        Raises:
          ServerError: it can't be used now.
          InputError: it has never had the right model.
        """
        began = time.perf_counter()
        self.served.name(server)
        before, wanted = self._serving.get(server), self._version
        try:
            if before is None or before.doubted or {before.version, self.weights.served(server)} != {wanted}:
                self.weights.prepare(server, wanted)
                self.weights.commit(server, wanted)
            serving = _Serving(wanted)
        except ServerError as error:
            serving = self._stay(server, before, error)
        self._prove(server, serving.version)
        self._serving[server] = serving
        self._weights_seconds = max(self._weights_seconds, time.perf_counter() - began)

    def _stay(self, server: str, before: "_Serving | None", error: ServerError) -> "_Serving":
        """What a server goes on with that can't take the newest version: the one that it has, where that is new enough.

        Raises:
          ServerError: it isn't.
        """
        if before is None or before.doubted or not self._version > before.version >= min(self._expected):
            raise error
        if self.weights.served(server) != before.version:
            raise error
        self.served.say(f"{error}. It goes on with version {before.version} (rollout.staleness).")
        return before

    def _prove(self, server: str, version: int) -> None:
        """Has a server show that it has a version.

        Raises:
          ServerError: it hasn't.
          InputError: it never had the right model.
        """
        name, stamp = self._names[version]
        try:
            stamps = self.served.prove(server, self.prober, self._expected[version], name)
        except (WrongModel, Refused) as error:
            if server not in self._serving:
                raise InputError(str(error)) from error
            raise
        if stamps != (stamp,):
            raise ServerError(f"{server}: says that it has {', '.join(stamps) or 'no version'}, and not {stamp}")

    def _on_main(self, work: Callable[[], Any]) -> Any:
        """Does work in process 0 alone, while the others wait; None there. What it raises all raise.

        The others hear of process 0 every few seconds, for collectives don't wait as long as servers may take.
        """
        if not distributed.several():
            return work()
        outcome: dict[str, Any] = {}
        thread = threading.Thread(target=_note, args=(work, outcome), daemon=True)
        if distributed.main():
            thread.start()
        state = _UNDER_WAY
        while state == _UNDER_WAY:
            if distributed.main():
                thread.join(_BEAT_SECONDS)
                state = outcome.get("state", _UNDER_WAY)
            state = int(multihost_utils.broadcast_one_to_all(np.int32(state)))
        if state == _DONE:
            return outcome.get("value")
        text = outcome.get("error", "see process 0")
        raise (InputError if state == _BAD_INPUT else Unavailable)(str(text))


_UNDER_WAY, _DONE, _BAD_INPUT, _GONE = range(4)


def _note(work: Callable[[], Any], outcome: dict[str, Any]) -> None:
    """Does work, and notes how it ended."""
    try:
        outcome["value"] = work()
        outcome["state"] = _DONE
    except InputError as error:
        outcome |= {"error": error, "state": _BAD_INPUT}
    except Exception as error:
        outcome |= {"error": f"{type(error).__name__}: {error}", "state": _GONE}


def _lay_out(answers: Sequence[tuple[Answer, int]] | None, count: int, longest: int) -> Answers:
    """Answers as arrays; without any, empty arrays of the same shapes."""
    tokens, log_probs = np.zeros((count, longest), np.int32), np.zeros((count, longest), np.float32)
    lengths, stopped, versions = np.zeros(count, np.int32), np.zeros(count, bool), np.zeros(count, np.int32)
    for row, (answer, version) in enumerate(answers or ()):
        lengths[row], stopped[row], versions[row] = len(answer.tokens), answer.stopped, version
        tokens[row, : lengths[row]], log_probs[row, : lengths[row]] = answer.tokens, answer.log_probs
    return Answers(tokens, lengths, log_probs, stopped, versions)
