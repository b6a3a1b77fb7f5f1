"""What the commands have in common: flags and exit statuses."""

import argparse
import importlib
import pkgutil
import sys
from collections.abc import Callable, Sequence
from typing import Any

from absl import flags
from ml_collections import config_flags

from research import commands
from research.errors import InputError, did_you_mean, explain_flag_error

BAD_INPUT, INTERRUPTED = 2, 130


def run(work: Callable[[], int | None], *, resumable: bool = False) -> int:
    """Does a command's work, and returns its exit status; an InputError is printed.

    Args:
      work: all of it, from its flags on; what it returns is the status, None being 0.
      resumable: where it is interrupted, say that the same command goes on.
    """
    try:
        return work() or 0
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return BAD_INPUT
    except KeyboardInterrupt:
        if resumable:
            print("interrupted: the same command goes on", file=sys.stderr)
        return INTERRUPTED


def make_parser(name: str, description: str) -> argparse.ArgumentParser:
    """A parser of `python -m research.NAME`, whose description is printed as it is written."""
    return argparse.ArgumentParser(
        f"python -m research.{name}",
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )


def parse(
    parser: argparse.ArgumentParser, argv: Sequence[str], required: Sequence[str] = (), remedy: str = ""
) -> argparse.Namespace:
    """Parses flags.

    Raises:
      InputError: a flag isn't known, or one of `required` isn't given; `remedy` then says what to write.
    """
    args, unknown = parser.parse_known_args(argv)
    if unknown:
        flag = unknown[0].split("=")[0]
        raise InputError(f"{flag}: no such flag.{did_you_mean(flag, [f'--{name}' for name in vars(args)])}")
    for name in required:
        if not getattr(args, name):
            raise InputError(f"--{name}: is missing. {remedy}")
    return args


def experiment_flags(argv: Sequence[str]) -> flags.FlagValues:
    """Flags of a command that takes an experiment, with --config and what overrides it; the command adds its own."""
    values = flags.FlagValues()
    config_flags.DEFINE_config_file("config", None, "As of research.main.", flag_values=values, sys_argv=["", *argv])
    return values


def parse_experiment(values: flags.FlagValues, argv: Sequence[str], required: str, example: str) -> dict[str, Any]:
    """Parses flags into `values`; returns the experiment's config.

    Raises:
      InputError: a flag is at fault, or --config or `required` isn't given; `example` is then shown.
    """
    try:
        values(["command", *argv])
        if values.config is None or values[required].value is None:
            raise InputError(f"--config, --{required}: are missing. Give {example}.")
        return values.config.to_dict()
    except Exception as error:
        raise InputError(explain_flag_error(error, argv)) from error


def main(argv: Sequence[str]) -> int:
    """Runs the command that argv[0] names, a module of research.commands."""
    names = sorted(module.name for module in pkgutil.iter_modules(commands.__path__))
    if not argv or argv[0] not in names:
        print(f"Commands: {', '.join(names)}", file=sys.stderr)
        return BAD_INPUT
    return importlib.import_module(f"research.commands.{argv[0]}").main(argv[1:])


def console() -> int:
    """The console script `understudy`."""
    return main(sys.argv[1:])
