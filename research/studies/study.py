"""Runs a study: an ordered set of stages that name each other's outputs, from one experiment file.

understudy study --config=experiments/x.py[:VARIANT] [--workdir=DIR] [--config.a.b=value ...]
    [--dry_run] [--keep_going] [--only=NAME] [--submit=TEMPLATE] [--report]

The file has `get_config(arg)`, whose config has a section `study` with whatever the study wants to have set from the
command line, and beside it

def study(config, add):
    small = add.train("small", {...})  # the config of a run
    large = add.train("large", {..., "roles": {"teacher": {"init_from": small.workdir}}})
    labels = add.command("labels", "label", {"model": small.workdir, "output": "{workdir}/labels.jsonl"})
    return functools.partial(report, [large.workdir])  # report(workdir): called once all stages are done

Every stage has a folder STORE/NAME-HASH of its own, HASH being over all that decides its result: its resolved config
(or its command), the stages whose folders it names, and the contents of the local files that it names. So the same
stage is run once, whatever studies it is in and whatever they call it; finished stages are skipped, and a study that
was killed goes on where it was, inside a stage too. Code isn't hashed: delete a stage's folder to have it made anew.
STORE is config.study.store, by default the folder `store` beside the study's workdir.

Stages run one after the other in this process; what each prints goes to log.txt in its folder. Several processes may
run one study: each takes the first stage that is free and whose inputs are done. Or, as jobs of a cluster:

    understudy study --config=experiments/x.py --workdir=runs/x \\
        --submit='sbatch --parsable --job-name={name} --dependency=afterok:{after} --wrap={command}'

TEMPLATE is split into words as a shell does, then {command}, {name} and {after} are filled in: {after} is the jobs of
the stages that it needs, as the submit command printed them, joined by ":"; a word with an empty {after} is left out.
--submit=print prints the commands alone.
"""

import contextlib
import dataclasses
import fcntl
import functools
import gc
import glob
import hashlib
import importlib
import importlib.metadata
import importlib.util
import io
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple, TextIO

from absl import flags
from ml_collections import ConfigDict, config_flags

from research import config as config_lib
from research import objectives
from research.errors import InputError, did_you_mean, explain_flag_error
from research.run import checkpoint
from research.run.metrics import describe, duration
from research.sources import records
from research.studies.sweep import flag_value

FAILED, BAD_INPUT, DIVERGED, STOPPED = 1, 2, 3, 75  # as research.main's
RECORD = "study.json"  # in the study's workdir: its stages, where they are, and how they stand
LOG, ABOUT, DONE, FAULT = "log.txt", "stage.json", "done.json", "failed.json"  # in a stage's folder

# What changes no result of a run, and so isn't hashed.
_FREE = (("log",), ("compilation_cache",), ("data", "cache_dir"), ("mesh",), ("rules",), ("plan",), ("stall_seconds",))
_PATHS = ("path", "eval_path", "init_from", "annotations")  # fields whose value may be a file without looking like one

Report = Callable[[str], None]


class StageFailed(Exception):
    """A stage came to no result. `status` is the exit status that its error has in research.main."""

    def __init__(self, message: str, status: int):
        super().__init__(message)
        self.status = status


@dataclasses.dataclass(frozen=True)
class Stage:
    """One step of a study.

    Attributes:
      name: as the study calls it; not unique.
      kind: "train" or "command".
      settings: of "train" the resolved config of the run; of "command" {"module", "args"}.
      inputs: ids of the stages whose folders occur in `settings`.
      files: local file or folder that occurs in `settings` -> hash of its contents.
      digest: hash of all this.
      workdir: STORE/NAME-HASH; NAME is what the stage was called when it was first begun.
    """

    name: str
    kind: str
    settings: Mapping[str, Any]
    inputs: tuple[str, ...]
    files: Mapping[str, str]
    digest: str
    workdir: str

    @property
    def id(self) -> str:
        return os.path.basename(self.workdir)


class Plan:
    """What a study's function adds its stages to; see `train` and `command`.

    Args:
      store: the folder that stages lie in.

    Raises:
      InputError: config.data.path couldn't name files in such a folder.
    """

    def __init__(self, store: str):
        if re.search(r"[,*?\[\]:]", store):
            raise InputError(f"study.store = {store!r}: data.path can't name files in it. Leave out , * ? [ ] and :")
        self.store = os.path.normpath(store)
        self._stages: dict[str, Stage] = {}

    @property
    def stages(self) -> list[Stage]:
        return list(self._stages.values())

    def train(self, name: str, config: Mapping[str, Any] | ConfigDict) -> Stage:
        """Adds a run. The same run twice is one stage, under the first name.

        Args:
          name: letters, digits and _ . + = -
          config: a config of a run, or the fields of it that differ from the defaults; a section `study` is left out.

        Raises:
          InputError: the config can't work, or names data that isn't there.
        """
        values = config.to_dict() if isinstance(config, ConfigDict) else dict(config)
        values.pop("study", None)
        try:
            parsed = config_lib.parse(values)
            objectives.load(parsed.objective)
            self._check_data(parsed)
        except InputError as error:
            raise InputError(f"stage {name}: {error}") from error
        return self._add(name, "train", json.loads(json.dumps(config_lib.to_dict(parsed), default=_plain)))

    def command(self, name: str, module: str, args: Mapping[str, Any]) -> Stage:
        """Adds a call of module.main(argv), which returns an exit status; called again, it goes on or begins anew.

        Args:
          name: letters, digits and _ . + = -
          module: a command, such as "label", or a dotted module of one's own.
          args: flag -> value. True is the flag alone, False and None leave it out, a sequence gives it several times.
            "{workdir}" in a value is the stage's own folder, which is there when the command starts; what it writes
            belongs in there, since any other file that its flags name is taken for an input.

        Raises:
          InputError: there is no such module.
        """
        try:
            module = f"research.commands.{module}" if "." not in module else module
            found = importlib.util.find_spec(module)
        except ImportError:
            found = None
        if found is None:
            raise InputError(f"stage {name}: there is no module {module!r} to run. Check its name.")
        return self._add(
            name, "command", {"module": module, "args": json.loads(json.dumps(dict(args), default=_plain))}
        )

    def _add(self, name: str, kind: str, settings: Mapping[str, Any]) -> Stage:
        if not re.fullmatch(r"\w[\w.+=-]*", name, re.ASCII):
            raise InputError(f"stage {name!r}: a name is of letters, digits and _ . + = -")
        if kind == "train":
            # Layout and logging aside, which say nothing of the result.
            counted = json.loads(json.dumps(settings))
            for *section, field in _FREE:
                functools.reduce(dict.__getitem__, section, counted).pop(field, None)
        else:
            counted = settings
        inputs: dict[str, None] = {}
        files: dict[str, str] = {}
        counted = self._resolve(counted, "", inputs, files)
        text = json.dumps([kind, counted, sorted(files.items())], sort_keys=True)
        digest = hashlib.sha256(text.encode()).hexdigest()[:10]
        if digest not in self._stages:
            begun = sorted(glob.glob(f"*-{digest}", root_dir=self.store))
            folder = f"{name}-{digest}" if not begun or f"{name}-{digest}" in begun else begun[0]
            workdir = os.path.join(self.store, folder)
            self._stages[digest] = Stage(name, kind, settings, tuple(inputs), files, digest, workdir)
        return self._stages[digest]

    def _resolve(self, value: Any, field: str, inputs: dict[str, None], files: dict[str, str]) -> Any:
        """`value` with folders of stages replaced by their hashes, so that neither names nor the store's place count.

        What else it names on disk goes into `files`, and the ids of the stages into `inputs`.
        """
        if isinstance(value, Mapping):
            return {key: self._resolve(v, key, inputs, files) for key, v in value.items()}
        if isinstance(value, list):
            return [self._resolve(v, field, inputs, files) for v in value]
        if not isinstance(value, str):
            return value
        for entry in _entries(value):
            if not self._made_by(entry):
                files |= {path: _contents(path) for path in _existing(entry, field)}
        for stage in self._made_by(value):
            inputs[stage.id] = None
            value = value.replace(stage.workdir, f"<{stage.digest}>")
        return value

    def _made_by(self, text: str) -> list[Stage]:
        return [stage for stage in self._stages.values() if stage.workdir in text]

    def _check_data(self, config: config_lib.Config) -> None:
        """Data that no stage makes must be there now, not hours later when the stage's turn has come."""
        for field in ("path", "eval_path"):
            for entry in filter(None, _entries(config.data[field])):
                if ":" not in entry and not self._made_by(entry):
                    try:
                        records.locate(entry, count=0, seed=0)
                    except InputError as error:
                        raise InputError(f"data.{field}: {error}") from error


def _plain(value: Any) -> Any:
    """What JSON doesn't know: scalars of numpy, paths."""
    if hasattr(value, "item"):
        return value.item()
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    raise InputError(f"{value!r}: a stage's settings are numbers, texts, bools, lists and mappings of these.")


def _entries(text: str) -> list[str]:
    """Of "0.7*a.jsonl,0.3*choice:b.jsonl": a.jsonl and choice:b.jsonl."""
    return [re.sub(r"^[-+]?(\d+\.?\d*|\.\d+)([eE][-+]?\d+)?\*", "", entry.strip()) for entry in text.split(",")]


def _existing(entry: str, field: str) -> list[str]:
    """The file, folder or files of a glob that a text names, such as x.jsonl, DIR/*.txt or choice:x.jsonl."""
    for name in (entry, entry.rpartition(":")[2]):
        if name and (field in _PATHS or re.search(r"[./\\]", name)) and name.strip("./"):
            path = os.path.expanduser(name)
            found = [path] if os.path.exists(path) else sorted(glob.glob(path, recursive=True))
            if found:
                return found
    return []


def _contents(path: str) -> str:
    """Hash of a file, or of the names and contents of the files in a folder.

    Of a run's folder what a later run takes from it counts: the newest checkpoint and the tokenizer.
    """
    root = Path(path)
    if root.is_file():
        return _file_hash(path, root.stat().st_size, root.stat().st_mtime_ns)
    steps = checkpoint.steps(root)
    if steps:
        newest = root / checkpoint.FOLDER / str(steps[-1])
        inside = [*newest.rglob("*"), *root.glob("*token*"), *root.glob("*.jinja")]
    else:
        inside = list(root.rglob("*"))
    result = hashlib.sha256()
    for file in sorted(file for file in inside if file.is_file()):
        stat = file.stat()
        result.update(f"{file.relative_to(root)}\0{_file_hash(str(file), stat.st_size, stat.st_mtime_ns)}\0".encode())
    return result.hexdigest()


@functools.cache
def _file_hash(path: str, size: int, modified: int) -> str:
    with open(path, "rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


def state(stage: Stage) -> str:
    """How a stage stands on disk: "done", "running" (in any process), "failed", "begun" or "new"."""
    if finished(stage) is not None:
        return "done"
    log = os.path.join(stage.workdir, LOG)
    if not os.path.exists(log):
        return "new"
    with open(log, "rb") as f:
        try:
            fcntl.flock(f, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return "running"
    return "failed" if os.path.exists(os.path.join(stage.workdir, FAULT)) else "begun"


def finished(stage: Stage) -> dict[str, Any] | None:
    """What a stage left at its end, {"metrics": ...} of a run; None where it isn't done."""
    done = _read_json(os.path.join(stage.workdir, DONE))
    if done is not None and stage.kind == "train" and done.get("step") != stage.settings["steps"]:
        return None
    return done


def _read_json(path: str) -> dict[str, Any] | None:
    try:
        with open(path, encoding="utf-8") as f:
            return json.load(f)
    except FileNotFoundError:
        return None
    except ValueError as error:
        raise InputError(f"{path}: not JSON ({error}). Delete the file.") from None


def check(stages: Sequence[Stage]) -> None:
    """Checks what can be checked of runs before any has begun, against the devices here.

    Raises:
      InputError: naming the stage, the field, the value and the remedy.
    """
    import jax

    for stage in stages:
        # The model that a run starts from decides its architecture, and may not be there yet.
        if stage.kind == "train" and not stage.settings["model"]["init_from"]:
            try:
                config_lib.check(config_lib.parse(stage.settings), num_devices=jax.device_count())
            except InputError as error:
                raise InputError(f"stage {stage.name}: {error}") from error


def run_stages(
    stages: Sequence[Stage],
    *,
    keep_going: bool = False,
    command: str = "",
    record: Callable[[], None] = lambda: None,
) -> dict[str, str]:
    """Runs what isn't done, one after the other, and prints a line for each stage.

    A stage that another process is running is left to it; meanwhile others are done that don't need it.

    Args:
      stages: in an order in which each comes after its inputs; an input that isn't among them must be done.
      keep_going: after a failure, go on with what doesn't need that stage.
      command: for the record of each run.
      record: called after every change.

    Returns:
      id -> why it isn't done, of stages that failed and that need such a stage; empty unless `keep_going`.

    Raises:
      StageFailed: a stage came to no result, and not keep_going.
      run.Preempted: SIGTERM or SIGINT came.
    """
    from research.run import run

    check([stage for stage in stages if finished(stage) is None])
    numbers = {stage.id: f"[{n}/{len(stages)}] {stage.name}" for n, stage in enumerate(stages, start=1)}
    stop = threading.Event()
    took: dict[str, float] = {}
    lost: dict[str, str] = {}
    todo, waiting = [], False
    for stage in stages:
        if finished(stage) is None:
            todo.append(stage)
        else:
            _say(f"{numbers[stage.id]}  done already")
    record()
    while todo:
        for stage in todo:
            if finished(stage) is not None:
                _say(f"{numbers[stage.id]}  done by another process")
                todo.remove(stage)
                break
            missing = [other.id for other in todo if other.id in stage.inputs]
            needs = [id for id in stage.inputs if id in lost]
            if needs:
                lost[stage.id] = f"needs {needs[0]}"
                _say(f"{numbers[stage.id]}  left out: needs {', '.join(needs)}")
                todo.remove(stage)
                break
            if missing:
                continue
            with _lock(stage) as log:
                if log is None or finished(stage) is not None:
                    continue
                began = time.monotonic()
                record()
                try:
                    values = _run_stage(stage, log, numbers[stage.id], command, stop)
                except StageFailed as error:
                    lost[stage.id] = str(error)
                    if not keep_going:
                        raise
                    _say(f"{numbers[stage.id]}  failed: {error}")
                else:
                    took[stage.id] = time.monotonic() - began
            todo.remove(stage)
            if stage.id in took:
                left = _time_left(todo, [(other, took[other.id]) for other in stages if other.id in took])
                shown = [duration(took[stage.id]), _summary(values), f"ETA {duration(left)}" if todo else ""]
                _say("  ".join([numbers[stage.id], *filter(None, shown)]))
            waiting = False
            record()
            if stop.is_set() and todo:  # it came when the run was about to end anyway
                raise run.Preempted(f"stopped after stage {stage.name}. The same command goes on from there.")
            break
        else:
            busy = [stage.name for stage in todo if state(stage) == "running"]
            if busy and not waiting:
                waiting = True
                _say(f"waiting for another process, which runs {', '.join(busy)}")
            with _stopping(run.Preempted("stopped while waiting. The same command goes on from there.")):
                time.sleep(0.5)
    return lost


def _run_stage(stage: Stage, log: TextIO, label: str, command: str, stop: threading.Event) -> dict[str, float]:
    """Runs a stage in this process, its output going to `log`; returns the final metrics.

    Raises:
      StageFailed: with the stage's error, folder and exit status.
      run.Preempted: SIGTERM or SIGINT came.
    """
    from research.run import run

    fault = Path(stage.workdir) / FAULT
    fault.unlink(missing_ok=True)
    checkpoint.write_json(
        Path(stage.workdir) / ABOUT,
        {k: v for k, v in dataclasses.asdict(stage).items() if k != "workdir"},
    )

    def fail(reason: str, status: int) -> StageFailed:
        checkpoint.write_json(fault, {"error": reason})
        return StageFailed(f"stage {stage.name} in {stage.workdir}: {reason}", status)

    stopped = run.Preempted(f"stopped in stage {stage.name}. The same command goes on from there.")
    output = _Output(log, label)
    try:
        with _stopping(stopped), contextlib.redirect_stderr(output), contextlib.redirect_stdout(output):
            if stage.kind == "train":
                parsed = config_lib.parse(stage.settings)
                return run.run(parsed, stage.workdir, started=time.time(), command=command, stop=stop)
            status = _call(stage)
    except InputError as error:
        raise fail(str(error), BAD_INPUT) from error
    except run.Diverged as error:
        raise fail(str(error), DIVERGED) from error
    except (run.Preempted, KeyboardInterrupt):
        raise
    except Exception as error:
        log.write(traceback.format_exc())
        raise fail(f"{type(error).__name__}: {error}", FAILED) from error
    finally:
        output.clear()
        gc.collect()  # the arrays of a run are held in cycles, and the next needs the memory
    if status in (STOPPED, 130, -signal.SIGINT):
        raise stopped
    if status:
        raise fail(f"ended with status {status}; its log ends with\n{_tail(log.name)}", status)
    checkpoint.write_json(Path(stage.workdir) / DONE, {"command": shlex.join(_argv(stage)), "metrics": {}})
    return {}


def _call(stage: Stage) -> int:
    module = importlib.import_module(stage.settings["module"])
    if not hasattr(module, "main"):
        raise InputError(f"{stage.settings['module']}: has no main(argv) to call.")
    try:
        return module.main(_argv(stage)) or 0
    except SystemExit as stop:
        return stop.code if isinstance(stop.code, int) else int(stop.code is not None)


def _argv(stage: Stage) -> list[str]:
    """The arguments of a command stage as flags."""
    argv = []
    for name, value in stage.settings["args"].items():
        for each in value if isinstance(value, list) else [value]:
            if each is True:
                argv.append(f"--{name}")
            elif each is not None and each is not False:
                argv.append(f"--{name}={str(each).replace('{workdir}', stage.workdir)}")
    return argv


@contextlib.contextmanager
def _stopping(stopped: Exception) -> Iterator[None]:
    """SIGTERM interrupts as SIGINT does, where nothing inside takes them; either way `stopped` is raised."""
    before = signal.getsignal(signal.SIGTERM)
    with contextlib.suppress(ValueError):  # only the main thread may
        signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    except KeyboardInterrupt:
        raise stopped from None
    finally:
        with contextlib.suppress(ValueError):
            signal.signal(signal.SIGTERM, before)


@contextlib.contextmanager
def _lock(stage: Stage) -> Iterator[TextIO | None]:
    """The stage's log, locked: it ends with the process, however that ends. None where another holds it."""
    os.makedirs(stage.workdir, exist_ok=True)
    with open(os.path.join(stage.workdir, LOG), "a", buffering=1, encoding="utf-8") as log:
        try:
            fcntl.flock(log, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            log = None
        yield log


class _Output(io.TextIOBase):
    """Writes to a log, and on a terminal shows the newest line in place."""

    encoding = "utf-8"

    def __init__(self, log: TextIO, label: str):
        self._log, self._label, self._line = log, label, ""
        self._terminal = sys.stdout if sys.stdout.isatty() else None

    def write(self, text: str) -> int:
        self._log.write(text)
        if self._terminal is not None:
            *lines, self._line = re.split(r"[\r\n]", self._line + text)
            newest = next((line for line in reversed(lines) if line.strip()), "")
            if newest:
                shown = f"{self._label}  {newest.strip()}"[: shutil.get_terminal_size().columns - 1]
                self._terminal.write(f"\r{shown}\x1b[K")
                self._terminal.flush()
        return len(text)

    def flush(self) -> None:
        self._log.flush()

    def clear(self) -> None:
        if self._terminal is not None:
            self._terminal.write("\r\x1b[K")
            self._terminal.flush()


def _tail(path: str, lines: int = 5) -> str:
    text = Path(path).read_text(encoding="utf-8", errors="replace").splitlines()[-lines:]
    return "\n".join(f"    {line}" for line in text)


def _summary(metrics: Mapping[str, float]) -> str:
    """The metrics that tell most, of the evaluation if there was one."""
    found = [f"eval/{name}" for name in ("loss", "accuracy", "exact_match", "bits_per_byte")]
    found = [name for name in found if name in metrics] or ["train/loss"]
    return describe({name: metrics[name] for name in found if name in metrics})


def _time_left(todo: Sequence[Stage], took: Sequence[tuple[Stage, float]]) -> float:
    """Seconds: each takes as long as those whose names differ in numbers alone, else as those of its kind."""

    def alike(a: Stage, b: Stage) -> tuple[bool, bool]:
        return re.sub(r"\d+", "", a.name) == re.sub(r"\d+", "", b.name), a.kind == b.kind

    total = 0.0
    for stage in todo:
        nearest = max(alike(stage, other) for other, _ in took)
        known = [seconds for other, seconds in took if alike(stage, other) == nearest]
        total += sum(known) / len(known)
    return total


def submit(stages: Sequence[Stage], template: str, own: Sequence[str], report: bool) -> None:
    """Hands every unfinished stage to a queue, in order, and then the report; see the top of this file.

    Args:
      stages: of the study.
      template: of the submit command, or "print".
      own: the command of this study, to which --only=ID is added.
      report: whether a last job makes the report.

    Raises:
      InputError: the template has no {command} or something unknown, or the submit command failed.
    """
    todo = [stage for stage in stages if finished(stage) is None]
    jobs = [(stage.id, stage.id, f"--only={stage.id}", [i for i in stage.inputs]) for stage in todo]
    if report:
        jobs.append(("report", "report", "--report", [stage.id for stage in todo]))
    words = shlex.split(template)
    unknown = set(re.findall(r"\{(\w*)\}", template)) - {"command", "name", "after"}
    if template != "print" and (unknown or "{command}" not in template):
        raise InputError(
            f"--submit={template}: must hold {{command}}, and may hold {{name}} and {{after}}"
            + (f"; it has {{{unknown.pop()}}}." if unknown else ".")
        )
    known: dict[str, str] = {}
    for id, name, flag, inputs in jobs:
        command = shlex.join([*own, flag])
        if template == "print":
            after = [i for i in inputs if i in known]
            _say(command + (f"  # after {' '.join(after)}" if after else ""))
            known[id] = id
            continue
        after = ":".join(known[i] for i in inputs if i in known)
        values = {"command": command, "name": name, "after": after}
        line = [
            re.sub(r"\{(\w+)\}", lambda m, values=values: values[m[1]], word)
            for word in words
            if after or "{after}" not in word
        ]
        done = subprocess.run(line, capture_output=True, text=True, check=False)
        printed = done.stdout.split()
        if done.returncode or not printed:
            raise InputError(
                f"--submit: {shlex.join(line)} ended with status {done.returncode}: "
                f"{(done.stderr or done.stdout or 'it printed no job').strip()[-500:]}"
            )
        known[id] = printed[-1].split(";")[0]  # sbatch --parsable prints JOB;CLUSTER where there are several
        _say(f"{known[id]}  {name}" + (f"  after {after}" if after else ""))


class Study(NamedTuple):
    """A study that has been planned: nothing is written yet. `report` is None where it makes none."""

    stages: list[Stage]
    report: Report | None


def plan(path: str, config: ConfigDict, workdir: str) -> Study:
    """Asks an experiment's file for the stages of its study.

    Args:
      path: of the file.
      config: its config, overrides applied.
      workdir: of the study.

    Raises:
      InputError: there is no study, it has no stage, or a stage can't work.
    """
    if "study" not in config:
        raise InputError(f"--config={path}: its config has no section `study`. Run it with research.main.")
    module = _load(path)
    store = config.study.get("store", "") or os.path.join(os.path.dirname(os.path.normpath(workdir)), "store")
    add = Plan(store)
    report = module.study(config, add)
    if not add.stages:
        raise InputError(f"{path}: its study(config, add) adds no stage.")
    return Study(add.stages, report)


def _load(path: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location("experiment", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    if not hasattr(module, "study"):
        raise InputError(f"--config={path}: it defines no study(config, add). See research/study.py for what that is.")
    return module


def _find(stages: Sequence[Stage], name: str) -> Stage:
    found = [stage for stage in stages if name in (stage.id, stage.name)]
    if len(found) == 1:
        return found[0]
    if found:
        raise InputError(f"--only={name}: several stages have this name: {', '.join(stage.id for stage in found)}.")
    raise InputError(f"--only={name}: no such stage.{did_you_mean(name, {stage.name for stage in stages})}")


def _only(stages: Sequence[Stage], name: str, command: str, record: Callable[[], None]) -> None:
    stage = _find(stages, name)
    for other in stages:
        if other.id in stage.inputs and finished(other) is None:
            raise InputError(f"--only={name}: needs {other.name} in {other.workdir}, which isn't done. Run it first.")
    run_stages([stage], command=command, record=record)


def _write_record(workdir: str, stages: Sequence[Stage], about: Mapping[str, Any]) -> None:
    """WORKDIR/study.json. States are read from disk, so that it is right whichever process writes it."""
    entries = []
    for stage in stages:
        entry = {"name": stage.name, "kind": stage.kind, "workdir": stage.workdir, "inputs": stage.inputs}
        fault = _read_json(os.path.join(stage.workdir, FAULT))
        entries.append(entry | {"state": state(stage)} | (fault or {}))
    os.makedirs(workdir, exist_ok=True)
    path = Path(workdir) / RECORD
    part = path.with_name(f"{RECORD}.{os.getpid()}")  # several processes may be at it
    checkpoint.write_json(part, {**about, "stages": entries})
    part.replace(path)


def main(argv: Sequence[str]) -> int:
    """Runs, lists or submits the study that the flags name; argv[0] is the program. Returns the exit status."""
    values = flags.FlagValues()  # its own: research.main has --config and --workdir as well
    config_flags.DEFINE_config_file("config", None, "experiments/x.py[:VARIANT]", flag_values=values, sys_argv=[*argv])
    flags.DEFINE_string("workdir", None, "Default: a dated folder under runs/.", flag_values=values)
    flags.DEFINE_bool("dry_run", False, "List the stages and how they stand.", flag_values=values)
    flags.DEFINE_bool("keep_going", False, "Go on after a failure.", flag_values=values)
    flags.DEFINE_string("only", None, "Run this stage alone.", flag_values=values)
    flags.DEFINE_string("submit", None, "Command that hands a job to a queue, or print.", flag_values=values)
    flags.DEFINE_bool("report", False, "Make the report of what is done.", flag_values=values)
    if "--help" in argv:
        print(__doc__)
        return 0
    try:
        rest = values([*argv])[1:]
        if rest:
            raise InputError(f"{rest[0]}: what is that? Flags have the form --name=value.")
        if values.config is None:
            raise InputError("--config: names no experiment. For example: --config=experiments/weak_to_strong.py")
        if sum([values.dry_run, values.report, values.only is not None, values.submit is not None]) > 1:
            raise InputError("--dry_run, --only, --submit and --report: give one of them.")
    except Exception as error:
        return _fail(explain_flag_error(error, argv), BAD_INPUT)
    named = values["config"].config_filename
    path = named.partition(":")[0]
    workdir = values.workdir or os.path.join("runs", time.strftime(f"%Y-%m-%d_%H-%M-%S_{Path(path).stem}"))

    from research.run import run

    try:
        overrides = [f"--config.{k}={flag_value(k, v)}" for k, v in values["config"].override_values.items()]
        own = ["python", "-m", "research", "study", f"--config={named}", f"--workdir={workdir}", *overrides]
        stages, report = plan(path, values.config, workdir)
        about = {"command": shlex.join(own), "config": json.loads(values.config.to_json_best_effort())} | _versions()
        record = functools.partial(_write_record, workdir, stages, about)
        if values.dry_run:
            return _list(stages)
        if values.submit is not None:
            submit(stages, values.submit, own, report is not None)
            return 0
        if values.only is not None:
            _only(stages, values.only, shlex.join(own), record)
            return 0
        lost: dict[str, str] = {}
        if not values.report:
            _say(f"{len(stages)} stages in {os.path.dirname(stages[0].workdir)}, the study in {workdir}")
            lost = run_stages(stages, keep_going=values.keep_going, command=shlex.join(own), record=record)
        record()
        if report is not None:
            report(workdir)
        elif values.report:
            raise InputError(f"--report: the study of {path} makes none.")
        for id, reason in lost.items():
            print(f"not done: {id}: {reason}", file=sys.stderr)
        return FAILED if lost else 0
    except InputError as error:
        return _fail(error, BAD_INPUT)
    except StageFailed as error:
        record()
        return _fail(error, error.status)
    except run.Preempted as stop:
        record()
        print(stop, file=sys.stderr)
        return STOPPED


def _list(stages: Sequence[Stage]) -> int:
    for number, stage in enumerate(stages, start=1):
        after = f"  after {' '.join(stage.inputs)}" if stage.inputs else ""
        _say(f"[{number}/{len(stages)}] {stage.name}  {state(stage)}  {stage.workdir}{after}")
    return 0


def _versions() -> dict[str, Any]:
    packages = ("jax", "numpy", "understudy")
    return {"versions": {"python": sys.version.split()[0]} | {p: importlib.metadata.version(p) for p in packages}}


def _say(message: str) -> None:
    print(message, flush=True)


def _fail(error: object, status: int) -> int:
    print(f"error: {error}", file=sys.stderr)
    return status


if __name__ == "__main__":
    sys.exit(main(sys.argv))
