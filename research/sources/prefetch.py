"""Batches read ahead of the step that takes them."""

import contextlib
import queue
import threading
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from research.sources.types import Source, State

Batch = dict[str, jax.Array]


class Prefetch:
    """Reads a source's next batches in a thread and puts them on the devices. A context manager.

    To the caller it is `next(state) -> (batch, state)`, a pure function of its argument: what was read ahead is used
    where it is what was asked for, and dropped where it isn't.

    Args:
      source: of batches.
      put: this process's rows of a batch -> global arrays.
      depth: how many batches wait at most.
    """

    def __init__(self, source: Source, put: Callable[[dict[str, np.ndarray]], Batch], depth: int = 2):
        self.source, self._put, self._depth = source, put, depth
        self._expected: State | None = None
        self._stop = contextlib.ExitStack()

    def __enter__(self) -> "Prefetch":
        return self

    def __exit__(self, *_: Any) -> None:
        self._stop.close()

    def start(self, state: State) -> None:
        """Begins to read what follows `state`."""
        self._stop.close()
        ready: queue.Queue = queue.Queue(maxsize=self._depth)
        closed = threading.Event()

        def work(state: State) -> None:
            try:
                while not closed.is_set():
                    batch, state = self.source.next(state)
                    ready.put((self._put(batch), state, None))
            except BaseException as error:
                ready.put((None, None, error))

        def end() -> None:
            closed.set()
            while thread.is_alive():  # the thread may be waiting for room
                with contextlib.suppress(queue.Empty):
                    ready.get(timeout=0.05)

        self._ready, self._expected = ready, state
        thread = threading.Thread(target=work, args=(state,), daemon=True, name="prefetch")
        thread.start()
        self._stop.callback(end)

    def next(self, state: State) -> tuple[Batch, State]:
        """Returns the batch that follows `state`, and the state after it. Raises the source's error."""
        if state != self._expected:
            self.start(state)
        batch, self._expected, error = self._ready.get()
        if error is not None:
            raise error
        return batch, self._expected


class OnDemand:
    """Reads each batch when it is asked for, where that depends on the step before. What Prefetch does without a
    thread; see there."""

    def __init__(self, source: Source, put: Callable[[dict[str, np.ndarray]], Batch]):
        self.source, self._put = source, put

    def start(self, state: State) -> None:
        """Has nothing to begin."""

    def next(self, state: State) -> tuple[Batch, State]:
        """Returns the batch that follows `state`, and the state after it. Raises the source's error."""
        batch, state = self.source.next(state)
        return self._put(batch), state
