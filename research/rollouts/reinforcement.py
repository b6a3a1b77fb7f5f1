"""The experience of reinforcement learning: the policy answers prompts, rewards judge the answers, and these serve
several updates.

A rollout comes before every K x M updates, K epochs of M minibatches. What it holds lies in Place.buffer, and how far
the run has come in Place.source, so that a run that was stopped between two minibatches goes on as if it hadn't been.
"""

import collections
import dataclasses
import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from research import params as params_lib
from research.devices import distributed
from research.rollouts import advantages, ahead, buffer
from research.rollouts.ahead import WAITING, Drawn, UnderWay
from research.rollouts.buffer import Arrays
from research.rollouts.collection import Clock, Collector, Group, Metrics, ModelJudge
from research.rollouts.credit import Credit
from research.rollouts.experience import Batch, Experience, Place
from research.rollouts.model_rewards import ModelRewards
from research.rollouts.pairs import NoCredit
from research.rollouts.spec import Sizes

_SHOWN = 4  # answers of a group that are shown to people


class Start(NamedTuple):
    """Where a rollout begins.

    Attributes:
      number: of the rollout, from 1.
      row: the place of its first prompt.
      version: updates of the policy that writes it.
    """

    number: int
    row: int
    version: int


@dataclasses.dataclass(frozen=True, eq=False)
class Reinforcement:
    """Makes the batches of a run with rewards.

    Attributes:
      collector: collects a rollout's groups.
      lay_out: groups -> the rows that they are trained on as.
      credit: makes of their rewards what the rows lack, such as advantages.
      scores: (train state, frozen, batch) -> the fields that models say; None where nothing asks for any.
      model_rewards: the rewards that models give; None where there are none.
      sizes: how many of what a rollout has.
      spec: field -> ShapeDtypeStruct with sharding, of the batches that the step takes.
      seed: of the run.
      order: (seed of a rollout, N, B, updates served) -> the rows of the next one [B]; see buffer.minibatch.
      recent: the groups of the last rollout, for people.
      ahead: draws each rollout while the one before is trained on; None where it is drawn after that.
    """

    collector: Collector
    lay_out: Callable[[Sequence[Group]], Arrays]
    credit: Credit | NoCredit
    scores: Callable[..., dict[str, jax.Array]] | None
    model_rewards: ModelRewards | None
    sizes: Sizes
    spec: Mapping[str, jax.ShapeDtypeStruct]
    seed: int
    ahead: UnderWay | None = None
    order: Callable[..., np.ndarray] = buffer.minibatch
    recent: collections.deque = dataclasses.field(default_factory=functools.partial(collections.deque, maxlen=1))

    def experience(self) -> Experience:
        """This as an Experience."""
        return Experience(
            self.spec, self.buffer, self.init, Steps(self, self._take(), Clock()), self.settled, self.samples
        )

    @property
    def buffer(self) -> dict[str, Any]:
        """The spec of a rollout's rows; and of one that waits, where there is one."""
        rows = {
            name: jax.ShapeDtypeStruct((self.sizes.rows, *x.shape[1:]), x.dtype, sharding=x.sharding)
            for name, x in self.spec.items()
        }
        if self.ahead is None:
            return rows
        return rows | {WAITING: {name: x for name, x in rows.items() if name in buffer.WRITTEN} | self._of_groups()}

    def _of_groups(self) -> dict[str, jax.ShapeDtypeStruct]:
        P, G, R = self.sizes.prompts, self.sizes.answers, len(self.collector.judge.names)
        everywhere = jax.sharding.NamedSharding(self.spec["tokens"].sharding.mesh, jax.P())
        shapes = {
            "lengths": ((P, G), np.int32),
            "stopped": ((P, G), np.bool_),
            "rewards": ((P, G, R), np.float32),
            "greedy": ((P, R), np.float32),
        }
        return {name: jax.ShapeDtypeStruct(*shape, sharding=everywhere) for name, shape in shapes.items()}

    def init(self) -> Place:
        """The place before the first rollout."""
        spec = self.buffer
        empty = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), spec)
        source = {"row": 0, "rollout": 0, "served": self.sizes.updates, "carry": self.credit.init()}
        rows = buffer.put(empty, {name: x for name, x in spec.items() if name != WAITING})
        return Place(source, rows | self._waiting(empty.get(WAITING, {})))

    def collect(self, state: Any, frozen: Any, place: Place, clock: Clock) -> tuple[Place, Metrics]:
        """The place with a new rollout, and what is reported of it, with the seconds that `clock` has counted."""
        version = int(state.step)  # waits for the updates of the rollout before
        clock.lap("training")
        at = Start(place.source["rollout"] + 1, place.source["row"], version)
        if self.ahead is None:
            drawn = self._draw(self._sync(state, frozen, version), at, clock)
        else:
            drawn = self._next(self._waited(place, clock), self._sync(state, frozen, version), at, clock)
        rows = drawn.rows | self._scored(state, frozen, drawn.rows)
        clock.lap("scores")
        self.recent.append(drawn.groups)
        fields, carry, more = self.credit(drawn.groups, rows, place.source["carry"])
        metrics = drawn.metrics | more | _agreement(rows) | _seconds(clock, drawn.metrics)
        source = {"row": drawn.row, "rollout": at.number, "served": 0, "carry": carry}
        if self.ahead is not None:
            source |= {"lag": version - drawn.version}
        there = {WAITING: place.buffer[WAITING]} if self.ahead is not None else {}
        placed = {name: x for name, x in self.buffer.items() if name != WAITING}
        return Place(source, buffer.put(rows | fields, placed) | there), metrics

    def samples(self, n: int) -> list[dict[str, Any]]:
        """See Experience: the first answers of groups, with the sum of their rewards."""
        weights, clip = self.collector.judge.weights, self.collector.advantage.clip
        samples = []
        for group in self.recent[-1][:n] if self.recent else ():
            if group.prompt is None:  # it waited in a checkpoint, which has no texts
                continue
            sums = advantages.sum_rewards(group.rewards[None], weights, clip)[0].tolist()
            answers = [
                {"text": group.prompt.decode(tokens[:length].tolist()), "reward": None if math.isnan(value) else value}
                for tokens, length, value in zip(group.tokens, group.lengths, sums, strict=True)
            ]
            samples.append({"prompt": group.prompt.text, "answers": answers[:_SHOWN]})
        return samples

    def settled(self, place: Place) -> Place:
        """The place with the rollout that waits, which a checkpoint is to have."""
        drawn = self.ahead and self.ahead.get(place.source["rollout"] + 1)
        if drawn is None:
            return place
        return Place({**place.source, WAITING: drawn.facts()}, place.buffer | self._waiting(drawn.arrays()))

    def _waited(self, place: Place, clock: Clock) -> Drawn | None:
        """The rollout that was drawn while the one before was trained on; None before the first."""
        drawn = self.ahead.get(place.source["rollout"] + 1)
        clock.lap("waiting")
        if drawn is None and WAITING in place.source:
            drawn = ahead.restored(place.buffer[WAITING], place.source[WAITING])
        return drawn

    def _next(self, drawn: Drawn | None, models: ModelJudge | None, at: Start, clock: Clock) -> Drawn:
        """The rollout that is to be trained on; the one after it is begun."""
        if drawn is None:
            drawn = self._draw(models, at, clock)
        self.ahead.begin(
            at.number + 1, functools.partial(self._apart, models, Start(at.number + 1, drawn.row, at.version))
        )
        clock.lap("waiting")  # where it is drawn at once
        return drawn

    def _sync(self, state: Any, frozen: Any, version: int) -> ModelJudge | None:
        """Hands the policy to the engine; returns the rewards that models give."""
        trained = state.params.get("policy", {})
        if self.ahead is not None and self.ahead.apart:
            trained = ahead.copied(trained)
        self.collector.engine.sync(params_lib.join(trained, frozen.get("policy", {})), version)
        return self.model_rewards and functools.partial(self.model_rewards, frozen)

    def _draw(self, models: ModelJudge | None, at: Start, clock: Clock) -> Drawn:
        """A rollout by the policy that the engine has."""
        groups, row, metrics = self.collector.collect(at.row, (self.seed, at.number), clock, models)
        return Drawn(self.lay_out(groups), groups, row, at.version, metrics)

    def _apart(self, models: ModelJudge | None, at: Start) -> Drawn:
        """The same, maybe in a thread, with the seconds that it took."""
        clock = Clock()
        clock.lap("")  # from here on
        with jax.set_mesh(self.spec["tokens"].sharding.mesh):
            drawn = self._draw(models, at, clock)
        return drawn._replace(metrics=drawn.metrics | _seconds(clock, {}))

    def _waiting(self, arrays: Arrays) -> dict[str, dict[str, jax.Array]]:
        return {WAITING: buffer.put(arrays, self.buffer[WAITING])} if self.ahead is not None else {}

    def _scored(self, state: Any, frozen: Any, rows: Arrays) -> Arrays:
        """What models say of the rows, a batch of them at a time."""
        if self.scores is None:
            return {}
        like = {name: x for name, x in self.spec.items() if name in rows}
        parts = [self.scores(state, frozen, batch) for batch in buffer.parts(rows, like)]
        return {name: np.concatenate([np.asarray(part[name]) for part in parts]) for name in parts[0]}

    def _take(self) -> Callable[..., Batch]:
        placed = {name: x.sharding for name, x in self.spec.items()}
        return distributed.one_at_a_time(jax.jit(_take, out_shardings=placed))


@dataclasses.dataclass(frozen=True, eq=False)
class Steps:
    """See Experience.next.

    Attributes:
      run: collects rollouts.
      take: (the rows of a rollout, numbers of rows [B]) -> these as a batch.
      clock: counts the seconds of what a rollout is made of, and of the updates before it.
    """

    run: Reinforcement
    take: Callable[..., Batch]
    clock: Clock

    def __call__(self, state: Any, frozen: Any, place: Place) -> tuple[Batch, Place, Metrics]:
        metrics: Metrics = {}
        if place.source["served"] >= self.run.sizes.updates:
            place, metrics = self.run.collect(state, frozen, place, self.clock)
        source, sizes = place.source, self.run.sizes
        index = self.run.order((self.run.seed, source["rollout"]), sizes.rows, sizes.batch_size, source["served"])
        batch = self.take({name: place.buffer[name] for name in self.run.spec}, index)
        metrics["rollout/staleness"] = (float(source.get("lag", 0) + source["served"]), 1.0)
        return batch, place._replace(source={**source, "served": source["served"] + 1}), metrics


def _seconds(clock: Clock, before: Metrics) -> Metrics:
    """What a clock has counted, beside what `before` has."""
    named = {f"rollout/seconds/{name}": seconds for name, seconds in clock.read().items()}
    return {name: (seconds + before.get(name, (0.0, 1.0))[0], 1.0) for name, seconds in named.items()}


def _take(rows: Batch, index: jax.Array) -> Batch:
    return {name: x[index] for name, x in rows.items()}


def _agreement(rows: Mapping[str, np.ndarray]) -> Metrics:
    """How far the trainer's log-probabilities of the answers are from those that they were drawn with: the mean
    difference in size, and the effective sample size of the ratios of whole answers, as a part of their number."""
    if "old_log_prob" not in rows:
        return {}
    mask = buffer.predicting(rows)
    gap = np.where(mask > 0, rows["old_log_prob"] - rows["sampler_log_prob"], 0).astype(np.float64)
    logs = gap.sum(axis=1)[mask.sum(axis=1) > 0]
    if not logs.size:
        return {}
    ratios = np.exp(logs - logs.max())
    size = float(ratios.sum() ** 2 / np.square(ratios).sum())
    return {
        "rollout/log_prob_gap": (float(np.abs(gap).sum()), float(mask.sum())),
        "rollout/effective_sample": (size / logs.size, 1.0),
    }
