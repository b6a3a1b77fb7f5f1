"""Several rewards of the same answers: their values, and their sum by weight."""

import sys
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from research.rollouts.rewards import Entry, Sample, workers

_MOST_FAULTS = 20  # that are printed


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
        values = self.kept()
        known = ~np.isnan(values)
        sums = np.sum(np.where(known, values * self.weights[:, None], 0), axis=0, dtype=np.float32)
        return np.where(known.any(axis=0), sums, np.float32(np.nan))

    def kept(self) -> np.ndarray:
        """The values, [R, N] float32; NaN for all rewards of an answer with which one has failed."""
        return np.where(self.failed.any(axis=0), np.float32(np.nan), self.values)


class Judge:
    """Rewards, and the processes that compute them. What a model of the run gives is NaN here.

    It is a context: on leaving it the processes end, whatever has happened.

    Attributes:
      entries: the rewards.
    """

    def __init__(self, entries: Mapping[str, Entry]) -> None:
        """Starts the processes, and doesn't wait for them."""
        self.entries = tuple(entries.values())
        self._pools: dict[str, workers.Pool] = {}
        self._faults: set[str] = set()  # that have been told
        try:
            for entry in (entry for entry in self.entries if not entry.by_model):
                self._pools[entry.name] = workers.Pool(entry)
        except BaseException:
            self.close()
            raise

    def start(self) -> None:
        """Waits until all rewards are made. Raises InputError where one can't be."""
        workers.start(list(self._pools.values()))

    def __call__(self, samples: Sequence[Sample]) -> Judged:
        """Judges answers. A new kind of fault is told once, on a line of standard error.

        Raises:
          InputError: a reward can't be made, refuses a record, or has never done but fail.
        """
        judged = dict(zip(self._pools, workers.judge(list(self._pools.values()), samples), strict=True))
        verdicts = [judged.get(entry.name, [workers.Verdict(None)] * len(samples)) for entry in self.entries]
        for verdict in (each for one in verdicts for each in one if each.fault and each.fault not in self._faults):
            if len(self._faults) < _MOST_FAULTS:
                print(f"warning: {verdict.fault} Such answers aren't judged.", file=sys.stderr, flush=True)
            self._faults.add(verdict.fault)
        shape = len(self.entries), len(samples)
        values = np.array([[v.value for v in each] for each in verdicts], np.float32).reshape(shape)  # None is NaN
        failed = np.array([[bool(v.fault) for v in each] for each in verdicts], bool).reshape(shape)
        weights = np.array([entry.weight for entry in self.entries], np.float32)
        return Judged(tuple(entry.name for entry in self.entries), weights, values, failed)

    def close(self) -> None:
        """Ends the processes."""
        while self._pools:
            self._pools.popitem()[1].close()

    def __enter__(self) -> "Judge":
        return self

    def __exit__(self, *error: object) -> None:
        self.close()
