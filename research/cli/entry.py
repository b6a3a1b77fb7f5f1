"""Commands by name, and where a process that runs one begins."""

import ast
import importlib
import importlib.util
import os
import pkgutil
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

from research import commands, signals
from research import console as console_lib
from research.cli.ending import fail
from research.cli.experiments import EXPERIMENTS
from research.devices import startup
from research.errors import Exit, did_you_mean

_MODULES = "research.commands"


def names() -> list[str]:
    return sorted(module.name for module in pkgutil.iter_modules(commands.__path__))


def summary(name: str) -> str:
    """The first line of a command's module. It is read, not imported: all of them together would take seconds."""
    path = importlib.util.find_spec(f"{_MODULES}.{name}").origin
    return (ast.get_docstring(ast.parse(Path(path).read_text(encoding="utf-8"))) or "").partition("\n")[0]


def overview() -> str:
    """All commands, a line each, by groups."""
    known, groups = names(), dict(commands.GROUPS)
    groups["Others"] = tuple(name for name in known if not any(name in group for group in groups.values()))
    width = max(map(len, known)) + 2
    lines = ["understudy NAME [--flag=value ...]; understudy NAME --help shows the flags.", ""]
    for title, group in groups.items():
        if group:
            lines += [f"{title}:", *(f"  {name:<{width}}{summary(name)}" for name in group), ""]
    return "\n".join(lines).rstrip()


def main(argv: Sequence[str]) -> int:
    """Runs the command that argv[0] names, or lists all."""
    if not argv or argv[0] in ("--help", "-h", "help"):
        print(overview())
        return Exit.DONE
    name, known = argv[0], names()
    if name not in known:
        if name.startswith("-") or os.path.sep in name:
            flag = name if name.startswith("-") else f"--config={name}"
            return fail(f"{name}: names no command. Write: understudy train {shlex.quote(flag)}", Exit.BAD_INPUT)
        if (EXPERIMENTS / f"{name}.py").is_file():
            return fail(f"{name}: is an experiment. Write: understudy train --config={name}", Exit.BAD_INPUT)
        return fail(f"{name}: no such command.{did_you_mean(name, known)}", Exit.BAD_INPUT)
    with startup.quick_imports():
        command = importlib.import_module(f"{_MODULES}.{name}")
    return command.main(argv[1:])


def console() -> int:
    """The console script `understudy`, and `python -m research`.

    Both find modules of the user's own, such as an objective, in the folder that they are run in.
    """
    if os.getcwd() not in sys.path:  # Python puts it there for -m alone
        sys.path.insert(0, os.getcwd())
    name = sys.argv[1] if sys.argv[1:] else ""
    runs = name in commands.RUNS
    if runs:
        signals.hold()
    if name in commands.STEPS and "--help" not in sys.argv:
        startup.leave_loops()
        startup.use_huge_pages()
    if runs:
        signals.begin()
    console_lib.steady(output=name == "train")
    status = main(sys.argv[1:])
    if runs:
        signals.end()
    return status
