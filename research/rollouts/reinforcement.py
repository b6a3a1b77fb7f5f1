"""The experience of reinforcement learning: the policy answers prompts, rewards judge the answers, and these serve
several updates.

A rollout comes before every K x M updates, K epochs of M minibatches. What it holds lies in Place.buffer, and how far
the run has come in Place.source, so that a run that was stopped between two minibatches goes on as if it hadn't been.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np

from research import params as params_lib
from research.devices import distributed
from research.rollouts import buffer
from research.rollouts.buffer import Arrays
from research.rollouts.collection import Clock, Collector, Metrics
from research.rollouts.credit import Credit
from research.rollouts.experience import Batch, Experience, Place
from research.rollouts.model_rewards import ModelRewards
from research.rollouts.spec import Sizes


@dataclasses.dataclass(frozen=True, eq=False)
class Reinforcement:
    """Makes the batches of a run with rewards.

    Attributes:
      collector: collects a rollout's groups.
      credit: makes advantages of their rewards.
      scores: (train state, frozen, batch) -> the fields that models say; None where nothing asks for any.
      model_rewards: the rewards that models give; None where there are none.
      sizes: how many of what a rollout has.
      spec: field -> ShapeDtypeStruct with sharding, of the batches that the step takes.
      seed: of the run.
      virtual: ids of the tokens in front of each document.
    """

    collector: Collector
    credit: Credit
    scores: Callable[..., dict[str, jax.Array]] | None
    model_rewards: ModelRewards | None
    sizes: Sizes
    spec: Mapping[str, jax.ShapeDtypeStruct]
    seed: int
    virtual: range

    def experience(self) -> Experience:
        """This as an Experience."""
        return Experience(self.spec, self.buffer, self.init, Steps(self, self._take(), Clock()))

    @property
    def buffer(self) -> dict[str, jax.ShapeDtypeStruct]:
        """The spec of a rollout's rows."""
        return {
            name: jax.ShapeDtypeStruct((self.sizes.rows, *x.shape[1:]), x.dtype, sharding=x.sharding)
            for name, x in self.spec.items()
        }

    def init(self) -> Place:
        """The place before the first rollout."""
        empty = {name: np.zeros(x.shape, x.dtype) for name, x in self.buffer.items()}
        source = {"row": 0, "rollout": 0, "served": self.sizes.updates, "carry": self.credit.init()}
        return Place(source, buffer.put(empty, self.buffer))

    def collect(self, state: Any, frozen: Any, place: Place, clock: Clock) -> tuple[Place, Metrics]:
        """The place with a new rollout, and what is reported of it, with the seconds that `clock` has counted."""
        source, number = place.source, place.source["rollout"] + 1
        version = int(state.step)  # waits for the updates of the rollout before
        clock.lap("training")
        policy = params_lib.join(state.params.get("policy", {}), frozen.get("policy", {}))
        self.collector.engine.sync(policy, version)
        models = self.model_rewards and functools.partial(self.model_rewards, state, frozen)
        groups, row, metrics = self.collector.collect(source["row"], (self.seed, number), clock, models)
        rows = buffer.lay_out(groups, self._seq_len, self.virtual, self.collector.truncated)
        rows |= self._scored(state, frozen, rows)
        clock.lap("scores")
        fields, carry, more = self.credit(groups, rows, source["carry"])
        metrics |= more | _agreement(rows)
        metrics |= {f"rollout/seconds/{name}": (x, 1.0) for name, x in clock.read().items()}
        source = {"row": row, "rollout": number, "served": 0, "carry": carry}
        return Place(source, buffer.put(rows | fields, self.buffer)), metrics

    @property
    def _seq_len(self) -> int:
        return self.spec["tokens"].shape[1]

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
        index = buffer.minibatch((self.run.seed, source["rollout"]), sizes.rows, sizes.batch_size, source["served"])
        batch = self.take(place.buffer, index)
        metrics["rollout/staleness"] = (float(source["served"]), 1.0)
        return batch, place._replace(source={**source, "served": source["served"] + 1}), metrics


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
