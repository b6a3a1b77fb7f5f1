"""The loop: every step a batch and an update; at intervals metrics, an evaluation, a checkpoint."""

import contextlib
import dataclasses
import math
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax

from research import signals
from research.config import CheckpointConfig, Config
from research.devices import distributed
from research.errors import InputError, Unavailable, did_you_mean
from research.optim import Rates
from research.rollouts.experience import Experience, Place
from research.run.checkpoint import Checkpointer
from research.run.window import Diverged, Window
from research.sources import streaming
from research.train import Metrics, TrainState

Evaluate = Callable[[TrainState, Any, int], dict[str, float]]  # (state, frozen, step) -> scores


class Preempted(Exception):
    """The run was asked to stop by a signal, has saved, and can be started again."""


@dataclasses.dataclass(frozen=True)
class Loop:
    """One loop for every objective and every kind of experience.

    Attributes:
      config: of the run.
      workdir: of the run, for messages.
      record: what its config.json holds.
      step: the compiled train step: (state, frozen, batch, rates) -> (state, metrics).
      rates: the learning rates that it takes.
      experience: where batches come from.
      evaluate: measures and logs; called every `eval.every` and after the last step, where that isn't 0.
      saver: of checkpoints.
      window: of metrics and time.
      progress: is told of each step that begins, and of each rollout before it: of the step that was made last.
      stop: an event that asks the loop to save and end.
      started: unix seconds of the process's start.
      scored: step -> what checkpoint.best_metric was there, at the step that the loop begins with and before it.
    """

    config: Config
    workdir: str
    record: Mapping[str, Any]
    step: Callable[[TrainState, Any, Any, Rates], tuple[TrainState, Metrics]]
    rates: Rates
    experience: Experience
    evaluate: Evaluate | None
    saver: Checkpointer
    window: Window
    progress: Callable[[int], None]
    stop: threading.Event
    started: float
    scored: Mapping[int, float] = dataclasses.field(default_factory=dict)

    def run(self, state: TrainState, frozen: Any, place: Place) -> int:
        """Trains until the last step, and returns its number: that of config.steps, or of the end of patience.

        Raises:
          Preempted: the stop came; a checkpoint is written.
          Diverged: too many updates in a row were skipped; a checkpoint is written.
        """
        config, first, scored = self.config, int(state.step), dict(self.scored)
        if first and out_of_patience(config.checkpoint, scored):  # it ended here, and was killed before it said so
            return first
        self.window.begin_at(place.source.get("row", 0))
        pending = None  # metrics are read one step late, so that the host doesn't wait for the step it has just sent
        self.window.start_clock()
        try:
            for step in range(first + 1, config.steps + 1):
                self.progress(step - 1)
                with self.window.waiting():
                    batch, place, gathered = self.experience.next(state, frozen, place)
                self.progress(step)
                self.window.note(streaming.passed(place.source))
                state, out = self.step(state, frozen, batch, self.rates)
                if pending is not None:
                    self.window.add(*pending)
                pending = step, out | gathered
                if step == first + 1:
                    self._first_step_done(step, out)
                stopping, last = should_stop(self.stop, step), step == config.steps
                if stopping:
                    self.window.writer.print("asked to stop: saving first")
                evaluating = config.eval.every and (last or (step % config.eval.every == 0 and not stopping))
                saving = last or stopping or (config.checkpoint.every and step % config.checkpoint.every == 0)
                if not (evaluating or saving):
                    continue
                self.window.add(*pending)
                pending = None
                scores = self.evaluate(state, frozen, step) if evaluating else {}
                scored |= best_score(config.checkpoint, step, scores)
                over = not last and bool(evaluating) and out_of_patience(config.checkpoint, scored)
                if saving or over:
                    self._save(state, place, scores)
                if over:
                    self.window.writer.print(
                        f"step {step}: no new best {config.checkpoint.best_metric} in {config.checkpoint.patience} "
                        "evaluations (checkpoint.patience): this is the end"
                    )
                    return step
                if stopping and not last:
                    raise self._preempted(step)
                self.window.start_clock()
        except Diverged:
            self._save(state, place, {})
            raise
        except InputError:  # a record that was streamed: what was learned so far isn't lost with it
            if first < int(state.step) and not distributed.several():
                self._save(state, place, {})
            raise
        except Unavailable:  # nothing is under way that a checkpoint could wait for
            if pending is not None:
                self.window.add(*pending)
            self.saver.save(state, place, self.record, {})
            if self.stop.is_set():  # servers were no longer waited for
                raise self._preempted(int(state.step)) from None
            raise
        finally:
            self.saver.wait()
        return config.steps

    def _preempted(self, step: int) -> Preempted:
        return Preempted(
            f"saved step {step} of {self.config.steps} in {self.workdir}. The same command goes on from there."
        )

    def _first_step_done(self, step: int, out: Metrics) -> None:
        """Waits for the first step, and begins what would have been in its way."""
        jax.block_until_ready(out)
        seconds = time.time() - self.started
        self.window.writer.write(step, {"startup/seconds_to_first_step": seconds})
        self.window.show_first(step, out, seconds)
        self.saver.prepare()
        self.window.measure_peak()
        self.window.start_clock(afresh=True)

    def _save(self, state: TrainState, place: Place, scores: dict[str, float]) -> None:
        self.saver.save(state, self.experience.settled(place), self.record, scores)


def check_best(name: str, scores: Mapping[str, float]) -> None:
    """Raises InputError where checkpoint.best_metric is set, and none of an evaluation's scores."""
    if name and name not in scores:
        raise InputError(
            f"checkpoint.best_metric = {name!r}: the evaluation gives no such metric.{did_you_mean(name, scores)}"
        )


def best_score(checkpoint: CheckpointConfig, step: int, scores: Mapping[str, float]) -> dict[int, float]:
    """Step -> checkpoint.best_metric, of an evaluation at a step that gives it; else nothing."""
    return {step: scores[checkpoint.best_metric]} if checkpoint.best_metric in scores else {}


def out_of_patience(checkpoint: CheckpointConfig, scored: Mapping[int, float]) -> bool:
    """Whether the last `patience` evaluations gave no new best.

    Args:
      checkpoint: of the config.
      scored: step -> the best metric's value at its evaluation.
    """
    values = [scored[step] for step in sorted(scored)]
    sign = 1.0 if checkpoint.best_mode == "min" else -1.0
    best = min(range(len(values)), key=lambda i: (math.isnan(values[i]), sign * values[i]), default=0)
    return 0 < checkpoint.patience <= len(values) - 1 - best


@contextlib.contextmanager
def stop_on_signals(stop: threading.Event) -> Iterator[threading.Event]:
    """An event that SIGTERM, SIGINT and SIGHUP set, so that the loop can save first. A second SIGINT interrupts.

    Of several processes each must stop at the same step: SIGTERM goes to JAX, see distributed.should_stop, SIGHUP is
    handed to it as SIGTERM, and SIGINT interrupts at once.
    """
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return
    several = distributed.several()

    def handle(number: int, _: Any) -> None:
        if several and number == signal.SIGHUP:
            os.kill(os.getpid(), signal.SIGTERM)
            return
        again = stop.is_set()
        stop.set()
        if number == signal.SIGINT and (several or again):
            raise KeyboardInterrupt

    numbers = (signal.SIGINT, signal.SIGHUP) if several else signals.STOPS
    numbers = [number for number in numbers if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN]
    before = {number: signal.signal(number, handle) for number in numbers}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def should_stop(stop: threading.Event, step: int) -> bool:
    """Whether to save and end after this step. Of several processes, one that was interrupted ends here at the latest:
    a library may have swallowed the KeyboardInterrupt."""
    if distributed.several() and stop.is_set():
        raise KeyboardInterrupt
    return stop.is_set() or distributed.should_stop(step)
