"""A rollout's groups: prompts, the policy's answers to each, and what rewards say of these."""

import dataclasses
import time
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import numpy as np
from jax.experimental import multihost_utils
from jaxtyping import Bool, Float, Int, UInt

from research.models.sampling import SamplingConfig
from research.rollouts import advantages
from research.rollouts.advantages import AdvantageSpec
from research.rollouts.engines.types import Answers, Engine
from research.rollouts.rewards import Sample, judging
from research.sources.prompts import Prompt, Prompts

Metrics = dict[str, tuple[float, float]]  # name -> (sum, weight)
ModelJudge = Callable[[Sequence[Prompt], Answers, int], Float[np.ndarray, "P n R"]]  # NaN where no model judges


class Group(NamedTuple):
    """The G answers to one prompt.

    Attributes:
      prompt: what was asked.
      tokens: int32; 0 after the end of an answer.
      lengths: int32, of each answer.
      log_probs: float32, log of the probability that each token was drawn with.
      stopped: whether the policy ended the answer; else it was cut off.
      rewards: float32, of each reward; NaN where it can't judge the answer, and all of them where one has failed.
      failed: where a reward was too slow or faulty.
      greedy: float32, the rewards of the answer made of the likeliest tokens; NaN where nothing asks for it.
    """

    prompt: Prompt
    tokens: Int[np.ndarray, "G N"]
    lengths: Int[np.ndarray, " G"]
    log_probs: Float[np.ndarray, "G N"]
    stopped: Bool[np.ndarray, " G"]
    rewards: Float[np.ndarray, "G R"]
    failed: Bool[np.ndarray, "G R"]
    greedy: Float[np.ndarray, " R"]


class Clock:
    """Adds up seconds by name. Its first lap has no time: what came before it isn't known."""

    def __init__(self) -> None:
        self._seconds: dict[str, float] = {}
        self._since: float | None = None

    def lap(self, name: str) -> None:
        """Counts the time since the last lap, or the start, as of `name`."""
        now = time.perf_counter()
        if self._since is not None:
            self._seconds[name] = self._seconds.get(name, 0.0) + now - self._since
        self._since = now

    def read(self) -> dict[str, float]:
        """The seconds since this was called last."""
        seconds, self._seconds = self._seconds, {}
        return seconds


@dataclasses.dataclass(frozen=True)
class Judge:
    """The rewards of a run. Of several processes each judges whole groups, a share of them.

    Attributes:
      rewards: in worker processes.
    """

    rewards: judging.Judge

    @property
    def names(self) -> tuple[str, ...]:
        """Of the rewards."""
        return tuple(entry.name for entry in self.rewards.entries)

    @property
    def weights(self) -> Float[np.ndarray, " R"]:
        """Of the rewards."""
        return np.array([entry.weight for entry in self.rewards.entries], np.float64)

    def __call__(
        self, prompts: Sequence[Prompt], answers: Answers, n: int
    ) -> tuple[Float[np.ndarray, "P n R"], Bool[np.ndarray, "P n R"]]:
        """What each reward says of n answers to each prompt, float32, and where it has failed; see Group."""
        mine = range(jax.process_index(), len(prompts), jax.process_count())
        judged = self.rewards([self._sample(prompts[i], answers, i * n + j) for i in mine for j in range(n)])
        own = np.full((2, len(prompts), n, len(self.names)), np.nan, np.float32)
        for which, values in enumerate((judged.kept(), judged.failed)):
            own[which, list(mine)] = values.T.reshape(len(mine), n, len(self.names))
        if jax.process_count() > 1:
            every = multihost_utils.process_allgather(own)
            own = every[np.arange(len(prompts)) % jax.process_count(), :, np.arange(len(prompts))].swapaxes(0, 1)
        return own[0], own[1] > 0

    @staticmethod
    def _sample(prompt: Prompt, answers: Answers, row: int) -> Sample:
        length = int(answers.lengths[row])
        text = prompt.decode(answers.tokens[row, :length].tolist())
        return Sample(prompt.record, prompt.text, text, length, "stop" if answers.stopped[row] else "length")


@dataclasses.dataclass(frozen=True, eq=False)
class Collector:
    """Collects the groups of a rollout.

    Attributes:
      prompts: where they come from.
      engine: answers them.
      judge: the rewards.
      sampling: how answers are chosen.
      advantage: decides which groups agree, and whether greedy answers are needed.
      count, answers: P prompts with G answers each.
      rounds: of further prompts in place of those whose answers agree.
      truncated: what becomes of answers that are cut off; see RolloutSpec.
    """

    prompts: Prompts
    engine: Engine
    judge: Judge
    sampling: SamplingConfig
    advantage: AdvantageSpec
    count: int
    answers: int
    rounds: int
    truncated: str

    def collect(
        self, first: int, seed: Sequence[int], clock: Clock, models: ModelJudge | None = None
    ) -> tuple[list[Group], int, Metrics]:
        """P groups, the place of the next prompt, and what is reported of all answers, of those that are replaced too.

        Args:
          first: the place of the first prompt in the order of all.
          seed: of the draws.
          clock: takes the time of generation and of rewards.
          models: the rewards that models of the run give; None where there are none.
        """
        kept: list[Group] = []
        spare: list[Group] = []
        place = first
        for number in range(1 + self.rounds):
            prompts = self.prompts.read(place, self.count - len(kept))
            place += len(prompts)
            groups = self._groups(prompts, (*seed, number), clock, models)
            agreeing = self._agree(groups) if self.rounds else np.zeros(len(groups), bool)
            kept += [group for group, same in zip(groups, agreeing, strict=True) if not same]
            spare += [group for group, same in zip(groups, agreeing, strict=True) if same]
            if len(kept) == self.count:
                break
        reported = metrics(kept + spare, self) | self.engine.report()
        if self.rounds:
            reported["rollout/filtered"] = float(len(spare)), float(place - first)
        return kept + spare[: self.count - len(kept)], place, reported

    def _groups(
        self, prompts: Sequence[Prompt], seed: Sequence[int], clock: Clock, models: ModelJudge | None
    ) -> list[Group]:
        G, tokens = self.answers, [prompt.tokens for prompt in prompts]
        answers = self.engine.generate(tokens, G, self.sampling, _key(seed))
        clock.lap("generation")
        rewards, failed = self._judged(prompts, answers, G, models)
        clock.lap("reward")
        greedy = np.full((len(prompts), rewards.shape[2]), np.nan, np.float32)
        if "greedy" in advantages.KINDS[self.advantage.kind].reads:
            likeliest = dataclasses.replace(self.sampling, temperature=0.0, top_k=0, top_p=1.0, min_p=0.0)
            single = self.engine.generate(tokens, 1, likeliest, _key(seed))
            clock.lap("generation")
            greedy = self._judged(prompts, single, 1, models)[0][:, 0]
            clock.lap("reward")
        arrays = (answers.tokens, answers.lengths, answers.log_probs, answers.stopped)
        columns = [x.reshape(len(prompts), G, *x.shape[1:]) for x in arrays]
        return [Group(*each) for each in zip(prompts, *columns, rewards, failed, greedy, strict=True)]

    def _judged(
        self, prompts: Sequence[Prompt], answers: Answers, n: int, models: ModelJudge | None
    ) -> tuple[Float[np.ndarray, "P n R"], Bool[np.ndarray, "P n R"]]:
        """See Judge, with what models say."""
        rewards, failed = self.judge(prompts, answers, n)
        if models is None:
            return rewards, failed
        by_models = models(prompts, answers, n)
        return np.where(failed.any(axis=2, keepdims=True) | np.isnan(by_models), rewards, by_models), failed

    def _agree(self, groups: Sequence[Group]) -> Bool[np.ndarray, " P"]:
        return agree(self.advantage, counted(groups, self.truncated), self.judge.weights)


def counted(groups: Sequence[Group], truncated: str) -> Float[np.ndarray, "P G R"]:
    """The rewards that advantages are made of: with "leave_out" none of answers that were cut off."""
    rewards, stopped = (np.stack([getattr(group, name) for group in groups]) for name in ("rewards", "stopped"))
    return np.where(stopped[:, :, None], rewards, np.nan) if truncated == "leave_out" else rewards


def agree(
    spec: AdvantageSpec, rewards: Float[np.ndarray, "P G R"], weights: Float[np.ndarray, " R"]
) -> Bool[np.ndarray, " P"]:
    """Whether the answers of each group have one reward, be it the sum or, where these are compared by themselves, each
    that counts."""
    if spec.combine == "rewards":
        return advantages.agree(advantages.sum_rewards(rewards, weights, spec.clip))
    same = [advantages.agree(rewards[:, :, r]) for r in range(rewards.shape[2]) if weights[r]]
    return np.all(same, axis=0)


def metrics(groups: Sequence[Group], collector: Collector) -> Metrics:
    """What is reported of answers: of the summed reward and of each mean, standard deviation and the share that
    isn't judged, of each the share with which it fails; lengths; the shares of answers that were cut off and of groups
    that agree."""
    spec, weights = collector.advantage, collector.judge.weights
    rewards = np.stack([group.rewards for group in groups])
    lengths = np.concatenate([group.lengths for group in groups])
    stopped = np.concatenate([group.stopped for group in groups])
    same = agree(spec, counted(groups, collector.truncated), weights)
    values = {"reward": advantages.sum_rewards(rewards, weights, spec.clip)}
    values |= {f"reward/{name}": rewards[:, :, r] for r, name in enumerate(collector.judge.names)}
    out: Metrics = {}
    for name, value in values.items():
        judged = value[~np.isnan(value)].astype(np.float64)
        out[name] = (float(judged.sum()), float(judged.size))
        out[f"{name}/deviation"] = (float(judged.std()) if judged.size else 0.0, float(judged.size > 0))
        out[f"{name}/unjudged"] = (float(value.size - judged.size), float(value.size))
    failed = np.stack([group.failed for group in groups])
    for r, name in enumerate(collector.judge.names):
        out[f"reward/{name}/failed"] = (float(failed[:, :, r].sum()), float(failed[:, :, r].size))
    return out | {
        "rollout/tokens": (float(lengths.sum()), float(lengths.size)),
        "rollout/truncated": (float(np.sum(~stopped)), float(stopped.size)),
        "rollout/agreeing": (float(same.sum()), float(same.size)),
    }


def _key(seed: Sequence[int]) -> UInt[np.ndarray, "2"]:
    """A raw random key."""
    return np.random.SeedSequence(seed).generate_state(2, np.uint32)
