"""How commands read their flags and how they end. `understudy NAME ...` runs the module NAME of research.commands."""

import ast
import contextlib
import dataclasses
import difflib
import gc
import importlib
import importlib.util
import io
import json
import math
import os
import pkgutil
import re
import shlex
import sys
import textwrap
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any, NamedTuple

from research import commands, files
from research.devices import startup
from research.errors import MOST_SEED, Exit, InputError, check_field, did_you_mean, explain_flag_error

_MODULES = "research.commands"
EXPERIMENTS = Path(__file__).parents[2] / "experiments"
_CONFIG_HELP = (
    "an experiment, NAME or experiments/NAME.py[:VARIANT,...]; --config.FIELD=VALUE overrides a field of its config"
)
_WIDTH = 100
_READ = ("data", "model", "teacher")  # flags that name what is read
_DISK_ERRORS = (PermissionError, IsADirectoryError, NotADirectoryError, FileExistsError)


@dataclasses.dataclass(frozen=True)
class Flag:
    """One flag of a command.

    Attributes:
      name: without its dashes.
      help: what it says; without the default, which is added.
      default: its value where it isn't given; of a `many` flag an empty list, of a `switch` False.
      shown: what the help says the default is, where `default` doesn't say it.
      metavar: what the help calls its value; "" of a switch.
      parse: text -> value; raises ValueError with what the value must be.
      required: whether it must be given.
      many: whether it may come several times; its value is then a list.
      empty: whether its value may be the empty text.
      of: flags without all of which it has no effect.
    """

    name: str
    help: str
    default: Any = None
    shown: str = ""
    metavar: str = ""
    parse: Callable[[str], Any] = str
    required: bool = False
    many: bool = False
    empty: bool = False
    of: tuple[str, ...] = ()

    @property
    def switch(self) -> bool:
        return self.default is False

    @property
    def spelling(self) -> str:
        return f"--{self.name}" if self.switch else f"--{self.name}={self.metavar or 'TEXT'}"

    @property
    def note(self) -> str:
        if self.required:
            return "Required."
        default = self.shown or ("off" if self.switch else "none" if self.default in (None, "") else self.default)
        return f"Default: {default}." + (" Can be repeated." if self.many else "")


class Experiment(NamedTuple):
    """The experiment of --config.

    Attributes:
      name: FILE[:VARIANT], as given.
      config: its config with the overrides, a ml_collections.ConfigDict.
      overrides: dotted field -> value.
      flags: those that describe it, as given.
    """

    name: str
    config: Any
    overrides: Mapping[str, Any]
    flags: tuple[str, ...]

    @property
    def path(self) -> str:
        return self.name.partition(":")[0]

    @property
    def texts(self) -> dict[str, str]:
        """Dotted field -> its value as it is on the command line.

        Raises:
          InputError: an override has no value.
        """
        texts = {}
        for flag in self.flags:
            name, equals, text = flag.partition("=")
            if name != "--config" and not (equals and name.startswith("--config.")):
                raise InputError(f"{flag}: has no value. Write --config.FIELD=VALUE.")
            if name != "--config":
                texts[name.removeprefix("--config.")] = text
        return texts

    @property
    def values(self) -> dict[str, Any]:
        """The config without the section of a study."""
        return {name: value for name, value in self.config.to_dict().items() if name != "study"}


@dataclasses.dataclass(frozen=True)
class Command:
    """A command: its flags, and what the help says of it.

    Attributes:
      name: NAME of `understudy NAME`.
      doc: what it does; its first line is the summary.
      flags: all of them, but --config of an experiment.
      examples: command lines, the first of them with all required flags.
      experiment: whether it takes an experiment with --config, which is `args.experiment` then.
      renamed: a name that a flag once had -> what it is called now.
      resumable: whether the same command, with --output, goes on where an interrupted one stopped.
    """

    name: str
    doc: str
    flags: tuple[Flag, ...]
    examples: tuple[str, ...]
    experiment: bool = False
    renamed: Mapping[str, str] = dataclasses.field(default_factory=dict)
    resumable: bool = False

    def run(self, argv: Sequence[str], work: Callable[[SimpleNamespace], int | None]) -> int:
        """Parses flags, does the work and returns the exit status; errors are printed, and --help is.

        Args:
          argv: the command line after the command's name.
          work: all that the command does, given the flags' values; what it returns is the status, None being 0.
        """
        _prepare()
        if {"--help", "-h"} & set(argv):
            print(self.help())
            return Exit.DONE
        resumable = self.resumable and any(word.partition("=")[0] == "--output" for word in argv)
        return finish(lambda: work(self.parse(argv)), resumable=resumable)

    def parse(self, argv: Sequence[str]) -> SimpleNamespace:
        """Flags -> values by name; in `given` the texts of those that are given; the experiment's in `experiment`.

        Raises:
          InputError: a flag isn't known, has no value, one that can't work or no effect, or a required one isn't given;
            or the output would take the place of an input.
        """
        known = {flag.name: flag for flag in self.flags}
        values = {flag.name: [] if flag.many else flag.default for flag in self.flags}
        config, given = [], {}
        for name, value in self._pairs(argv):
            if self.experiment and re.fullmatch(r"(no)?config(\..*)?", name):
                config.append(f"--{name}" if value is None else f"--{name}={value}")
                continue
            flag = known.get(name) or known.get(name.removeprefix("no"))
            if flag is None or (flag.name != name and not flag.switch):
                raise self._unknown(name, value)
            parsed = _parse_value(flag, name, value)
            if flag.many:
                given[flag.name] = value
                values[flag.name].append(parsed)
            elif not flag.switch and given.get(flag.name, value) != value:
                raise InputError(f"--{name} = {value}: was {given[name]} before, and can be one. Leave one out.")
            else:
                given[flag.name] = value
                values[flag.name] = parsed
        missing = [flag.name for flag in self.flags if flag.required and not values[flag.name]]
        if self.experiment and not any(flag.startswith("--config=") and flag != "--config=" for flag in config):
            missing.insert(0, "config")
        if missing:
            names = ", ".join(f"--{name}" for name in missing)
            raise InputError(f"{names}: {'is' if len(missing) == 1 else 'are'} missing. Example: {self.examples[0]}")
        for flag in self.flags:
            if flag.name in given and flag.of and not any(values[other] for other in flag.of):
                others = " and ".join(f"--{other}" for other in flag.of)
                verb = "is" if len(flag.of) == 1 else "are"
                raise InputError(
                    f"--{flag.name} = {given[flag.name]}: is of {others}, which {verb}n't given. Leave it out."
                )
        args = SimpleNamespace(**values, given=given)
        if self.experiment:
            args.experiment = read_experiment(config)
        _check_output(args)
        return args

    def _pairs(self, argv: Sequence[str]) -> Iterator[tuple[str, str | None]]:
        """(name, value) of each flag; the value is None where the flag is a switch, or none is given."""
        left = list(argv)
        switches = {flag.name for flag in self.flags if flag.switch}
        while left:
            word = left.pop(0)
            name, equals, value = word.removeprefix("--").partition("=")
            if not word.startswith("--") or not name:
                raise self._no_flag(word)
            takes = name not in switches and name.removeprefix("no") not in switches
            if not equals and takes and left and not left[0].startswith("--"):
                equals, value = "=", left.pop(0)
            yield name, value if equals else None

    def _no_flag(self, word: str) -> InputError:
        """The error for what isn't of the form --name=value."""
        names = self._names()
        name = word.lstrip("-").partition("=")[0]
        if name in names or (self.experiment and name.startswith("config.")):
            return InputError(f"{word}: flags begin with two dashes. Write --{word.lstrip('-')}.")
        if word.startswith("-") or "=" in word:
            return InputError(f"{word}: isn't of the form --name=value.{did_you_mean(f'--{name}', names.values())}")
        first = "config" if self.experiment else next((f.name for f in self.flags if f.required), "")
        return InputError(f"{word}: is no flag. Flags have the form --name=value: write --{first}={word}.")

    def _unknown(self, name: str, value: str | None) -> InputError:
        if name in self.renamed:
            now = self.renamed[name]
            return InputError(f"--{name}: is called --{now} now. Write --{now}{'' if value is None else f'={value}'}.")
        if self.experiment and not difflib.get_close_matches(name, self._names()):
            return InputError(
                f"--{name}: no such flag. A field of the config is set by --config.FIELD=VALUE; see docs/configs.md."
            )
        return InputError(f"--{name}: no such flag.{did_you_mean(f'--{name}', self._names().values())}")

    def _names(self) -> dict[str, str]:
        names = [*(["config"] if self.experiment else []), *(flag.name for flag in self.flags), "help"]
        return {name: f"--{name}" for name in names}

    def help(self) -> str:
        """Summary, description, flags with their defaults, and examples."""
        summary, _, rest = self.doc.strip().partition("\n")
        flags = list(self.flags)
        if self.experiment:
            flags.insert(0, Flag("config", _CONFIG_HELP, metavar="EXPERIMENT", required=True))
        width = max(len(flag.spelling) for flag in flags) + 4
        lines = [summary, *([rest.rstrip()] if rest.strip() else []), "", "Flags:"]
        for flag in flags:
            text = f"{flag.help}. {flag.note}"
            wrapped = textwrap.wrap(text, _WIDTH - width, break_long_words=False, break_on_hyphens=False)
            lines.append(f"  {flag.spelling:<{width - 2}}{wrapped[0]}")
            lines += [" " * width + line for line in wrapped[1:]]
        heading = "Example:" if len(self.examples) == 1 else "Examples:"
        return "\n".join([*lines, "", heading, *(f"  {example}" for example in self.examples)])


def _prepare() -> None:
    """What every command does first, however it was started."""
    startup.leave_tpus()
    for stream in (sys.stdin, sys.stdout, sys.stderr):  # characters that the terminal lacks are shown as \\xe9, \\u65e5
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def _check_output(args: SimpleNamespace) -> None:
    """Raises InputError where --output would be written over what the other flags name to be read."""
    if not getattr(args, "output", None):
        return
    read = [getattr(args, name, None) or () for name in _READ]
    inputs = [each for value in read for each in ((value,) if isinstance(value, str) else value)]
    files.check_apart(args.output, [*inputs, *([args.experiment.path] if hasattr(args, "experiment") else [])])


def _parse_value(flag: Flag, name: str, value: str | None) -> Any:
    if flag.switch:
        texts = {None: True, "true": True, "True": True, "1": True, "false": False, "False": False, "0": False}
        if value not in texts:
            raise InputError(f"--{name} = {value}: must be true or false.")
        return texts[value] != (name != flag.name)
    if value is None:
        raise InputError(f"--{name}: has no value. Write {flag.spelling}.")
    if not value and not flag.empty and (flag.many or not flag.required):
        raise InputError(f"--{name}: is empty. Write {flag.spelling}, or leave it out.")
    if not value.isprintable() and any("\ud800" <= letter <= "\udfff" for letter in value):
        raise InputError(f"--{name} = {value!r}: isn't text in the encoding of this terminal. Write it in UTF-8.")
    try:
        return flag.parse(value)
    except ValueError as error:
        raise InputError(f"--{name} = {value}: {error}") from error


def read_experiment(argv: Sequence[str]) -> Experiment:
    """Reads the experiment that flags describe.

    Args:
      argv: --config=EXPERIMENT and --config.FIELD=VALUE.

    Raises:
      InputError: the file, its variant or a field is at fault.
    """
    from absl import flags  # late, as ml_collections: half of the start of commands that take no experiment
    from ml_collections import config_flags

    argv = [_found_experiment(flag) for flag in argv]
    for flag in argv:
        check_field(flag)
    named = [flag for flag in argv if flag.partition("=")[0] == "--config"]
    if len(named) > 1:
        raise InputError(f"{' '.join(named)}: names {len(named)} experiments. Give one.")
    ordered = named + [flag for flag in argv if flag not in named]  # config_flags wants the experiment first
    values = flags.FlagValues()
    try:
        config_flags.DEFINE_config_file("config", None, _CONFIG_HELP, flag_values=values, sys_argv=["", *ordered])
        with quick_imports():
            rest = values(["understudy", *ordered])[1:]
            if not hasattr(values.config, "to_dict"):
                raise InputError(f"{named[0]}: get_config() gives no ConfigDict. Begin with experiments/base.py.")
            values.config.to_dict()  # raises what went wrong with its file
    except Exception as error:
        raise InputError(explain_flag_error(error, argv)) from error
    if rest:
        raise InputError(f"{rest[0]}: is no flag. Flags have the form --name=value.")
    holder = values["config"]
    path, _, variants = holder.config_filename.partition(":")
    finish = getattr(load_module(path), "finish", None)
    if finish is not None:
        _finish(finish, values.config, variants, holder.override_values)
    return Experiment(holder.config_filename, values.config, holder.override_values, tuple(argv))


def _finish(finish: Callable[..., None], config: Any, variants: str, overrides: Mapping[str, Any]) -> None:
    """Calls an experiment's `finish`. Raises InputError where an override left out a field that it reads."""
    try:
        finish(config, variants, overrides)
    except AttributeError as error:
        whole = [name for name, value in overrides.items() if hasattr(value, "items")]
        if not whole or not isinstance(error.args[0], KeyError):
            raise
        field = error.args[0].args[0]
        raise InputError(
            f"--config.{whole[0]}: takes the place of the whole section, and lacks the field {field}, which the "
            f"experiment reads. Set one field, --config.{whole[0]}.FIELD=VALUE, or write them all."
        ) from error


def load_module(path: str) -> ModuleType:
    """The module of an experiment's file, as it is now: cached bytecode is told from a file by whole seconds."""
    spec = importlib.util.spec_from_file_location("experiment", path)
    module = importlib.util.module_from_spec(spec)
    exec(compile(spec.loader.get_data(path), path, "exec"), module.__dict__)
    return module


def _found_experiment(flag: str) -> str:
    """--config=sft:debug with the path of experiments/sft.py, here or beside the package; other flags as they are."""
    name, _, value = flag.partition("=")
    file, colon, variant = value.partition(":")
    if name != "--config" or os.path.isfile(os.path.expanduser(file)):
        return f"{name}={os.path.expanduser(file)}{colon}{variant}" if file.startswith("~") else flag
    short = file.removesuffix(".py") + ".py"
    for place in (short, os.path.join("experiments", short), EXPERIMENTS / short, EXPERIMENTS.parent / short):
        if os.path.isfile(place):
            return f"{name}={place}{colon}{variant}"
    return flag


# Values.


def path(text: str) -> str:
    """A file or folder; ~ is the home folder, which shells leave as it is after `=`."""
    expanded = os.path.expanduser(text)
    if expanded.startswith("~"):
        name = expanded.partition(os.path.sep)[0]
        raise ValueError(f"there is no user {name[1:]!r}. Write ./{expanded} for a folder called {name}.")
    return expanded


def paths(text: str) -> tuple[str, ...]:
    """Files, folders or other entries, parted by commas."""
    return tuple(path(word) for word in words(text))


def number(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise ValueError("must be a finite number.")
    return value


def whole(least: int | None = None, most: int = 2**31 - 1) -> Callable[[str], int]:
    """A parser of whole numbers from `least` to `most`; of more than 4,300 digits Python reads none."""

    def parse(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            value = None
        if value is None or (least is not None and value < least):
            raise ValueError("must be a whole number" + ("." if least is None else f", at least {least}."))
        if abs(value) > most:
            raise ValueError(f"must be a whole number, at most {most}.")
        return value

    return parse


def above_zero(text: str) -> float:
    value = number(text)
    if not value > 0:
        raise ValueError("must be above 0.")
    return value


def share(text: str) -> float:
    value = number(text)
    if not 0 < value <= 1:
        raise ValueError("must be in (0, 1].")
    return value


def one_of(*options: str) -> Callable[[str], str]:
    """A parser of a choice."""

    def parse(text: str) -> str:
        if text not in options:
            raise ValueError(f"no such choice.{did_you_mean(text, options)}")
        return text

    return parse


def words(text: str) -> tuple[str, ...]:
    """Words that are parted by commas."""
    return tuple(word for word in text.split(",") if word)


def names_by_name(text: str) -> dict[str, str]:
    """A JSON object of texts."""
    try:
        parsed = json.loads(text)
    except ValueError:
        parsed = None
    if not isinstance(parsed, dict) or not all(isinstance(value, str) for value in parsed.values()):
        raise ValueError('must be a JSON object of texts, such as {"text": "headline"}.')
    return parsed


def value(name: str, text: str, parse: Callable[[str], Any]) -> Any:
    """Parses the value of a flag late, where its parser takes long to import.

    Raises:
      InputError: the value is at fault.
    """
    return _parse_value(Flag(name, "", parse=parse), name, text)


def step(text: str) -> int | str:
    """The number of a step, or "best"."""
    if text == "best":
        return text
    try:
        return whole(0)(text)
    except ValueError:
        raise ValueError("must be the number of a step, or 'best'.") from None


def mesh(text: str) -> dict[str, int]:
    """AXIS=SIZE,... -> axis -> size."""
    sizes = {}
    for part in text.split(","):
        axis, _, size = part.partition("=")
        if not size.removeprefix("-").isdecimal():
            raise ValueError(f"{part!r} is not of the form AXIS=SIZE. Write data=4,tensor=2.")
        if axis in sizes:
            raise ValueError(f"{axis} is there twice. Leave one out.")
        sizes[axis] = int(size)
    return sizes


# Flags that several commands have.

MODEL = Flag(
    "model",
    "a run's workdir, a Hugging Face folder or hub name, or a .gguf file",
    metavar="MODEL",
    parse=path,
    required=True,
)
STEP = Flag(
    "step",
    "of a run: which checkpoint, or 'best' by the run's checkpoint.best_metric",
    shown="the newest",
    metavar="N",
    parse=step,
)
EMA = Flag("ema", "of a run: take the moving average of the parameters", False)
ADAPTER = Flag(
    "adapter",
    "put this adapter to the model: a folder of PEFT, or a run's workdir. Of several, as NAME=DIR, each record names "
    'one in a field "adapter", or "base" for none',
    metavar="[NAME=]DIR",
    many=True,
)
TEMPLATE = Flag(
    "template",
    "how records are put to the model: auto, model, chat or plain",
    shown="as in training, or the model's own",
    metavar="NAME",
    parse=one_of("auto", "model", "chat", "plain"),
)
seed = whole(0, MOST_SEED)
SEED = Flag("seed", "of what is drawn by chance", 0, metavar="N", parse=seed)
MESH = Flag("mesh", "as in data=4,tensor=2", {"data": -1}, "all devices share the batch", "AXES", mesh)
BATCH_TOKENS = Flag(
    "batch_tokens",
    "tokens of a batch, padding included, on each device that shares in it",
    8192,
    metavar="N",
    parse=whole(1),
)


# How a command ends.


def finish(work: Callable[[], int | None], *, resumable: bool = False) -> int:
    """Does a command's work, and returns its exit status. An error is a line on stderr; a bug keeps its traceback.

    Args:
      work: what it returns is the status, None being 0.
      resumable: where it is interrupted, say that the same command goes on.
    """
    try:
        return work() or Exit.DONE
    except InputError as error:
        return fail(error, Exit.BAD_INPUT)
    except _DISK_ERRORS as error:
        return fail(f"{error.filename}: {error.strerror}.", Exit.FAILED)
    except KeyboardInterrupt:
        if resumable:
            print("interrupted: the same command goes on", file=sys.stderr)
        return Exit.INTERRUPTED


def fail(error: object, status: int) -> int:
    """Prints an error, on one line but for a traceback, and returns the status."""
    text = str(error)
    if "Traceback" not in text:
        text = " ".join(line.strip() for line in text.splitlines())
    print(f"error: {text}", file=sys.stderr)
    return status


# Commands by name.


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
        return fail(f"{name}: no such command.{did_you_mean(name, known)}", Exit.BAD_INPUT)
    with quick_imports():
        command = importlib.import_module(f"{_MODULES}.{name}")
    return command.main(argv[1:])


@contextlib.contextmanager
def quick_imports() -> Iterator[None]:
    """Leaves out the search for garbage, which is a quarter of imports' time: what they make stays."""
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()


def console() -> int:
    """The console script `understudy`, and `python -m research`.

    Both find modules of the user's own, such as an objective, in the folder that they are run in.
    """
    if os.getcwd() not in sys.path:  # Python puts it there for -m alone
        sys.path.insert(0, os.getcwd())
    if sys.argv[1:2] and sys.argv[1] in commands.STEPS and "--help" not in sys.argv:
        startup.leave_loops()
        startup.use_huge_pages()
    return main(sys.argv[1:])
