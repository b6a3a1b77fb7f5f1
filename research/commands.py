"""What the commands have in common: flags, exit statuses, and outputs that a killed run leaves in part."""

import argparse
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from research.errors import InputError, did_you_mean

BAD_INPUT, INTERRUPTED = 2, 130


def run(work: Callable[[], None], *, resumable: bool = False) -> int:
    """Does a command's work, and returns its exit status; an InputError is printed.

    Args:
      work: all of it, from its flags on.
      resumable: where it is interrupted, say that the same command goes on.
    """
    try:
        work()
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return BAD_INPUT
    except KeyboardInterrupt:
        if resumable:
            print("interrupted: the same command goes on", file=sys.stderr)
        return INTERRUPTED
    return 0


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


def whole_lines(path: Path) -> int:
    """Drops a torn line at the end of a file, and returns how many lines it has."""
    lines = end = 0
    with open(path, "rb") as file:
        for line in file:
            if line.endswith(b"\n"):
                lines, end = lines + 1, end + len(line)
    os.truncate(path, end)
    return lines
