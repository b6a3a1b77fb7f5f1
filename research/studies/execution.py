"""Runs one stage of a study in this process: python -m research.studies.execution FOLDER [COMMAND].

FOLDER holds the stage's stage.json. The runner starts this for stages that run in processes of their own.
"""

from research.devices import startup

if __name__ == "__main__":
    startup.leave_loops()
    startup.use_huge_pages()

import contextlib
import fcntl
import gc
import importlib
import io
import os
import re
import shlex
import shutil
import signal
import sys
import threading
import time
import traceback
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import ModuleType
from typing import TextIO

from research import config as config_lib
from research import console, files, signals
from research.errors import Exit, InputError
from research.run import run
from research.studies import stages
from research.studies.stages import Stage

FAILED, BAD_INPUT, DIVERGED, STOPPED = Exit.FAILED, Exit.BAD_INPUT, Exit.DIVERGED, Exit.PREEMPTED
STOPS = (STOPPED, Exit.INTERRUPTED, *(-number for number in signals.STOPS))  # statuses of what was told to stop


class StageFailed(Exception):
    """A stage came to no result. `status` is the exit status that its error has in research.main."""

    def __init__(self, message: str, status: int):
        super().__init__(message)
        self.status = status


def run_stage(
    stage: Stage, log: TextIO, *, label: str = "", command: str = "", stop: threading.Event | None = None
) -> dict[str, float]:
    """Runs a stage in this process; returns the final metrics, none of a run that diverged and may.

    Args:
      stage: its folder holds stage.json.
      log: takes what it prints.
      label: stands before the newest line of the log, which a terminal shows.
      command: for the record of a run.
      stop: is set where the run was told to stop, and ended anyway.

    Raises:
      StageFailed: with the stage's error, folder and exit status.
      run.Preempted: SIGTERM or SIGINT came.
    """
    stopped = run.Preempted(f"stopped in stage {stage.name}. The same command goes on from there.")
    output, began = _Output(log, label), (time.time(), time.process_time())
    try:
        with interruptible(stopped), contextlib.redirect_stderr(output), contextlib.redirect_stdout(output):
            if stage.kind == "train":
                parsed = config_lib.parse(stage.settings)
                return run.run(
                    parsed, stage.workdir, started=time.time(), command=command, stop=stop or threading.Event()
                )
            status = _call(stage)
    except (InputError, run.Diverged) as error:
        _note(log, f"error: {error}\n")
        status = BAD_INPUT if isinstance(error, InputError) else DIVERGED
        fault = failure(stage, str(error), status)
        if status == DIVERGED and stage.may_diverge:
            return {}
        raise fault from error
    except (run.Preempted, KeyboardInterrupt):
        raise
    except Exception as error:
        _note(log, traceback.format_exc())
        raise failure(stage, f"{type(error).__name__}: {error}", FAILED) from error
    finally:
        output.clear()
        _add_cost(stage, time.time() - began[0], time.process_time() - began[1])
        gc.collect()  # the arrays of a run are held in cycles, and the next needs the memory
    if status in STOPS:
        raise stopped
    if status:
        raise failure(stage, describe_status(stage, status), status)
    files.write_json(Path(stage.workdir) / stages.DONE, {"command": shlex.join(stage_arguments(stage)), "metrics": {}})
    return {}


def _note(log: TextIO, text: str) -> None:
    """Writes to a log. A disk that is full keeps no run from going on, nor its error from being told."""
    with contextlib.suppress(OSError):
        log.write(text)


def _add_cost(stage: Stage, seconds: float, cpu_seconds: float) -> None:
    """Adds the time of this try to that of those before, in cost.json. Of a try that was killed nothing is known."""
    path = Path(stage.workdir) / stages.COST
    before = files.read_json(path, {})
    spent = {"seconds": seconds, "cpu_seconds": cpu_seconds}
    with contextlib.suppress(OSError):  # why the stage ended counts for more
        files.write_json(path, {name: round(before.get(name, 0.0) + value, 3) for name, value in spent.items()})


def failure(stage: Stage, reason: str, status: int) -> StageFailed:
    """The error of a stage, which is noted in its folder."""
    diverged = {"diverged": True} if status == DIVERGED else {}
    with contextlib.suppress(OSError):
        files.write_json(Path(stage.workdir) / stages.FAULT, {"error": reason} | diverged)
    return StageFailed(f"stage {stage.name} in {stage.workdir}: {reason}", status)


def describe_status(stage: Stage, status: int) -> str:
    """Says how a stage ended that gives no reason but its log."""
    text = Path(stage.workdir, stages.LOG).read_text(encoding="utf-8", errors="replace")
    end = "\n".join(f"    {line}" for line in text.splitlines()[-5:])
    return f"ended with status {status}; its log ends with\n{end}"


def stage_arguments(stage: Stage) -> list[str]:
    """The arguments of a command stage, as flags."""
    argv = []
    for name, value in stage.settings["args"].items():
        for each in value if isinstance(value, list) else [value]:
            if each is True:
                argv.append(f"--{name}")
            elif each is not None and each is not False:
                argv.append(f"--{name}={str(each).replace('{workdir}', stage.workdir)}")
    return argv


@contextlib.contextmanager
def lock(stage: Stage) -> Iterator[TextIO | None]:
    """The stage's log, locked until every process that holds it has ended. None where another holds it."""
    os.makedirs(stage.workdir, exist_ok=True)
    # Without a buffer, in which what a full disk has no room for would wait, and fail once more at the end.
    with open(os.path.join(stage.workdir, stages.LOG), "ab", buffering=0) as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield None
        else:
            yield io.TextIOWrapper(file, encoding="utf-8", write_through=True)


@contextlib.contextmanager
def interruptible(stopped: Exception) -> Iterator[None]:
    """SIGTERM, SIGINT and SIGHUP interrupt what is inside, where that doesn't take them; `stopped` is raised then."""
    numbers = [number for number in signals.STOPS if signal.getsignal(number) != signal.SIG_IGN]
    before = {number: signal.getsignal(number) for number in numbers}
    with contextlib.suppress(ValueError):  # only the main thread may
        for number in numbers:
            signal.signal(number, signal.default_int_handler)
    try:
        yield
    except KeyboardInterrupt:
        raise stopped from None
    finally:
        with contextlib.suppress(ValueError):
            for number, handler in before.items():
                signal.signal(number, handler)


def _call(stage: Stage) -> int:
    path = stages.module_path(stage.settings["module"])
    module = importlib.import_module(path)
    if not hasattr(module, "main"):
        raise InputError(f"{path}: has no main(argv) to call.")
    argv = stage_arguments(stage)
    flags = {flag.name for flag in getattr(getattr(module, "COMMAND", None), "flags", ())}
    if "overwrite" in flags and "--overwrite" not in argv:
        argv.append("--overwrite")  # what lies in the stage's folder is of an earlier try
    _remove_whole_output(stage, module)
    try:
        return module.main(argv) or 0
    except SystemExit as stop:
        return stop.code if isinstance(stop.code, int) else int(stop.code is not None)


def _remove_whole_output(stage: Stage, module: ModuleType) -> None:
    """Removes a folder that an earlier try has written whole, by a command that neither replaces nor goes on with one;
    it was killed before that was noted."""
    command, output = getattr(module, "COMMAND", None), stage.settings["args"].get("output")
    if command is None or command.resumable or not isinstance(output, str) or "{workdir}/" not in output:
        return
    folder = Path(output.replace("{workdir}", stage.workdir))
    if folder.is_dir() and not any(flag.name == "overwrite" for flag in command.flags):
        shutil.rmtree(folder)


class _Output(io.TextIOBase):
    """Writes to a log, and on a terminal shows the newest line in place."""

    encoding = "utf-8"

    def __init__(self, log: TextIO, label: str):
        self._log, self._label, self._line = log, label, ""
        self._terminal = sys.stdout if sys.stdout.isatty() else None

    def write(self, text: str) -> int:
        _note(self._log, text)
        if self._terminal is not None:
            *lines, self._line = re.split(r"[\r\n]", self._line + text)
            newest = next((line for line in reversed(lines) if line.strip()), "")
            if newest:
                line = f"{self._label}  {newest.strip()}"[: shutil.get_terminal_size().columns - 1]
                self._terminal.write(f"\r{line}\x1b[K")
                self._terminal.flush()
        return len(text)

    def flush(self) -> None:
        with contextlib.suppress(OSError):
            self._log.flush()

    def clear(self) -> None:
        if self._terminal is not None:
            self._terminal.write("\r\x1b[K")
            self._terminal.flush()


def main(argv: Sequence[str]) -> int:
    """Runs the stage of the folder argv[0], whose log is this process's output; returns the exit status.

    Args:
      argv: the folder, and the command for the run's record.
    """
    stage = stages.read_stage(argv[0])
    sys.stdout.reconfigure(line_buffering=True)
    try:
        run_stage(stage, sys.stdout, command="".join(argv[1:2]))
    except StageFailed as error:
        return error.status
    except (run.Preempted, KeyboardInterrupt) as error:
        print(error)
        return STOPPED
    return 0


if __name__ == "__main__":
    console.steady(output=True)
    sys.exit(main(sys.argv[1:]))
