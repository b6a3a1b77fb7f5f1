"""The one error for bad input: it says which field or file, what it held, and what to do."""

import difflib
import enum
import re
import traceback
from collections.abc import Iterable, Sequence
from pathlib import Path

# Seeds have 32 bits: jax would take the remainder of a larger one, and numpy refuses those below 0.
MOST_SEED = 2**32 - 1


# Fields of a config that are mappings: what isn't in them can't be set by its name.
MAPPINGS = (
    "rules",
    "trainable",
    "adapter",
    "roles",
    "data.fields",
    "data.sources",
    "objective",
    "objective.terms",
    "optimizer.groups",
    "plan.prices",
)


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
    if inner := re.search(r"InputError: (.*)", text):
        return inner[1]
    if isinstance(error, InputError):
        return text
    if line := _explain_field(error, text, argv) or _explain_value(text, argv):
        return line
    if "Traceback" in text or not type(error).__module__.startswith("absl"):
        return "".join(traceback.format_exception(error)).strip()
    return text


def check_field(flag: str) -> None:
    """Raises InputError where a flag of the config isn't --config.FIELD=VALUE."""
    field, equals, value = flag.removeprefix("--no").removeprefix("--").partition("=")
    names = field.split(".")[1:]
    if not all(name.isidentifier() for name in names) or (not names and not flag.startswith("--config")):
        part = " A part of a tuple or a mapping is set with the whole." if {"[", "{"} & set(field) else ""
        raise InputError(f"{flag}: isn't of the form --config.FIELD=VALUE, such as --config.model.num_layers=2.{part}")
    if "\0" in value:
        raise InputError(f"--{field} = {value!r}: holds a zero byte. Leave it out.")
    if equals and flag.startswith("--no"):
        raise InputError(f"{flag}: is False without a value. Write --{field}={value}.")
    if not equals and not flag.startswith("--no"):
        raise InputError(f"{flag}: has no value. Write {flag}=VALUE.")


def _explain_field(error: Exception, text: str, argv: Sequence[str]) -> str:
    """What is wrong with a field that isn't there; "" where it's something else."""
    if lookup := re.search(r"Attribute <class '(\w+)'>.* Attempting to lookup: ([\w.]+)", text):
        flag = next((flag for flag in argv if flag.startswith(f"--config.{lookup[2]}")), f"--config.{lookup[2]}")
        return f"{flag}: what is before the last dot is one value ({lookup[1]}), and has no fields. Set it as a whole."
    key = re.match(r"\W*(\w+)", text) if isinstance(error, AttributeError | KeyError) else None
    if unknown := re.match(r"Unknown command line flag '(no(config\.[\w.]+))'", text):
        return (
            f"--{unknown[1]}: sets a field to False, and {unknown[2]} isn't True or False. Write --{unknown[2]}=VALUE."
        )
    for flag in argv if key else ():
        if place := re.match(rf"--(?:no)?config\.(?:(.*)\.)?{key[1]}(\.|=|$)", flag):
            if place[1] in MAPPINGS or f"{place[1]}".startswith("objective."):
                return (
                    f"{flag}: {place[1]} has no {key[1]!r} yet. It is a mapping, which takes a new name when it is "
                    f'written whole: --config.{place[1]}="{{..., {key[1]!r}: ...}}".'
                )
            near = re.search(r'Did you mean "(\w+)"', text)
            hint = f"Did you mean {near[1]!r}?" if near else "docs/configs.md lists the fields."
            return f"{flag}: no such field {key[1]!r}. {hint}"
    return ""


def _explain_value(text: str, argv: Sequence[str]) -> str:
    """What is wrong with a value; "" where it's something else."""
    flag = next((flag for flag in argv if text.startswith(f"flag {flag}: ")), None)
    if flag is None:
        return ""
    reason = text.removeprefix(f"flag {flag}: ")
    for sign, wanted in (
        ("ConfigDict", "must be a mapping as Python writes it: \"{'name': 1}\". One field is set by .NAME=VALUE"),
        ("Non-boolean", "must be True or False"),
        ("invalid literal for int", "must be a whole number"),
        ("could not convert string to float", "must be a number"),
    ):
        if sign in reason:
            return f"{flag}: {wanted}."
    return f"{flag}: {reason}"
