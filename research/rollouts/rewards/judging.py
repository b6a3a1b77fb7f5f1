"""Several rewards of the same answers: their values, their sum by weight, and what the log says of them."""

import sys
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from research.rollouts.rewards import Entry, Sample, workers


class Judged(NamedTuple):
    """Rewards of N answers by R rewards.

    Attributes:
      names: of the rewards.
      weights: [R] float32.
      values: [R, N] float32; NaN where a reward can't judge an answer.
      failed: [R, N] bool, where a reward was too slow or faulty.
    """

    names: tuple[str, ...]
    weights: np.ndarray
    values: np.ndarray
    failed: np.ndarray

    def total(self) -> np.ndarray:
        """The sum of the rewards by weight, [N] float32, over those that can judge an answer; NaN where none can, or
        one has failed."""
        known = ~np.isnan(self.values)
        sums = np.sum(np.where(known, self.values * self.weights[:, None], 0), axis=0, dtype=np.float32)
        return np.where(known.any(axis=0) & ~self.failed.any(axis=0), sums, np.float32(np.nan))

    def metrics(self) -> dict[str, float]:
        """Of each reward the mean and the standard deviation of its values, NAME and NAME_std, where it has some; and
        the shares of answers that it couldn't judge, NAME_none, and of those, NAME_failed, where it has failed."""
        metrics = {}
        for name, values, failed in zip(self.names, self.values, self.failed, strict=True):
            known = values[~np.isnan(values)].astype(np.float64)
            if len(known):
                metrics |= {name: float(known.mean()), f"{name}_std": float(known.std())}
            metrics |= {f"{name}_none": 1 - len(known) / len(values), f"{name}_failed": float(failed.mean())}
        return metrics


class Judge:
    """The rewards of a run, and the processes that compute them, which live as long as it does.

    It is a context: on leaving it the processes end, whatever has happened.
    """

    def __init__(self, entries: Mapping[str, Entry]) -> None:
        """Starts the processes, and doesn't wait for them."""
        self._entries = tuple(entries.values())
        self._pools: list[workers.Pool] = []
        self._faults: set[str] = set()  # that have been told
        try:
            for entry in self._entries:
                self._pools.append(workers.Pool(entry))
        except BaseException:
            self.close()
            raise

    def start(self) -> None:
        """Waits until all rewards are made. Raises InputError where one can't be."""
        workers.start(self._pools)

    def __call__(self, samples: Sequence[Sample]) -> Judged:
        """Judges answers. A new kind of fault is told once, on a line of standard error.

        Raises:
          InputError: a reward can't be made, refuses a record, or has never done but fail.
        """
        verdicts = workers.judge(self._pools, samples)
        for verdict in (each for one in verdicts for each in one if each.fault and each.fault not in self._faults):
            if len(self._faults) < _MOST_FAULTS:
                print(f"warning: {verdict.fault} Such answers aren't judged.", file=sys.stderr, flush=True)
            self._faults.add(verdict.fault)
        shape = len(self._entries), len(samples)
        values = np.array([[v.value for v in each] for each in verdicts], np.float32).reshape(shape)  # None is NaN
        failed = np.array([[bool(v.fault) for v in each] for each in verdicts], bool).reshape(shape)
        weights = np.array([entry.weight for entry in self._entries], np.float32)
        return Judged(tuple(entry.name for entry in self._entries), weights, values, failed)

    def close(self) -> None:
        """Ends the processes."""
        while self._pools:
            self._pools.pop().close()

    def __enter__(self) -> "Judge":
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


_MOST_FAULTS = 20
