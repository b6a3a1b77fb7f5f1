"""Worker processes that judge answers: one that takes too long, or that ends its process, costs its sample alone.

A worker is a program of its own (`python -m research.rollouts.rewards.workers`), neither forked nor sharing __main__
with the run, which has threads of JAX. It gets its reward's entry, then samples, through a socket, and answers with a
verdict for each. It ignores Ctrl-C, since the run ends it, and ends by itself where the run is gone.
"""

import collections
import contextlib
import math
import multiprocessing.connection
import numbers
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from typing import Any, NamedTuple

from research.errors import InputError, explain_own_error
from research.rollouts.rewards import Entry, Reward, Sample
from research.rollouts.rewards.types import LARGEST

Connection = multiprocessing.connection.Connection

_START_SECONDS = 300.0  # the user's file may import what takes long
_MOST_TOGETHER = 32  # samples that a worker is sent at once
_HOPELESS = 16  # faults, before it has judged anything, that end the run
_LONGEST = 400  # letters of a fault
_LOOK_SECONDS = 5.0  # how often an idle worker looks whether the run is there


class Verdict(NamedTuple):
    """What became of a sample.

    Attributes:
      value: the reward; None where it can't be judged.
      fault: why it wasn't judged, on a line; "" where the reward has spoken.
    """

    value: float | None
    fault: str = ""


class _Worker:
    """A process that judges.

    Attributes:
      connection: to it.
      pending: the numbers of the samples that it has been sent and not judged, in order.
      ready: whether its reward has been made.
      deadline: by when it has to say something, by time.monotonic().
    """

    def __init__(self, entry: Entry) -> None:
        mine, other = socket.socketpair()
        self.entry = entry
        self.connection = Connection(mine.detach())
        with other:
            os.set_inheritable(other.fileno(), True)
            self.process = subprocess.Popen(
                [sys.executable, "-m", __spec__.name, str(other.fileno())],
                pass_fds=[other.fileno()],
                stdin=subprocess.DEVNULL,
                # A reward that uses JAX must not take the run's devices.
                env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "JAX_PLATFORMS": "cpu"},
                start_new_session=True,  # Ctrl-C of a terminal goes to the run alone
            )
        self.pending: collections.deque[int] = collections.deque()
        self.ready = False
        self.deadline = time.monotonic() + _START_SECONDS
        self.connection.send(entry)

    def end(self, *, patience: float = 0.0) -> int | None:
        """Ends the process and what it has started; returns the status that it had ended with by itself, or None.

        Args:
          patience: how many seconds it has to do so.
        """
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(patience)
        status = self.process.returncode
        if status is None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()
        self.connection.close()
        return status


class Pool:
    """The workers of one reward.

    Attributes:
      entry: the reward.
    """

    def __init__(self, entry: Entry) -> None:
        self.entry = entry
        self._workers = [_Worker(entry) for _ in range(entry.workers)]
        self._samples: Sequence[Sample] = ()
        self._queue: collections.deque[int] = collections.deque()
        self._verdicts: dict[int, Verdict] = {}
        self._faults = 0.0  # before the first answer that it judges; from then on below 0

    def close(self) -> None:
        """Ends the processes."""
        while self._workers:
            self._workers.pop().end()

    def begin(self, samples: Sequence[Sample]) -> None:
        """Takes on samples; `advance` judges them."""
        self._samples, self._queue, self._verdicts = samples, collections.deque(range(len(samples))), {}
        for worker in self._workers:
            self._feed(worker)

    @property
    def waits_for(self) -> dict[Connection, float]:
        """The connections that are to say something, and by when, by time.monotonic()."""
        return {worker.connection: worker.deadline for worker in self._workers if worker.pending or not worker.ready}

    @property
    def verdicts(self) -> list[Verdict]:
        """Of all samples, once nothing is waited for."""
        return [self._verdicts[i] for i in range(len(self._samples))]

    def advance(self, spoken: Sequence[Connection]) -> None:
        """Reads what workers have said, replaces those that are dead or too late, and hands out samples.

        Raises:
          InputError: the reward can't be made, or refuses a record, or nothing but faults comes of it.
        """
        now = time.monotonic()
        for i, worker in enumerate(self._workers):
            if worker.connection not in self.waits_for:
                continue
            alive = self._read(worker) if worker.connection in spoken else now < worker.deadline
            if not alive:
                self._workers[i] = self._replace(worker, late=worker.connection not in spoken)
            self._feed(self._workers[i])

    def _read(self, worker: _Worker) -> bool:
        """Takes what a worker has said; returns whether it lives."""
        try:
            while True:
                message = worker.connection.recv()
                if isinstance(message, str):
                    raise InputError(message)
                if worker.ready:
                    self._settle(worker.pending.popleft(), Verdict(*message))
                worker.ready = True
                worker.deadline = time.monotonic() + self.entry.seconds
                if not worker.connection.poll():
                    return True
        except (EOFError, OSError):
            return False

    def _replace(self, worker: _Worker, *, late: bool) -> _Worker:
        """A new worker in the place of one that died or is late. The sample that it was at has no reward."""
        status, name = worker.end(patience=0.0 if late else 1.0), f"rewards.{self.entry.name}"
        limit = f"{self.entry.field('seconds')} = {self.entry.seconds:g}" if worker.ready else f"{_START_SECONDS:g} s"
        reason = f"took longer than {limit}." if late else f"its process ended with status {status}."
        if not worker.ready:
            raise InputError(f"{name}: can't be made: {reason} Run its code by itself to see why.")
        if worker.pending:
            self._settle(worker.pending.popleft(), Verdict(None, f"{name}: {reason}"))
        self._queue.extendleft(reversed(worker.pending))
        return _Worker(self.entry)

    def _settle(self, number: int, verdict: Verdict) -> None:
        """Takes a verdict. Raises InputError where the first ones are all faults."""
        self._verdicts[number] = verdict
        self._faults = self._faults + 1 if verdict.fault else -math.inf
        if self._faults == _HOPELESS:
            raise InputError(f"{verdict.fault} The reward has judged none of the first {_HOPELESS} answers.")

    def _feed(self, worker: _Worker) -> None:
        """Sends samples to a worker that waits for some."""
        if not worker.ready or worker.pending or not self._queue:
            return
        share = -(-len(self._queue) // (2 * len(self._workers)))  # so that the last ones end at about the same time
        worker.pending.extend(self._queue.popleft() for _ in range(min(share, _MOST_TOGETHER)))
        worker.deadline = time.monotonic() + self.entry.seconds
        with contextlib.suppress(OSError):  # it has died: its connection says so, and is waited for
            worker.connection.send([self._samples[i] for i in worker.pending])


def start(pools: Sequence[Pool]) -> None:
    """Waits until all rewards are made. Raises InputError where one can't be."""
    for pool in pools:
        pool.begin(())
    _finish(pools)


def judge(pools: Sequence[Pool], samples: Sequence[Sample]) -> list[list[Verdict]]:
    """The verdicts of each pool on all samples.

    Raises:
      InputError: see Pool.advance.
    """
    for pool in pools:
        pool.begin(samples)
    _finish(pools)
    return [pool.verdicts for pool in pools]


def _finish(pools: Sequence[Pool]) -> None:
    """Waits for all that pools wait for."""
    while awaited := {connection: at for pool in pools for connection, at in pool.waits_for.items()}:
        spoken = multiprocessing.connection.wait(list(awaited), max(0.0, min(awaited.values()) - time.monotonic()))
        for pool in pools:
            pool.advance(spoken)


def _number(value: Any) -> float | None:
    """What a reward returned, as a number. Raises TypeError where it is none."""
    if hasattr(value, "item"):  # of numpy, or an array with one number
        value = value.item()
    if value is None:
        return None
    if not isinstance(value, numbers.Real) or not -LARGEST < value < LARGEST:
        raise TypeError(f"returned {value!r:.80}, and a reward is a finite number or None")
    return float(value)


def _judged(entry: Entry, reward: Reward, sample: Sample) -> tuple[float | None, str]:
    """The fields of a Verdict, whose class has another name here than in the run. Raises InputError where the reward
    does."""
    try:
        return _number(reward(sample)), ""
    except InputError:
        raise
    except BaseException as error:  # sys.exit too
        text = f"{type(error).__name__}: {' '.join(str(error).split())[:_LONGEST]}"
        return None, f"rewards.{entry.name}: {explain_own_error(error, entry.file) or text}."


def _serve(connection: Connection) -> None:
    """Makes the reward of an entry and judges samples until the run closes the connection or is gone."""
    run = os.getppid()
    os.register_at_fork(after_in_child=connection.close)  # a copy of this process has nothing to say to the run
    entry = connection.recv()
    try:
        reward = entry.make()
        connection.send(None)
        while True:
            while not connection.poll(_LOOK_SECONDS):
                if os.getppid() != run:
                    return
            for sample in connection.recv():
                # The kernel ends a process that is stuck, where nobody is left to do it.
                signal.setitimer(signal.ITIMER_REAL, entry.seconds + _LOOK_SECONDS)
                connection.send(_judged(entry, reward, sample))
                signal.setitimer(signal.ITIMER_REAL, 0)
    except InputError as error:
        connection.send(str(error))


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    os.dup2(2, 1)  # what a reward prints is no result
    with contextlib.suppress(EOFError, OSError):
        _serve(Connection(int(sys.argv[1])))
