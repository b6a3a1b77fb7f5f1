"""A study: an ordered set of stages that name each other's outputs, planned from one experiment file.

research/commands/study.py is the command, and says what the file has; docs/studies.md tells more.
"""

import dataclasses
import importlib.metadata
import inspect
import json
import os
import shlex
import sys
from collections.abc import Callable, Generator, Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

from ml_collections import ConfigDict

from research import cli, files
from research.errors import InputError, did_you_mean, own_code
from research.run import run
from research.studies import stages
from research.studies.execution import FAILED, StageFailed
from research.studies.runner import run_stages
from research.studies.stages import Plan, Stage, finished, state
from research.studies.sweep import flag_value

RECORD = "study.json"  # in the study's workdir: its stages, where they are, and how they stand
UNKNOWN = "more stages follow from the results of these. The same command goes on with them once these are done."

Report = Callable[[str], None]
Rounds = Generator[None, None, Report | None]  # adds stages, yields until they are done, adds more; ends with a report


@dataclasses.dataclass
class Study:
    """A study that has been planned: nothing is written yet.

    Attributes:
      add: has the stages, each after those that it needs.
      report: called with the workdir once all stages are done; None where the study makes none.
      workdir: of the study: its record and report.
      command: the command line of this study.
      config: of the experiment, for the record.
      rounds: what adds the stages that depend on results of these; None where there are none, or no more.
    """

    add: Plan
    report: Report | None
    workdir: str
    command: Sequence[str]
    config: Mapping[str, Any]
    rounds: Rounds | None = None

    @property
    def stages(self) -> list[Stage]:
        return self.add.stages

    def proceed(self) -> list[Stage]:
        """Plans as far as results are there; returns the stages that this adds."""
        before = len(self.stages)
        while self.rounds is not None and all(finished(stage) is not None for stage in self.stages):
            try:
                next(self.rounds)
            except StopIteration as end:
                self.rounds, self.report = None, end.value
        return self.stages[before:]

    def run(self, *, keep_going: bool = False, jobs: int = 0) -> int:
        """Runs what isn't done, and makes the report; returns the exit status. See Runner for the arguments."""
        store = os.path.dirname(self.stages[0].workdir)
        print(f"{len(self.stages)} stages in {store}, the study in {self.workdir}", flush=True)
        lost = self._run(self.stages, keep_going=keep_going, jobs=jobs)
        while more := self.proceed():
            print(f"{len(more)} more stages, which follow from these", flush=True)
            lost |= self._run(more, keep_going=keep_going, jobs=jobs)
        if self.rounds is not None:
            print(UNKNOWN, file=sys.stderr)
        elif self.report is not None:
            self.report(self.workdir)
        for id, reason in lost.items():
            print(f"not done: {id}: {reason}", file=sys.stderr)
        return FAILED if lost else 0

    def run_one(self, name: str) -> None:
        """Runs the stage with this name or id.

        Raises:
          InputError: there is none, or what it needs isn't done.
        """
        stage = self._find(name)
        for other in self.stages:
            if other.id in stage.inputs and finished(other) is None:
                raise InputError(
                    f"--only={name}: needs {other.name} in {other.workdir}, which isn't done. Run it first."
                )
        self._run([stage])

    def make_report(self) -> None:
        """Makes the report of what is done.

        Raises:
          InputError: the study makes none, or none yet.
        """
        if self.rounds is not None:
            raise InputError(f"--report: {UNKNOWN}")
        if self.report is None:
            raise InputError("--report: this study makes none. Let its study(config, add) return a function.")
        self.record()
        self.report(self.workdir)

    def list(self) -> None:
        """Prints a line for each stage: how it stands, where it is, and what it needs."""
        for number, stage in enumerate(self.stages, start=1):
            after = f"  after {' '.join(stage.inputs)}" if stage.inputs else ""
            print(f"[{number}/{len(self.stages)}] {stage.name}  {state(stage)}  {stage.workdir}{after}", flush=True)
        if self.rounds is not None:
            print(UNKNOWN, flush=True)

    def record(self) -> None:
        """Writes study.json. States are read from disk, so that it is right whichever process writes it."""
        entries = []
        for stage in self.stages:
            entry = {"name": stage.name, "kind": stage.kind, "workdir": stage.workdir, "inputs": stage.inputs}
            fault = files.read_json(os.path.join(stage.workdir, stages.FAULT), {})
            entries.append(entry | {"state": state(stage)} | fault)
        about = {"command": shlex.join(self.command), "config": self.config, "versions": _versions()}
        os.makedirs(self.workdir, exist_ok=True)
        files.write_json(Path(self.workdir) / RECORD, {**about, "stages": entries})

    def _run(self, members: Sequence[Stage], **options: Any) -> dict[str, str]:
        commands = dict.fromkeys((stage.id for stage in members), shlex.join(self.command))
        try:
            return run_stages(members, commands=commands, record=self.record, **options)
        except (StageFailed, run.Preempted):
            self.record()
            raise

    def _find(self, name: str) -> Stage:
        matches = [stage for stage in self.stages if name in (stage.id, stage.name)]
        if len(matches) == 1:
            return matches[0]
        if matches:
            ids = ", ".join(stage.id for stage in matches)
            raise InputError(f"--only={name}: several stages have this name: {ids}. Give one of these.")
        raise InputError(f"--only={name}: no such stage.{did_you_mean(name, {stage.name for stage in self.stages})}")


def plan(named: str, config: ConfigDict, workdir: str, overrides: Mapping[str, Any]) -> Study:
    """Asks an experiment's file for the stages of its study.

    Args:
      named: experiments/x.py[:VARIANT], as --config has it.
      config: its config, overrides applied.
      workdir: of the study.
      overrides: dotted field -> value, of the command line; for the record.

    Raises:
      InputError: there is no study, it has no stage, or a stage can't work.
    """
    path = named.partition(":")[0]
    if "study" not in config:
        raise InputError(f"--config={path}: its config has no section `study`. Run it with research.main.")
    module = _load(path)
    store = os.path.expanduser(config.study.get("store", "")) or os.path.join(
        os.path.dirname(os.path.normpath(workdir)), "store"
    )
    add = Plan(store)
    with own_code(path):
        report = module.study(config, add)
    rounds = _in_own_code(path, report) if inspect.isgenerator(report) else None
    command = ["python", "-m", "research", "study", f"--config={named}", f"--workdir={workdir}"]
    command += [f"--config.{field}={flag_value(field, value)}" for field, value in overrides.items()]
    about = json.loads(config.to_json_best_effort())
    planned = Study(add, None if rounds else report, workdir, command, about, rounds)
    planned.proceed()
    if not add.stages:
        raise InputError(f"{path}: its study(config, add) adds no stage.")
    return planned


def _in_own_code(path: str, rounds: Rounds) -> Rounds:
    """The same rounds; an exception in them is told as one of the user's file."""
    with own_code(path):
        return (yield from rounds)


def _load(path: str) -> ModuleType:
    module = cli.load_module(path)
    if not hasattr(module, "study"):
        raise InputError(f"--config={path}: it defines no study(config, add). See docs/studies.md for what that is.")
    return module


def _versions() -> dict[str, str]:
    packages = ("jax", "numpy", "understudy")
    return {"python": sys.version.split()[0]} | {name: importlib.metadata.version(name) for name in packages}
