"""The one error for bad input: it says which field or file, what it held, and what to do."""

import contextlib
import difflib
import enum
import errno
import os
import re
import traceback
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

# Seeds have 32 bits: jax would take the remainder of a larger one, and numpy refuses those below 0.
MOST_SEED = 2**32 - 1
_LONGEST = 400  # letters of an error that comes from elsewhere


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
    "rewards",
    "optimizer.groups",
    "plan.prices",
    "eval.sets",
)


class Exit(enum.IntEnum):
    """The exit statuses of every command. After PREEMPTED and LOST, the same command goes on from where it stopped."""

    DONE = 0
    FAILED = 1  # something was found: a plan that doesn't fit, a stage that failed, why a run doesn't learn, a bug
    BAD_INPUT = 2
    DIVERGED = 3  # the loss is no number
    PREEMPTED = 75  # EX_TEMPFAIL of sysexits.h: a signal asked for the end
    LOST = 76  # another process of the run, or all of its servers, are gone
    INTERRUPTED = 130
    UNREAD = 141  # nobody reads standard output any more, as a shell says of who ended by SIGPIPE


class Unavailable(Exception):
    """Other machines that the work needs don't answer. The same command goes on from where it stopped."""


# What a disk says that is full, vanishes or breaks, and what a place says where nothing can be written.
_OF_DISKS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EROFS, errno.ESTALE, errno.ENODEV, errno.ENXIO)
_OF_PLACES = (errno.EACCES, errno.EPERM, errno.ENOTDIR, errno.EISDIR, errno.EEXIST, errno.ENAMETOOLONG, errno.ELOOP)
_IN_WORDS = (errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EROFS)


def disk_fault(error: BaseException) -> str:
    """What is wrong with a disk, and the file where it is known, where an error comes of that; else ""."""
    if isinstance(error, OSError) and error.errno in (*_OF_DISKS, *_OF_PLACES):
        return str(error.strerror) if error.filename is None else f"{error.filename}: {error.strerror}"
    for number in _IN_WORDS:  # libraries that aren't written in Python
        if os.strerror(number) in str(error) or re.search(rf"(?i)os error:? {number}\b|code: {number}\b", str(error)):
            return os.strerror(number)
    return disk_fault(error.__cause__) if error.__cause__ is not None else ""


class InputError(ValueError):
    """Something the user gave can't be used. The message names the field or file, its value and the remedy."""


def did_you_mean(name: str, options: Iterable[str]) -> str:
    """Returns " Did you mean 'x'?" for the nearest of `options`, else the list of what is allowed."""
    options = sorted(options)
    near = difflib.get_close_matches(str(name)[:_LONGEST], options, n=1, cutoff=0.6)
    if near:
        return f" Did you mean {near[0]!r}?"
    return f" Known: {', '.join(options)}."


def printable(text: str) -> str:
    """Text for a terminal: its control characters, but for ends of lines and tabs, are shown as escapes such as \\x1b,
    so that what a file or a model says can't move the cursor or hide what stands before it."""
    return re.sub("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]", _escaped, text)


def _escaped(match: re.Match[str]) -> str:
    return match[0].encode("unicode_escape").decode()


def _experiments(path: Path, folder: Path) -> list[str]:
    """What a --config that isn't there may have meant: files of its folder; of a bare name, experiments too, here or
    in `folder`."""
    there = [str(p) for p in path.parent.glob("*.py")] if path.parent.is_dir() else []
    if path.name != str(path):
        return there
    return there + [p.stem for each in (Path("experiments"), folder) for p in each.glob("*.py")]


def explain_flag_error(error: Exception, argv: Sequence[str], hint: Callable[[str], str], experiments: Path) -> str:
    """Says in a line what is wrong with a command line; config_flags' own errors are a traceback or a bare key.

    Args:
      error: what was raised.
      argv: the flags of the experiment.
      hint: dotted name of a field that isn't there -> what it may have meant, with a space before it; or "".
      experiments: the folder of those that come with the package.
    """
    text = str(error.args[0] if error.args else error)
    config = next((a.split("=", 1)[1] for a in argv if a.startswith("--config=")), "")
    path = Path(config.split(":")[0])
    if config and not path.is_file():
        if path.is_dir():
            return f"--config={config}: is a folder. Name a file in it."
        hints = did_you_mean(str(path), _experiments(path, experiments))
        return f"--config={config}: there is no file {str(path)!r}.{hints}"
    if inner := re.search(r"InputError: (.*)", text):
        return inner[1]
    if isinstance(error, InputError):
        return text
    if line := explain_own_error(error, str(path)) if config else "":
        return _explain_locked(line, hint)
    if "Traceback (most recent call last)" in text:  # of a call that the file's get_config doesn't take
        return f"--config={config}: {text.strip().splitlines()[-1]}"
    if line := _explain_field(error, text, argv, hint) or _explain_value(text, argv):
        return line
    if not type(error).__module__.startswith("absl"):
        return "".join(traceback.format_exception(error)).strip()
    return text


@contextlib.contextmanager
def located(where: str) -> Iterator[None]:
    """An InputError of what is done within begins with where its cause stands, such as file:line."""
    try:
        yield
    except InputError as error:
        raise InputError(f"{where}: {error}") from error


@contextlib.contextmanager
def own_code(path: str) -> Iterator[None]:
    """Runs code of a user's file. An exception in it becomes an InputError of one line: file, line and error."""
    try:
        yield
    except InputError:
        raise
    except Exception as error:
        raise InputError(explain_own_error(error, path) or f"{path}: {_shown(error)}") from error


def explain_own_error(error: BaseException, path: str) -> str:
    """Where in a user's file an exception, or what it came of, was raised, and what it says; "" where nowhere in it."""
    chain = [error]
    while (cause := chain[-1].__cause__ or chain[-1].__context__) is not None and cause not in chain:
        chain.append(cause)
    for each in reversed(chain):
        if isinstance(each, SyntaxError) and _is_same(each.filename or "", path):
            code = f": {each.text.strip()}" if each.text else ""
            return f"{path}:{each.lineno}: {type(each).__name__}: {each.msg}{code}"
        frames = traceback.extract_tb(each.__traceback__)
        own = [frame for frame in frames if _is_same(frame.filename, path)]
        if own:
            last = frames[-1]
            elsewhere = last is not own[-1] and not last.filename.startswith("<")
            place = f" (raised in {last.filename}:{last.lineno})" if elsewhere else ""
            return f"{path}:{own[-1].lineno}: {_shown(each)}{place}"
    return ""


def _is_same(file: str, path: str) -> bool:
    return os.path.abspath(file) == os.path.abspath(path)


def _shown(error: BaseException) -> str:
    """An exception on a line, without the whole config that those of ConfigDict hold."""
    text = re.sub(r' Other fields present: ".*}"', "", str(error).replace("\\n", " "), flags=re.DOTALL)
    text = f"{type(error).__name__}: {' '.join(text.split())}"
    return text if len(text) <= _LONGEST else f"{text[:_LONGEST]} ..."


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


def _explain_locked(line: str, hint: Callable[[str], str]) -> str:
    """The line of an error; of one that get_config sets a field which there isn't, in plain words."""
    locked = re.match(r"""(.*?:\d+: )\w+Error: .*Key "(\w+)" does not exist""", line)
    if locked is None:
        return line
    return f"{locked[1]}the config has no field {locked[2]!r}.{hint(locked[2]) or ' docs/configs.md lists the fields.'}"


def _explain_field(error: Exception, text: str, argv: Sequence[str], hint: Callable[[str], str]) -> str:
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
        if re.match(rf"--(?:no)?config\.(?:.*\.)?{key[1]}(\.|=|$)", flag):
            field = flag.partition("=")[0].partition(".")[2]
            return f"{flag}: no such field {field!r}.{hint(field) or ' docs/configs.md lists the fields.'}"
    return ""


def _explain_value(text: str, argv: Sequence[str]) -> str:
    """What is wrong with a value; "" where it's something else."""
    flag = next((flag for flag in argv if text.startswith(f"flag {flag}: ")), None)
    if flag is None:
        return ""
    reason = text.removeprefix(f"flag {flag}: ")
    for sign, wanted in (
        (
            "ConfigDict",
            "must be a mapping as Python writes it, no dot in names: \"{'name': 1}\". One field is set by .NAME=VALUE",
        ),
        ("Non-boolean", "must be True or False"),
        ("invalid literal for int", "must be a whole number"),
        ("could not convert string to float", "must be a number"),
    ):
        if sign in reason:
            return f"{flag}: {wanted}."
    return f"{flag}: {reason}"
