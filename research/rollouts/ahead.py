"""The rollout that waits while the one before it is trained on (one step off).

Its answers are written by the policy as it was before those updates, in a thread where there is one device. Where there
are several, whose programs must not meet, they are written before the updates, with the same result.
"""

import concurrent.futures
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from research.rollouts.buffer import Arrays
from research.rollouts.collection import Group, Metrics

OF_GROUPS = ("lengths", "stopped", "rewards", "greedy")  # what Credit reads of a group
WAITING = "waiting"  # its place in Place.buffer and Place.source


class Drawn(NamedTuple):
    """A rollout that isn't learned from yet.

    Attributes:
      rows: as batch fields [N, T].
      groups: P of them.
      row: the place of the next prompt.
      version: updates of the policy that wrote it.
      metrics: what is reported of it.
    """

    rows: Arrays
    groups: Sequence[Group]
    row: int
    version: int
    metrics: Metrics

    def arrays(self) -> dict[str, np.ndarray]:
        """What Place.buffer has of it: the rows, and [P, ...] of the groups."""
        return self.rows | {name: np.stack([getattr(group, name) for group in self.groups]) for name in OF_GROUPS}

    def facts(self) -> dict[str, Any]:
        """What Place.source has of it, of JSON types."""
        return {
            "row": self.row,
            "version": self.version,
            "metrics": {name: list(x) for name, x in self.metrics.items()},
        }


def restored(arrays: Mapping[str, Any], facts: Mapping[str, Any]) -> Drawn:
    """The rollout that `Drawn.arrays` and `Drawn.facts` are of; of its groups only OF_GROUPS are known."""
    values = {name: np.asarray(x) for name, x in arrays.items()}
    columns = [values.pop(name) for name in OF_GROUPS]
    groups = [
        Group(None, None, lengths, None, stopped, rewards, np.zeros(rewards.shape, bool), greedy)
        for lengths, stopped, rewards, greedy in zip(*columns, strict=True)
    ]
    metrics = {name: (float(total), float(weight)) for name, (total, weight) in facts["metrics"].items()}
    return Drawn(values, groups, facts["row"], facts["version"], metrics)


class UnderWay:
    """The rollout that is being drawn, if any.

    Args:
      pool: of one thread; None where rollouts are drawn at once.
    """

    def __init__(self, pool: concurrent.futures.Executor | None) -> None:
        self._pool = pool
        self._number, self._future = -1, None

    @property
    def apart(self) -> bool:
        """Whether updates run meanwhile, which may delete the parameters."""
        return self._pool is not None

    def begin(self, number: int, draw: Callable[[], Drawn]) -> None:
        """Begins to draw rollout `number`."""
        if self._pool is None:
            self._future = concurrent.futures.Future()
            self._future.set_result(draw())
        else:
            self._future = self._pool.submit(draw)
        self._number = number

    def get(self, number: int) -> Drawn | None:
        """Rollout `number`, once it is there; None where it isn't under way. Raises what went wrong."""
        return self._future.result() if self._future is not None and number == self._number else None


def copied(params: Any) -> Any:
    """Parameters that an update won't delete."""
    return jax.tree.map(lambda x: x.copy(), params)
