"""What the train step trains on, between the source of data and the step.

The plain kind passes the source's batches on. Others make their batches with the models as they are at that moment: the
policy answers prompts, rewards judge answers, a buffer serves several updates.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np

from research.sources.adaptive import CHANCES
from research.sources.prefetch import OnDemand, Prefetch

Batch = dict[str, jax.Array]
Metrics = dict[str, tuple[float | jax.Array, float | jax.Array]]  # name -> (sum, weight)


class Place(NamedTuple):
    """How far an experience has come: saved with every checkpoint, so that a resumed run goes on as if uninterrupted.

    Attributes:
      source: the source's state, of JSON types.
      buffer: pytree of global arrays, such as answers that wait to be trained on and the count of those that were.
    """

    source: dict[str, Any]
    buffer: Any = ()


class Experience(NamedTuple):
    """Where the batches of a run come from.

    Attributes:
      spec: field -> ShapeDtypeStruct with sharding, of the batches that the step is traced with.
      buffer: ShapeDtypeStructs with shardings of Place.buffer; a checkpoint is restored onto them, whatever mesh it was
        saved on.
      init: () -> the place before the first batch. A source begins to be read.
      next: (train state, frozen parameters by role, place) -> (batch, the next place, metrics). Its result depends on
        its arguments alone.
      settled: a place -> the same for a checkpoint, with what is still under way.
      samples: n -> of the answers that were written last, those to the first n prompts, for people: {"prompt",
        "answers": {"text", "reward"} each} each; none where nothing is written.
    """

    spec: Mapping[str, jax.ShapeDtypeStruct]
    buffer: Any
    init: Callable[[], Place]
    next: Callable[[Any, Any, Place], tuple[Batch, Place, Metrics]]
    settled: Callable[[Place], Place] = lambda place: place
    samples: Callable[[int], list[dict[str, Any]]] = lambda n: []


Rollout = Callable[[Any, Any, Batch], Batch]  # (train state, frozen, batch) -> batch


def make(
    batches: Prefetch | OnDemand, spec: Mapping[str, jax.ShapeDtypeStruct], rollout: Rollout | None = None
) -> Experience:
    """The source's batches; with `rollout`, some of their answers are the policy's own."""
    plain = from_source(batches, spec)
    return plain if rollout is None else answered(plain, rollout)


def from_source(batches: Prefetch | OnDemand, spec: Mapping[str, jax.ShapeDtypeStruct]) -> Experience:
    """Passes the batches of a source on."""

    def init() -> Place:
        first = batches.source.init()
        batches.start(first)
        return Place(first)

    def step(state: Any, frozen: Any, place: Place) -> tuple[Batch, Place, Metrics]:
        batch, source = batches.next(place.source)
        return batch, place._replace(source=source), {}

    return Experience(spec, (), init, step)


def answered(experience: Experience, rollout: Rollout) -> Experience:
    """The same batches after `rollout`, which puts answers of the policy in place of the data's."""

    def step(state: Any, frozen: Any, place: Place) -> tuple[Batch, Place, Metrics]:
        batch, place, metrics = experience.next(state, frozen, place)
        return rollout(state, frozen, batch), place, metrics

    return experience._replace(next=step)


def drawn(experience: Experience, chances: Callable[[Any], Any]) -> Experience:
    """The same experience of an adaptive source, whose next batch is drawn by what the train state says.

    Args:
      experience: whose Place.source is the state of sources.adaptive.
      chances: train state -> [S], of each part; the host waits for them.
    """

    def step(state: Any, frozen: Any, place: Place) -> tuple[Batch, Place, Metrics]:
        now = [float(chance) for chance in np.asarray(jax.device_get(chances(state)))]
        return experience.next(state, frozen, place._replace(source={**place.source, CHANCES: now}))

    return experience._replace(next=step)
