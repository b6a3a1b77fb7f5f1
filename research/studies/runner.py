"""Runs the stages of a study in order: in this process, or several at a time in processes of their own."""

import contextlib
import dataclasses
import functools
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TextIO

import jax

from research import config as config_lib
from research import files, signals
from research.errors import InputError, printable
from research.run import run
from research.run.console import describe, duration
from research.studies import execution, stages
from research.studies.execution import FAILED, STOPS, StageFailed
from research.studies.stages import Stage, finished, state

PROGRAM = (sys.executable, "-m", "research.studies.execution")


@dataclasses.dataclass
class Runner:
    """Runs what isn't done, and prints a line for each stage.

    A stage that another process is running is left to it; meanwhile others are run that don't need it.

    Attributes:
      stages: in an order in which each comes after its inputs; an input that isn't among them must be done.
      keep_going: after a failure, go on with what doesn't need that stage.
      jobs: how many stages run at a time in processes of their own; 0 runs one after the other in this process.
      commands: id of a stage -> command line for the record of its run.
      record: called after every change.
      program: what runs a stage in a process of its own, given its folder and its command.
      lost: id -> why it isn't done, of stages that failed and of those that need such a stage.
    """

    stages: Sequence[Stage]
    keep_going: bool = False
    jobs: int = 0
    commands: Mapping[str, str] = dataclasses.field(default_factory=dict)
    record: Callable[[], None] = lambda: None
    program: Sequence[str] = PROGRAM
    lost: dict[str, str] = dataclasses.field(default_factory=dict, init=False)

    def __post_init__(self) -> None:
        self._todo: list[Stage] = []
        self._children: dict[str, _Child] = {}
        self._seconds: dict[str, float] = {}  # id -> what a stage took
        self._labels = {s.id: f"[{n}/{len(self.stages)}] {s.name}" for n, s in enumerate(self.stages, start=1)}
        self._signals: list[int] = []
        self._stop = threading.Event()
        self._end: Exception | None = None  # once there is one, nothing more begins
        self._waiting = False

    def run(self) -> dict[str, str]:
        """Runs the stages; returns `lost`, which is empty unless `keep_going`.

        Raises:
          InputError: a run can't work on the devices here. Nothing has begun then.
          StageFailed: a stage came to no result, and not keep_going.
          run.Preempted: SIGTERM or SIGINT came.
        """
        unfinished = [stage for stage in self.stages if finished(stage) is None]
        # Who runs a stage already has checked them, and may have the devices to itself.
        if not (self.jobs and any(state(stage) == "running" for stage in unfinished)):
            check(unfinished, in_processes=self.jobs > 0)
        for stage in self.stages:
            if finished(stage) is None:
                self._todo.append(stage)
            else:
                self._print(stage, "done already")
        self.record()
        with self._handlers():
            while self._children or (self._todo and self._end is None):
                ended = self._collect()
                begun = self._end is None and self._begin()
                if not (ended or begun):
                    self._wait()
        if self._end is not None:
            raise self._end
        return self.lost

    def _begin(self) -> bool:
        """Settles or begins the first stage that can be; says whether there was one."""
        for stage in self._todo:
            if self._settle(stage):
                return True
            unfinished = {other.id for other in self._todo} | self._children.keys()
            if unfinished.isdisjoint(stage.inputs) and self._has_room() and self._start(stage):
                return True
        return False

    def _settle(self, stage: Stage) -> bool:
        """Drops a stage that another process has done, or that can't be done; says whether it did."""
        needs = [id for id in stage.inputs if id in self.lost]
        if finished(stage) is not None:
            self._print(stage, "done by another process")
        elif needs:
            self.lost[stage.id] = f"needs {needs[0]}"
            self._print(stage, f"left out: needs {', '.join(needs)}")
        else:
            return False
        self._todo.remove(stage)
        return True

    def _has_room(self) -> bool:
        return self.jobs == 0 or len(self._children) < self.jobs

    def _start(self, stage: Stage) -> bool:
        """Runs a stage here, or starts its process; False where another process has it."""
        with execution.lock(stage) as log:
            if log is None or finished(stage) is not None:
                return False
            Path(stage.workdir, stages.FAULT).unlink(missing_ok=True)
            stages.write_stage(stage)
            self._todo.remove(stage)
            self._waiting = False
            if self.jobs:
                self._spawn(stage, log)
            else:
                self._run_here(stage, log)
        self.record()
        return True

    def _spawn(self, stage: Stage, log: TextIO) -> None:
        """Starts a process for a stage.

        The lock on the log is the child's as well: it lasts as long as the child, also when this process is killed. A
        session of its own keeps Ctrl-C from reaching the child twice.
        """
        line = [*self.program, stage.workdir, self.commands.get(stage.id, "")]
        process = subprocess.Popen(
            line, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
        )
        self._children[stage.id] = _Child(stage, process, time.monotonic())
        self._print(stage, f"started, log in {log.name}")

    def _run_here(self, stage: Stage, log: TextIO) -> None:
        self.record()  # it runs now
        label, command, began = self._labels[stage.id], self.commands.get(stage.id, ""), time.monotonic()
        try:
            values = execution.run_stage(stage, log, label=label, command=command, stop=self._stop)
        except StageFailed as error:
            self._fail(stage, error)
        else:
            self._succeed(stage, values, time.monotonic() - began)
        if self._stop.is_set() and self._todo:  # it came when the run was about to end anyway
            self._end = run.Preempted(f"stopped after stage {stage.name}. The same command goes on from there.")

    def _collect(self) -> bool:
        """Takes note of signals and of processes that have ended; says whether one has."""
        while self._signals:
            number = self._signals.pop(0)
            text = f"passed on to {len(self._children)} running; waiting for them" if self._children else "stopping"
            print(f"{signal.Signals(number).name}: {text}", flush=True)
            for child in self._children.values():
                child.process.send_signal(number)
            where = f"in {', '.join(c.stage.name for c in self._children.values())}" if self._children else "waiting"
            self._end = run.Preempted(f"stopped {where}. The same command goes on from there.")
        ended = [child for child in self._children.values() if child.process.poll() is not None]
        for child in ended:
            del self._children[child.stage.id]
            self._close(child)
            self.record()
        return bool(ended)

    def _close(self, child: "_Child") -> None:
        """Takes note of how a process ended: its stage's files say it, else its status."""
        stage, status = child.stage, child.process.returncode
        took = time.monotonic() - child.began
        done = finished(stage)
        if done is not None:
            self._succeed(stage, done["metrics"], took)
        elif status in STOPS:
            self._print(stage, f"stopped after {duration(took)}")
            self._end = self._end or run.Preempted(f"stopped in stage {stage.name}. The same command goes on.")
        else:
            fault = files.read_json(Path(stage.workdir) / stages.FAULT, {})
            reason = fault.get("error") or execution.describe_status(stage, status)
            self._fail(stage, execution.failure(stage, reason, status if status > 0 else FAILED))

    def _succeed(self, stage: Stage, metrics: Mapping[str, float], seconds: float) -> None:
        self._seconds[stage.id] = seconds
        diverged = (finished(stage) or {}).get("diverged")
        end = f"diverged: {diverged}" if diverged else _summary(metrics)
        parts = [duration(seconds), end, f"ETA {duration(self._time_left())}" if self._todo else ""]
        self._print(stage, *filter(None, parts))

    def _fail(self, stage: Stage, error: StageFailed) -> None:
        self.lost[stage.id] = str(error)
        if self.keep_going or self._children:
            self._print(stage, f"failed: {error}")
        if not self.keep_going:
            self._end = self._end or error

    def _wait(self) -> None:
        busy = [stage.name for stage in self._todo if not self._children and state(stage) == "running"]
        if busy and not self._waiting:
            self._waiting = True
            print(f"waiting for another process, which runs {', '.join(busy)}", flush=True)
        time.sleep(0.05 if self._children else 0.5)

    def _time_left(self) -> float:
        """Seconds: each takes as long as those whose names differ in numbers alone, else as those of its kind."""
        timings = [(stage, self._seconds[stage.id]) for stage in self.stages if stage.id in self._seconds]
        left = [*self._todo, *(child.stage for child in self._children.values())]
        total = 0.0
        for stage in left:
            nearest = max(_likeness(stage, other) for other, _ in timings)
            alike = [seconds for other, seconds in timings if _likeness(stage, other) == nearest]
            total += sum(alike) / len(alike)
        return total / max(1, self.jobs)

    def _print(self, stage: Stage, *parts: str) -> None:
        print(printable("  ".join([self._labels[stage.id], *parts])), flush=True)

    @contextlib.contextmanager
    def _handlers(self) -> Iterator[None]:
        """SIGTERM, SIGINT and SIGHUP are noted, for `_collect`; inside a stage that runs here they interrupt it."""
        before = {}
        with contextlib.suppress(ValueError):  # only the main thread may
            for number in (each for each in signals.STOPS if signal.getsignal(each) != signal.SIG_IGN):
                before[number] = signal.signal(number, lambda received, _: self._signals.append(received))
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


@dataclasses.dataclass(frozen=True)
class _Child:
    """A process that runs a stage, and when it began by time.monotonic."""

    stage: Stage
    process: subprocess.Popen
    began: float


def run_stages(members: Sequence[Stage], **options: Any) -> dict[str, str]:
    """Runs stages; see Runner, whose options these are, and Runner.run."""
    return Runner(members, **options).run()


def check(members: Sequence[Stage], *, in_processes: bool = False) -> None:
    """Checks what can be checked of runs before any has begun, against the devices here.

    Args:
      members: stages to check.
      in_processes: they will run in other processes, so that this one must leave the devices to them.

    Raises:
      InputError: naming the stage, the field, the value and the remedy; or there are no devices.
    """
    for stage in members:
        # The model that a run starts from decides its architecture, and may not be there yet.
        if stage.kind == "train" and not stage.settings["model"]["init_from"]:
            devices = _count_devices_elsewhere() if in_processes else jax.device_count()
            try:
                config_lib.check(config_lib.parse(stage.settings), num_devices=devices)
            except InputError as error:
                raise InputError(f"stage {stage.name}: {error}") from error


@functools.cache
def _count_devices_elsewhere() -> int:
    """Asks another process: one that has touched a GPU keeps its memory, and of a TPU it is the only one."""
    line = [sys.executable, "-c", "import jax; print(jax.device_count())"]
    result = subprocess.run(line, capture_output=True, text=True, check=False)
    if result.returncode:
        reason = result.stderr.strip().splitlines()[-1:] or [f"exit status {result.returncode}"]
        raise InputError(f"jax finds no devices ({reason[0]}). Look at JAX_PLATFORMS, and at who uses them.")
    return int(result.stdout.split()[-1])


def _likeness(a: Stage, b: Stage) -> tuple[bool, bool]:
    return re.sub(r"\d+", "", a.name) == re.sub(r"\d+", "", b.name), a.kind == b.kind


def _summary(metrics: Mapping[str, float]) -> str:
    """The metrics that tell most, of the evaluation if there was one."""
    names = [f"eval/{name}" for name in ("loss", "accuracy", "agreement", "exact_match", "bits_per_byte")]
    names = [name for name in names if name in metrics] or ["train/loss"]
    return describe({name: metrics[name] for name in names if name in metrics})
