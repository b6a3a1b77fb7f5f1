"""Short runs of a subject in memory, with metrics at every step and nothing written."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from research.diagnosis.subject import Batch, Subject
from research.objectives.terms import on_data
from research.optim import Rates
from research.run import assemble, evaluation
from research.train import TrainState, means

Record = dict[str, float]
_FLOPS = 2.5e11  # that the steps of all probes may take together, some seconds on two cores
_STEPS_BEFORE, _STEPS_AFTER = 41, 6  # that they make, before a run and of one that has begun
_TOKENS = 512


def train(
    subject: Subject, steps: int, *, rates: Rates | None = None, batch: Batch | None = None, evaluate: bool = True
) -> tuple[Subject, tuple[Record, ...]]:
    """Takes steps from where the subject is: (the subject after them, the metrics of each).

    The step is the run's own, compiled once; the subject itself stays as it is.

    Args:
      subject: what to train.
      steps: how many.
      rates: the highest learning rates, by default the run's.
      batch: trained on at every step; by default the data goes on.
      evaluate: measure the held-out rows before the first step and after the last.

    Returns:
      The subject with the new state, place and records; and the new records alone, as in metrics.jsonl, with
      "train/batch_hash" at every step.
    """
    rates = assemble.learning_rates(subject.config, subject.parts) if rates is None else rates
    state, place, records = copied(subject.state), subject.place, []
    with jax.set_mesh(subject.mesh), subject.experience() as experience:
        evaluating = evaluate and bool(subject.eval_batches)
        if evaluating:
            records.append({"step": int(state.step)} | held_out_scores(subject, state))
        for _ in range(steps):
            gathered: Mapping[str, Any] = {}
            if batch is None:
                now, place, gathered = experience.next(state, subject.frozen, place)
            else:
                now = batch
            state, out = subject.parts.step(state, subject.frozen, now, rates)
            values = means([jax.device_get(out | dict(gathered))])
            records.append({"step": int(state.step)} | {f"train/{name}": value for name, value in values.items()})
        if evaluating:
            records.append({"step": int(state.step)} | held_out_scores(subject, state))
        place = experience.settled(place)
    made = tuple(records)
    return dataclasses.replace(subject, state=state, place=place, records=subject.records + made), made


def held_out_scores(subject: Subject, state: TrainState) -> Record:
    """What an evaluation of a run gives on the subject's held-out batches, as "eval/loss" and so on."""
    terms = on_data(subject.terms, subject.config.rollout.pairs)
    if not terms:
        return {}
    key, parts = jax.random.PRNGKey(subject.config.seed), []
    frozen = {**subject.frozen, **state.synced}
    for number, batch in enumerate(subject.eval_batches):
        first = jnp.asarray(number * subject.config.batch_size, jnp.int32)
        parts.append(subject.programs.evaluate(state.params, frozen, batch, key, state.carry, first))
    scores = evaluation.whole_loss(terms, means(parts))
    return {f"eval/{name}": value for name, value in scores.items()}


def scaled(subject: Subject, factor: float) -> Rates:
    """The run's highest learning rates times a factor."""
    own = assemble.learning_rates(subject.config, subject.parts)
    return {name: jax.device_put(np.asarray(rate) * factor, rate.sharding) for name, rate in own.items()}


def row_flops(subject: Subject) -> float:
    """The model FLOPs of a train step on one row."""
    length = subject.config.seq_len
    return length * sum(each.total for each in subject.parts.roles.flops(length).values())


def few_rows(subject: Subject, batch: Batch) -> Batch:
    """The first rows of a batch, so many that what probes do with them takes some seconds on a few cores, but those of
    _TOKENS tokens at least. All of them on other machines, and where devices or microbatches share rows."""
    rows, length = batch["tokens"].shape
    shared = subject.mesh.size > 1 or subject.config.microbatches > 1
    if shared or subject.mesh.devices.flat[0].platform != "cpu":
        return batch
    steps = _STEPS_AFTER if subject.started else _STEPS_BEFORE
    count = max(int(_FLOPS / (steps * row_flops(subject))), -(-_TOKENS // length), 1)
    return batch if count >= rows else {name: values[:count] for name, values in batch.items()}


def copied(state: TrainState) -> TrainState:
    """A state that the step may write over."""
    return _copied(state)


@jax.jit
def _copied(state: TrainState) -> TrainState:
    return jax.tree.map(jnp.copy, state)
