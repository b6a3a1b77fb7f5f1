"""Runs the list of runs that an experiment file defines, one after the other or several at a time.

understudy sweep --config=experiments/x.py[:VARIANT] --workdir=runs/sweeps/x [--config.a.b=value ...]
    [--jobs=N] [--metric=eval/loss] [--maximize] [--dry_run]

Each run has a folder of its own below the workdir. The same command again goes on: finished runs are skipped,
begun ones resumed. At the end there is a table, in results.csv as well.
"""

import argparse
import csv
import dataclasses
import fcntl
import hashlib
import importlib.util
import json
import math
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from types import ModuleType
from typing import Any

from research.errors import InputError, did_you_mean
from research.run.metrics import duration

_PROGRAM = (sys.executable, "-m", "research.main")
FAILED, BAD_INPUT, STOPPED = 1, 2, 75  # 75, EX_TEMPFAIL: the same command goes on from where it stopped

_HOW_TO = """Write one beside get_config, for example:

def sweep(add):
    for learning_rate in (1e-3, 3e-3):
        add({"optimizer.learning_rate": learning_rate})
"""


@dataclasses.dataclass(frozen=True)
class Entry:
    """One run of a sweep.

    Attributes:
      name: of its folder.
      workdir: its folder.
      overrides: dotted field -> value as on the command line; what sets this run apart.
      settings: what it was made from, stored beside it to be compared with: the experiment and all overrides.
      command: the program and its arguments.
    """

    name: str
    workdir: str
    overrides: Mapping[str, str]
    settings: Mapping[str, Any]
    command: tuple[str, ...]


def plan(config: str, common: Mapping[str, str], workdir: str, program: Sequence[str] = _PROGRAM) -> list[Entry]:
    """Reads the sweep of an experiment. Nothing is written.

    Args:
      config: path of the experiment's file, with ":VARIANT" or without.
      common: dotted field -> value as on the command line, for all runs.
      workdir: of the sweep.
      program: what runs an entry, given --config, --workdir and --config.FIELD=VALUE.

    Raises:
      InputError: there is no sweep, two of its entries are the same, a field doesn't exist, a value can't be
        written on a command line, or a folder holds a run that was made from something else.
    """
    path, _, variant = config.partition(":")
    module = _load(path)
    defaults = module.get_config(variant) if variant else module.get_config()
    added: list[tuple[dict[str, str], str | None]] = []

    def add(overrides: Mapping[str, Any], name: str | None = None) -> None:
        added.append(({field: flag_value(field, value) for field, value in overrides.items()}, name))

    module.sweep(add)
    if not added:
        raise InputError(f"{path}: its sweep(add) adds no run. {_HOW_TO}")
    for field in {**common, **{field: None for overrides, _ in added for field in overrides}}:
        _check_field(defaults, field)
    for field in common:
        if any(field in overrides for overrides, _ in added):
            raise InputError(f"--config.{field}={common[field]}: the sweep of {path} sets it. Leave the flag out.")
    entries = []
    for (overrides, _), name in zip(added, _names(added), strict=True):
        folder = os.path.join(workdir, name)
        every = {**common, **overrides}
        flags = [f"--config={config}", f"--workdir={folder}", *(f"--config.{k}={v}" for k, v in every.items())]
        settings = {"config": ":".join(filter(None, (os.path.relpath(path), variant))), "overrides": every}
        entries.append(Entry(name, folder, overrides, settings, (*program, *flags)))
    for entry in entries:
        _check_folder(entry)
    return entries


def flag_value(field: str, value: Any) -> str:
    """Returns a value as config flags read it: 0.001, True, text, (1,'a').

    Raises:
      InputError: None, a list, a mapping, or another thing that a flag can't hold.
    """
    if hasattr(value, "item"):  # a scalar of numpy
        value = value.item()
    if isinstance(value, str):
        return value
    if isinstance(value, bool | int | float):
        return repr(value)
    if isinstance(value, tuple):
        items = [repr(item) if isinstance(item, str) else flag_value(field, item) for item in value]
        return f"({','.join(items)}{',' if len(items) == 1 else ''})"
    remedy = {
        type(None): "Choose the value that turns it off, such as 0 or ''.",
        list: "Give a tuple.",
        dict: "Override its fields one by one, as 'section.field'.",
    }.get(type(value), "Give a number, a bool, a string or a tuple of these.")
    raise InputError(f"sweep: {field} = {value!r} can't be given on a command line. {remedy}")


def run_all(commands: Mapping[str, Sequence[str]], jobs: int) -> dict[str, int]:
    """Runs commands, `jobs` at a time, each with its output appended to log.txt in its folder.

    SIGINT and SIGTERM are passed on to what runs; then nothing more is started, and all are waited for.

    Args:
      commands: folder -> program and arguments.
      jobs: how many run at a time.

    Returns:
      folder -> exit status, minus the number of the signal where one ended it. A folder that another process
      is still writing to isn't touched: 75. Folders whose command wasn't started are left out.
    """
    waiting = dict(commands)
    running: dict[str, tuple[subprocess.Popen, float]] = {}
    statuses: dict[str, int] = {}
    received: list[int] = []
    passed_on = 0
    handlers = {
        number: signal.signal(number, lambda number, _: received.append(number))
        for number in (signal.SIGINT, signal.SIGTERM)
    }
    try:
        while running or (waiting and not received):
            while waiting and len(running) < jobs and not received:
                folder = next(iter(waiting))
                process = _start(folder, waiting.pop(folder))
                place = f"[{len(commands) - len(waiting)}/{len(commands)}] {os.path.basename(folder)}"
                if process is None:
                    _say(f"{place}: another process is running it; left alone")
                    statuses[folder] = STOPPED
                else:
                    _say(f"{place}: started, log in {os.path.join(folder, 'log.txt')}")
                    running[folder] = process, time.monotonic()
            for number in received[passed_on:]:
                _say(f"{signal.Signals(number).name}: passed on to {len(running)} running; waiting for them")
                for process, _ in running.values():
                    process.send_signal(number)
                passed_on += 1
            for folder, (process, started) in list(running.items()):
                if process.poll() is not None:
                    del running[folder]
                    statuses[folder] = process.returncode
                    took = duration(time.monotonic() - started)
                    _say(f"{os.path.basename(folder)}: {_outcome(process.returncode)} after {took}")
                    if _outcome(process.returncode) == "failed":
                        _say(f"exit status {process.returncode}; {_tail(os.path.join(folder, 'log.txt'))}")
            time.sleep(0.05)
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
    return statuses


def results(
    entries: Sequence[Entry], statuses: Mapping[str, int], metric: str | None = None, maximize: bool = False
) -> tuple[list[str], list[dict[str, Any]]]:
    """Returns columns and rows of the table: run, status, step, overrides, final metrics.

    Args:
      entries: of the sweep.
      statuses: folder -> exit status, of those that were run now.
      metric: what to sort by; None is eval/loss if there.
      maximize: whether the highest comes first.
    """
    rows = []
    for entry in entries:
        done = _done(entry)
        status = "not started" if done is None else "done"
        if entry.workdir in statuses:
            status = _outcome(statuses[entry.workdir])
        if status == "done" and done is None:  # it said so, and left no result
            status = "failed"
        row = {"run": entry.name, "status": status, **entry.overrides}
        if status == "done":
            row |= {"step": done["step"], **{name: float(value) for name, value in done["metrics"].items()}}
        rows.append(row)
    metric = metric or "eval/loss"
    found = {name for row in rows for name in row} - {"run", "status", "step"}
    overrides = list(dict.fromkeys(field for entry in entries for field in entry.overrides))
    metrics = sorted(found - set(overrides), key=lambda name: (name != metric, not name.startswith("eval/"), name))

    def order(row: Mapping[str, Any]) -> tuple:
        value = row.get(metric, math.nan)
        return (math.isnan(value), 0.0 if math.isnan(value) else -value if maximize else value)

    return ["run", "status", "step", *overrides, *metrics], sorted(rows, key=order)


def format_table(columns: Sequence[str], rows: Sequence[Mapping[str, Any]], width: int) -> str:
    """Returns the table as text. Columns that don't fit into `width` characters are left out, from the right."""

    def text(value: Any) -> str:
        return f"{value:.4g}" if isinstance(value, float) else str(value)

    shown = [[column, *(text(row.get(column, "")) for row in rows)] for column in columns]
    shown = [[cell.ljust(max(map(len, column))) for cell in column] for column in shown]
    while len(shown) > 2 and sum(len(column[0]) + 2 for column in shown) > width + 2:
        shown.pop()
    return "\n".join("  ".join(line).rstrip() for line in zip(*shown, strict=True))


def sweep(
    config: str,
    common: Mapping[str, str],
    workdir: str,
    *,
    jobs: int = 1,
    metric: str | None = None,
    maximize: bool = False,
    dry_run: bool = False,
    program: Sequence[str] = _PROGRAM,
) -> int:
    """Plans, runs and sums up; see `plan`, `run_all` and `results`. Returns the exit status.

    Raises:
      InputError: the plan can't be made, or no finished run has `metric`.
    """
    if jobs < 1:
        raise InputError(f"--jobs={jobs}: must be at least 1.")
    entries = plan(config, common, workdir, program)
    todo = [entry for entry in entries if _done(entry) is None]
    _say(f"{len(entries)} runs, {len(entries) - len(todo)} finished already")
    if dry_run:
        for entry in todo:
            _say(shlex.join(entry.command))
        return 0
    for entry in todo:
        os.makedirs(entry.workdir, exist_ok=True)
        path = os.path.join(entry.workdir, "sweep.json")
        with open(path + ".tmp", "w", encoding="utf-8") as f:
            json.dump(entry.settings, f, indent=2)
        os.replace(path + ".tmp", path)
    statuses = run_all({entry.workdir: entry.command for entry in todo}, jobs)

    columns, rows = results(entries, statuses, metric, maximize)
    with open(os.path.join(workdir, "results.csv"), "w", encoding="utf-8", newline="") as f:
        writer = csv.DictWriter(f, columns)
        writer.writeheader()
        writer.writerows(rows)
    _say("\n" + format_table(columns, rows, shutil.get_terminal_size((120, 24)).columns))
    _say(f"\nin full in {os.path.join(workdir, 'results.csv')}")
    done = [row for row in rows if row["status"] == "done"]
    if metric and done and not any(metric in row for row in done):
        raise InputError(f"--metric={metric}: no run has it.{did_you_mean(metric, columns[3:])}")
    failed = [row["run"] for row in rows if row["status"] == "failed"]
    if failed:
        _say(f"failed: {', '.join(failed)}")
        return FAILED
    return STOPPED if len(done) < len(rows) else 0


def _load(path: str) -> ModuleType:
    """Imports the experiment's file, which must define get_config and sweep."""
    if not os.path.isfile(path):
        folder = os.path.dirname(path) or "."
        there = [os.path.join(folder, name) for name in os.listdir(folder)] if os.path.isdir(folder) else []
        hint = did_you_mean(path, [name for name in there if name.endswith(".py")])
        raise InputError(f"--config={path}: there is no such file.{hint}")
    spec = importlib.util.spec_from_file_location("experiment", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    if not hasattr(module, "get_config"):
        raise InputError(f"--config={path}: it defines no get_config(), so it isn't an experiment.")
    if not hasattr(module, "sweep"):
        raise InputError(f"--config={path}: it defines no sweep(add). {_HOW_TO}")
    return module


def _check_field(defaults: Any, field: str) -> None:
    """Raises where a config has no such field, so that a typo costs no start of a run."""
    node = defaults
    for part in field.split("."):
        if not hasattr(node, "keys") or part not in node:
            hint = did_you_mean(part, node.keys()) if hasattr(node, "keys") else " It lies below a value."
            raise InputError(f"sweep: {field}: the config has no such field.{hint}")
        node = node[part]


def _names(added: Sequence[tuple[Mapping[str, str], str | None]]) -> list[str]:
    """A folder name for each entry: the one given, else what is overridden, each field as short as is clear."""
    fields = {field for overrides, _ in added for field in overrides}

    def label(field: str) -> str:
        parts = field.split(".")
        tails = (".".join(parts[-n:]) for n in range(1, len(parts) + 1))
        clear = (tail for tail in tails if sum(f".{f}".endswith(f".{tail}") for f in fields) == 1)
        return next(clear, field)

    names, seen = [], {}
    for overrides, name in added:
        key = json.dumps(overrides, sort_keys=True)
        if key in seen:
            raise InputError(f"sweep: entries {seen[key] + 1} and {len(names) + 1} are the same run: {key}.")
        seen[key] = len(names)
        if name is not None and not re.fullmatch(r"[\w=+][\w.,=+-]*", name):
            raise InputError(f"sweep: name {name!r}: use letters, digits and _ . , = + - only.")
        text = ",".join(f"{label(k)}={v}" for k, v in overrides.items()) or "default"
        names.append(name or re.sub(r"[^\w.,=+-]+", "-", re.sub(r"[()'\" ]", "", text)))
    count = Counter(names)
    for i, (overrides, name) in enumerate(added):
        if name is not None and [given for _, given in added].count(name) > 1:
            raise InputError(f"sweep: name {name!r} is given to several entries. Names must differ.")
        if name is None and (count[names[i]] > 1 or len(names[i]) > 100):
            digest = hashlib.sha256(json.dumps(overrides, sort_keys=True).encode()).hexdigest()[:8]
            names[i] = f"{names[i][:90]}-{digest}"
    return names


def _check_folder(entry: Entry) -> None:
    """Raises where the entry's folder holds a run that was made from something else."""
    path = os.path.join(entry.workdir, "sweep.json")
    if not os.path.exists(path):
        if os.path.exists(os.path.join(entry.workdir, "config.json")):
            raise InputError(f"{entry.workdir} holds a run that no sweep made. Name another --workdir.")
        return
    stored = _read_json(path)
    if stored != entry.settings:
        raise InputError(
            f"{entry.workdir} holds a run with other settings: {json.dumps(stored)} there, "
            f"{json.dumps(entry.settings)} now. Name another --workdir, or delete that folder."
        )


def _done(entry: Entry) -> dict[str, Any] | None:
    path = os.path.join(entry.workdir, "done.json")
    return _read_json(path) if os.path.exists(path) else None


def _read_json(path: str) -> Any:
    with open(path, encoding="utf-8") as f:
        try:
            return json.load(f)
        except ValueError as error:
            raise InputError(f"{path}: not JSON ({error}). Delete the file.") from None


def _start(folder: str, command: Sequence[str]) -> subprocess.Popen | None:
    """Starts a command, or returns None where one that was started earlier still runs.

    The lock on the log is the child's: it lasts as long as the child, also when this process is killed. Its own
    session keeps Ctrl-C from reaching it twice.
    """
    os.makedirs(folder, exist_ok=True)
    with open(os.path.join(folder, "log.txt"), "ab") as log:
        try:
            fcntl.flock(log, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return None
        return subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
        )


def _outcome(status: int) -> str:
    if status in (STOPPED, -signal.SIGTERM, -signal.SIGINT):
        return "stopped"
    return "failed" if status else "done"


def _tail(path: str, lines: int = 5) -> str:
    with open(path, "rb") as f:
        f.seek(max(0, os.path.getsize(path) - 4000))
        text = f.read().decode("utf-8", "replace").splitlines()[-lines:]
    return "its log ends with\n" + "\n".join(f"    {line}" for line in text)


def _say(message: str) -> None:
    print(message, flush=True)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="understudy sweep", allow_abbrev=False)
    parser.add_argument("--config", required=True, help="experiments/x.py, or experiments/x.py:VARIANT")
    parser.add_argument("--workdir", required=True, help="folder of the sweep")
    parser.add_argument("--jobs", type=int, default=1, help="how many run at a time")
    parser.add_argument("--metric", help="sort by this (default: eval/loss if there)")
    parser.add_argument("--maximize", action="store_true", help="the highest metric comes first")
    parser.add_argument("--dry_run", action="store_true", help="print the commands and stop")
    args, rest = parser.parse_known_args(argv)
    common = {}
    for flag in rest:
        match = re.fullmatch(r"--config\.([^=]+)=(.*)", flag, re.DOTALL)
        if not match:
            parser.error(f"unknown argument {flag!r}; overrides for all runs are --config.FIELD=VALUE")
        common[match[1]] = match[2]
    try:
        return sweep(
            args.config,
            common,
            args.workdir,
            jobs=args.jobs,
            metric=args.metric,
            maximize=args.maximize,
            dry_run=args.dry_run,
        )
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return BAD_INPUT


if __name__ == "__main__":
    sys.exit(main())
