"""Runs the list of runs that an experiment file defines: a study whose stages need nothing of each other.

Each run has a folder of its own below the workdir, and a process of its own. The same command again goes on: finished
runs are skipped, begun ones resumed. At the end there is a table, in results.csv as well.
"""

import csv
import dataclasses
import hashlib
import json
import math
import os
import re
import shlex
import shutil
import sys
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from types import ModuleType
from typing import Any

from research import cli, files
from research.cli import fields as config_fields
from research.errors import InputError, did_you_mean, own_code
from research.run import run
from research.studies import stages
from research.studies.execution import FAILED, STOPPED
from research.studies.runner import PROGRAM, Runner
from research.studies.stages import Stage, finished, state
from research.studies.tables import text_table

SETTINGS = "sweep.json"  # in a run's folder: the experiment and the overrides that it was made from

_HOW_TO = """Write one beside get_config, for example:

def sweep(add):
    for learning_rate in (1e-3, 3e-3):
        add({"optimizer.learning_rate": learning_rate})
"""


@dataclasses.dataclass(frozen=True)
class Entry:
    """One run of a sweep.

    Attributes:
      stage: of the study; its folder bears the run's name.
      overrides: dotted field -> value as on the command line; what sets this run apart.
      settings: what it was made from, stored beside it to be compared with: the experiment and all overrides.
      command: what runs it alone: the program and its arguments.
    """

    stage: Stage
    overrides: Mapping[str, str]
    settings: Mapping[str, Any]
    command: tuple[str, ...]

    @property
    def name(self) -> str:
        return self.stage.name


def plan(config: str, common: Mapping[str, str], workdir: str) -> list[Entry]:
    """Reads the sweep of an experiment. Nothing is written.

    Args:
      config: path of the experiment's file, with ":VARIANT" or without.
      common: dotted field -> value as on the command line, for all runs.
      workdir: of the sweep.

    Raises:
      InputError: there is no sweep, two of its entries are the same, a field doesn't exist, a value can't be
        written on a command line, a run can't work, or a folder holds a run that was made from something else.
    """
    path, _, variant = config.partition(":")
    module = _load(path)
    defaults = module.get_config(variant) if variant else module.get_config()
    additions: list[tuple[dict[str, str], str | None]] = []

    def add(overrides: Mapping[str, Any], name: str | None = None) -> None:
        additions.append(({field: flag_value(field, value) for field, value in overrides.items()}, name))

    with own_code(path):
        module.sweep(add)
    if not additions:
        raise InputError(f"{path}: its sweep(add) adds no run. {_HOW_TO}")
    for field in {**common, **{field: None for overrides, _ in additions for field in overrides}}:
        _check_field(defaults, field)
    for field in common:
        if any(field in overrides for overrides, _ in additions):
            raise InputError(f"--config.{field}={common[field]}: the sweep of {path} sets it. Leave the flag out.")
    origin = ":".join(filter(None, (os.path.relpath(path), variant)))
    entries = []
    for (overrides, _), name in zip(additions, _names(additions), strict=True):
        every = {**common, **overrides}
        flags = [f"--config={config}", *(f"--config.{k}={v}" for k, v in every.items())]
        settings = stages.run_settings(name, cli.read_experiment(flags).config)
        stage = stages.make_stage(name, "train", settings, (), os.path.join(workdir, name))
        command = ("python", "-m", "research.main", flags[0], f"--workdir={stage.workdir}", *flags[1:])
        entries.append(Entry(stage, overrides, {"config": origin, "overrides": every}, command))
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


def results(
    entries: Sequence[Entry], metric: str | None = None, maximize: bool = False
) -> tuple[list[str], list[dict[str, Any]]]:
    """Returns columns and rows of the table: run, status, step, overrides, final metrics.

    Args:
      entries: of the sweep.
      metric: what to sort by; None is eval/loss if there.
      maximize: whether the highest comes first.
    """
    rows = []
    for entry in entries:
        status = {"new": "not started", "begun": "stopped"}.get(state(entry.stage), state(entry.stage))
        row = {"run": entry.name, "status": status, **entry.overrides}
        done = finished(entry.stage)
        if done is not None:
            row |= {"step": done["step"], **{name: float(value) for name, value in done["metrics"].items()}}
        rows.append(row)
    metric = metric or "eval/loss"
    names = {name for row in rows for name in row} - {"run", "status", "step"}
    overrides = list(dict.fromkeys(field for entry in entries for field in entry.overrides))
    metrics = sorted(names - set(overrides), key=lambda name: (name != metric, not name.startswith("eval/"), name))

    def order(row: Mapping[str, Any]) -> tuple:
        value = row.get(metric, math.nan)
        return (math.isnan(value), 0.0 if math.isnan(value) else -value if maximize else value)

    return ["run", "status", "step", *overrides, *metrics], sorted(rows, key=order)


def format_table(columns: Sequence[str], rows: Sequence[Mapping[str, Any]], width: int) -> str:
    """Returns the table as text. Columns that don't fit into `width` characters are left out, from the right."""

    def text(value: Any) -> str:
        return f"{value:.4g}" if isinstance(value, float) else str(value)

    return text_table([columns, *([text(row.get(column, "")) for column in columns] for row in rows)], width)


def sweep(
    config: str,
    common: Mapping[str, str],
    workdir: str,
    *,
    jobs: int = 1,
    metric: str | None = None,
    maximize: bool = False,
    dry_run: bool = False,
    program: Sequence[str] = PROGRAM,
) -> int:
    """Plans, runs and sums up; returns the exit status.

    Args:
      config, common, workdir: see `plan`.
      jobs: how many run at a time.
      metric, maximize: see `results`.
      dry_run: print what would run, and stop.
      program: see Runner.

    Raises:
      InputError: the plan can't be made, or no finished run has `metric`.
    """
    if jobs < 1:
        raise InputError(f"--jobs={jobs}: must be at least 1.")
    entries = plan(config, common, workdir)
    todo = [entry for entry in entries if finished(entry.stage) is None]
    print(f"{len(entries)} runs, {len(entries) - len(todo)} finished already", flush=True)
    if dry_run:
        for entry in todo:
            print(shlex.join(entry.command), flush=True)
        return 0
    for entry in todo:
        os.makedirs(entry.stage.workdir, exist_ok=True)
        files.write_json(os.path.join(entry.stage.workdir, SETTINGS), entry.settings)
    commands = {entry.stage.id: shlex.join(entry.command) for entry in entries}
    try:
        Runner([e.stage for e in entries], keep_going=True, jobs=jobs, commands=commands, program=program).run()
    except run.Preempted as stop:
        print(stop, file=sys.stderr)
    return _sum_up(entries, workdir, metric, maximize)


def _sum_up(entries: Sequence[Entry], workdir: str, metric: str | None, maximize: bool) -> int:
    """Writes results.csv and prints the table; returns the exit status."""
    columns, rows = results(entries, metric, maximize)
    path = os.path.join(workdir, "results.csv")
    with open(path, "w", encoding="utf-8", newline="") as f:
        writer = csv.DictWriter(f, columns)
        writer.writeheader()
        writer.writerows(rows)
    print("\n" + format_table(columns, rows, shutil.get_terminal_size((120, 24)).columns))
    print(f"\nin full in {path}\nnext     understudy report --workdir={shlex.quote(workdir)}", flush=True)
    done = [row for row in rows if row["status"] == "done"]
    if metric and done and not any(metric in row for row in done):
        raise InputError(f"--metric={metric}: no run has it.{did_you_mean(metric, columns[3:])}")
    failed = [row["run"] for row in rows if row["status"] == "failed"]
    if failed:
        print(f"failed: {', '.join(failed)}", flush=True)
        return FAILED
    return STOPPED if len(done) < len(rows) else 0


def _load(path: str) -> ModuleType:
    """Imports the experiment's file, which must define get_config and sweep."""
    if not os.path.isfile(path):
        folder = os.path.dirname(path) or "."
        there = [os.path.join(folder, name) for name in os.listdir(folder)] if os.path.isdir(folder) else []
        hint = did_you_mean(path, [name for name in there if name.endswith(".py")])
        raise InputError(f"--config={path}: there is no such file.{hint}")
    module = cli.load_module(path)
    if not hasattr(module, "sweep"):
        raise InputError(f"--config={path}: it defines no sweep(add). {_HOW_TO}")
    return module


def _check_field(defaults: Any, field: str) -> None:
    """Raises where a config has no such field, so that a typo costs no start of a run."""
    if config_fields.is_new(defaults, field):
        return
    node = defaults
    for part in field.split("."):
        if not hasattr(node, "keys") or part not in node:
            hint = did_you_mean(part, node.keys()) if hasattr(node, "keys") else " It lies below a value."
            raise InputError(f"sweep: {field}: the config has no such field.{hint}")
        node = node[part]


def _names(additions: Sequence[tuple[Mapping[str, str], str | None]]) -> list[str]:
    """A folder name for each entry: the one given, else what is overridden, each field as short as is clear."""
    _check_names(additions)
    fields = {field for overrides, _ in additions for field in overrides}
    names = []
    for overrides, name in additions:
        text = ",".join(f"{_short(field, fields)}={value}" for field, value in overrides.items()) or "default"
        names.append(name or re.sub(r"[^\w.,=+-]+", "-", re.sub(r"[()'\" ]", "", text)))
    count = Counter(names)
    for i, (overrides, name) in enumerate(additions):
        if name is None and (count[names[i]] > 1 or len(names[i]) > 100):
            digest = hashlib.sha256(json.dumps(overrides, sort_keys=True).encode()).hexdigest()[:8]
            names[i] = f"{names[i][:90]}-{digest}"
    return names


def _check_names(additions: Sequence[tuple[Mapping[str, str], str | None]]) -> None:
    seen: dict[str, int] = {}
    names = [name for _, name in additions]
    for number, (overrides, name) in enumerate(additions, start=1):
        key = json.dumps(overrides, sort_keys=True)
        if key in seen:
            raise InputError(f"sweep: entries {seen[key]} and {number} are the same run: {key}.")
        seen[key] = number
        if name is not None and not re.fullmatch(r"[\w=+][\w.,=+-]*", name):
            raise InputError(f"sweep: name {name!r}: use letters, digits and _ . , = + - only.")
        if name is not None and names.count(name) > 1:
            raise InputError(f"sweep: name {name!r} is given to several entries. Names must differ.")


def _short(field: str, fields: Collection[str]) -> str:
    """The end of a dotted field that no other of `fields` has."""
    parts = field.split(".")
    tails = (".".join(parts[-n:]) for n in range(1, len(parts) + 1))
    return next((tail for tail in tails if sum(f".{f}".endswith(f".{tail}") for f in fields) == 1), field)


def _check_folder(entry: Entry) -> None:
    """Raises where the entry's folder holds a run that was made from something else."""
    folder = entry.stage.workdir
    stored = files.read_json(os.path.join(folder, SETTINGS), None)
    if stored is None:
        if os.path.exists(os.path.join(folder, "config.json")):
            raise InputError(f"{folder} holds a run that no sweep made. Name another --workdir.")
        return
    if stored != entry.settings:
        difference = f"{json.dumps(stored)} there, {json.dumps(entry.settings)} now"
    elif os.path.exists(os.path.join(folder, stages.ABOUT)):
        difference = stages.difference(stages.read_stage(folder), entry.stage)
    else:
        difference = ""
    if difference:
        raise InputError(
            f"{folder} holds a run with other settings: {difference}. Name another --workdir, or delete that folder."
        )
