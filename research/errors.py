"""The one error for bad input: it says which field or file, what it held, and what to do."""

import difflib
import enum
import re
import traceback
from collections.abc import Iterable, Sequence
from pathlib import Path

# Seeds have 32 bits: jax would take the remainder of a larger one, and numpy refuses those below 0.
MOST_SEED = 2**32 - 1


class Exit(enum.IntEnum):
    """The exit statuses of every command. After PREEMPTED and LOST, the same command goes on from where it stopped."""

    DONE = 0
    FAILED = 1  # a cause was found: a plan that doesn't fit, a stage that failed, a bug
    BAD_INPUT = 2
    DIVERGED = 3  # the loss is no number
    PREEMPTED = 75  # EX_TEMPFAIL of sysexits.h: a signal asked for the end
    LOST = 76  # another process of the run is gone
    INTERRUPTED = 130


class InputError(ValueError):
    """Something the user gave can't be used. The message names the field or file, its value and the remedy."""


def did_you_mean(name: str, options: Iterable[str]) -> str:
    """Returns " Did you mean 'x'?" for the nearest of `options`, else the list of what is allowed."""
    options = sorted(options)
    near = difflib.get_close_matches(name, options, n=1, cutoff=0.6)
    if near:
        return f" Did you mean {near[0]!r}?"
    return f" Known: {', '.join(options)}."


def explain_flag_error(error: Exception, argv: Sequence[str]) -> str:
    """Says in a line what is wrong with a command line; config_flags' own errors are a traceback or a bare key.

    An error inside an experiment's file that isn't an InputError keeps its traceback, which its author needs.
    """
    text = str(error.args[0] if error.args else error)
    config = next((a.split("=", 1)[1] for a in argv if a.startswith("--config=")), "")
    path = Path(config.split(":")[0])
    if config and not path.is_file():
        there = [str(p) for p in path.parent.glob("*.py")] if path.parent.is_dir() else []
        return f"--config={config}: there is no file {str(path)!r}.{did_you_mean(str(path), there)}"
    inner = re.search(r"InputError: (.*)", text)
    if inner:
        return inner[1]
    if isinstance(error, AttributeError | KeyError) and (key := re.match(r"\W*(\w+)", text)):
        for flag in argv:
            if re.match(rf"--config\.(.*\.)?{key[1]}(\.|=|$)", flag):
                near = re.search(r'Did you mean "(\w+)"', text)
                hint = (
                    f"Did you mean {near[1]!r}?"
                    if near
                    else ("docs/configs.md lists the fields; in an objective, what the experiment sets can be changed.")
                )
                return f"{flag}: no such field {key[1]!r}. {hint}"
    number = re.match(r"flag (--config\..*): (invalid literal for int|could not convert string to float)", text)
    if number:
        return f"{number[1]}: must be a {'whole ' if 'int' in number[2] else ''}number."
    if not isinstance(error, InputError) and not type(error).__module__.startswith("absl"):
        return "".join(traceback.format_exception(error)).strip()
    return text
