"""A command: how its flags are read, what its help says, and how its work is done."""

import dataclasses
import difflib
import io
import re
import sys
import textwrap
from collections.abc import Callable, Iterator, Mapping, Sequence
from types import SimpleNamespace
from typing import Any

from research import files, other_names, ownership
from research.cli import experiments
from research.cli.ending import finish
from research.cli.flags import Flag
from research.devices import startup
from research.errors import Exit, InputError, did_you_mean

_WIDTH = 100
# Fields of the config that are in no section: known here without jax, and before a flag that is spelt much the same.
TOP_FIELDS = ("seed", "steps", "epochs", "batch_size", "seq_len", "microbatches", "ema_decay", "max_bad_steps")
TOP_FIELDS += ("stall_seconds", "compilation_cache", "trainable", "frozen_dtype", "trained_dtype")
_READ = ("data", "model", "teacher", "reference", "target", "eval_data")  # flags that name what is read


@dataclasses.dataclass(frozen=True)
class Command:
    """A command: its flags, and what the help says of it.

    Attributes:
      name: NAME of `understudy NAME`.
      doc: what it does; its first line is the summary.
      flags: all of them, but --config of an experiment.
      examples: command lines, the first of them with all required flags.
      experiment: whether it takes an experiment with --config, which is `args.experiment` then.
      instead: a flag that may be given in the place of the experiment, which is None then; the name of a folder
        alone is its value.
      renamed: a name that a flag once had -> what it is called now.
      resumable: whether the same command, with --output, goes on where an interrupted one stopped.
      makes_folders: whether folders above --output are made.
    """

    name: str
    doc: str
    flags: tuple[Flag, ...]
    examples: tuple[str, ...]
    experiment: bool = False
    instead: str = ""
    renamed: Mapping[str, str] = dataclasses.field(default_factory=dict)
    resumable: bool = False
    makes_folders: bool = False

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
        output = next((word.partition("=")[2] for word in argv if word.startswith("--output=")), "")
        resumable = self.resumable and any(word.partition("=")[0] == "--output" for word in argv)
        return finish(lambda: self._work(argv, work), resumable=resumable, output=output)

    def _work(self, argv: Sequence[str], work: Callable[[SimpleNamespace], int | None]) -> int | None:
        """Does the work, with --output for this process alone."""
        args = self.parse(argv)
        if not getattr(args, "output", None):
            return work(args)
        with ownership.own_output(args.output, parents=self.makes_folders):
            return work(args)

    def parse(self, argv: Sequence[str]) -> SimpleNamespace:
        """Flags -> values by name; in `texts` the value of each as it is on the command line; in `experiment` that of
        --config.

        Raises:
          InputError: a flag isn't known, has no value, one that can't work or no effect, or a required one isn't given;
            or the output would take the place of an input.
        """
        known = {flag.name: flag for flag in self.flags}
        values = {flag.name: [] if flag.many else flag.default for flag in self.flags}
        config, texts = [], {}
        for name, text in self._pairs(argv):
            if self.experiment and re.fullmatch(r"(no)?config(\..*)?", name):
                config.append(f"--{name}" if text is None else f"--{name}={text}")
                continue
            flag = known.get(name) or known.get(name.removeprefix("no"))
            if flag is None or (flag.name != name and not flag.switch):
                raise self._unknown(name, text)
            value = flag.read(text, negated=name != flag.name)
            if not flag.many and not flag.switch and texts.get(flag.name, text) != text:
                raise InputError(f"--{name} = {text}: was {texts[name]} before, and can be one. Leave one out.")
            texts[flag.name] = text
            values[flag.name] = [*values[flag.name], value] if flag.many else value
        self._check_missing(values, config)
        self._check_effect(values, texts)
        args = SimpleNamespace(**values, texts=texts)
        if self.experiment:
            args.experiment = experiments.read_experiment(config) if config or not self.instead else None
        _check_output(args)
        return args

    def _check_missing(self, values: Mapping[str, Any], config: Sequence[str]) -> None:
        """Raises InputError where a required flag isn't given."""
        needed = (flag for flag in self.flags if flag.required and not any(values[other] for other in flag.unless))
        missing = [flag.name for flag in needed if not values[flag.name]]
        named = any(flag.startswith("--config=") and flag != "--config=" for flag in config)
        if self.instead and values[self.instead] and config:
            raise InputError(f"--{self.instead} = {values[self.instead]}, {config[0]}: are two subjects. Give one.")
        if self.experiment and not named and not (self.instead and values[self.instead]):
            missing.insert(0, f"{self.instead} or --config" if self.instead else "config")
        if missing:
            names = ", ".join(f"--{name}" for name in missing)
            raise InputError(f"{names}: {'is' if len(missing) == 1 else 'are'} missing. Example: {self.examples[0]}")

    def _check_effect(self, values: Mapping[str, Any], texts: Mapping[str, str]) -> None:
        """Raises InputError where a flag is of others, which aren't given."""
        for flag in self.flags:
            if flag.name in texts and flag.of and not any(values[other] for other in flag.of):
                others = " and ".join(f"--{other}" for other in flag.of)
                verb = "is" if len(flag.of) == 1 else "are"
                shown = f"--{flag.name}" if flag.switch else f"--{flag.name} = {texts[flag.name]}"
                raise InputError(f"{shown}: is of {others}, which {verb}n't given. Leave it out.")

    def _pairs(self, argv: Sequence[str]) -> Iterator[tuple[str, str | None]]:
        """(name, value) of each flag; the value is None where the flag is a switch, or none is given."""
        left = list(argv)
        switches = {flag.name for flag in self.flags if flag.switch}
        while left:
            word = left.pop(0)
            name, equals, value = word.removeprefix("--").partition("=")
            if self.instead and _is_folder(word):
                yield self.instead, word
                continue
            if not word.startswith("--") or not name:
                raise self._no_flag(word, argv)
            takes = name not in switches and name.removeprefix("no") not in switches
            if not equals and takes and left and not left[0].startswith("--"):
                equals, value = "=", left.pop(0)
            yield name, value if equals else None

    def _no_flag(self, word: str, argv: Sequence[str]) -> InputError:
        """The error for what isn't of the form --name=value."""
        names = self._names()
        name = word.lstrip("-").partition("=")[0]
        if name in names or (self.experiment and name.startswith("config.")):
            return InputError(f"{word}: flags begin with two dashes. Write --{word.lstrip('-')}.")
        if word.startswith("-") or "=" in word:
            return InputError(f"{word}: isn't of the form --name=value.{did_you_mean(f'--{name}', names.values())}")
        given = {other.lstrip("-").partition("=")[0] for other in argv}
        wanted = [*(["config"] if self.experiment else []), *(flag.name for flag in self.flags if flag.required)]
        first = next((name for name in wanted if name not in given), "")
        remedy = f": write --{first}={word}" if first else "; --help lists them"
        return InputError(f"{word}: is no flag. Flags have the form --name=value{remedy}.")

    def _unknown(self, name: str, value: str | None) -> InputError:
        if name in self.renamed:
            now = self.renamed[name]
            return InputError(f"--{name}: is called --{now} now. Write --{now}{'' if value is None else f'={value}'}.")
        first, _, rest = name.partition(".")
        if self.experiment and rest and difflib.get_close_matches(first, ["config"]):
            return InputError(f"--{name}: no such flag. Did you mean '--config.{rest}'?")
        of_config = name in TOP_FIELDS or name in other_names.NAMES
        if self.experiment and (of_config or not difflib.get_close_matches(name, self._names())):
            hint = other_names.answer(name) or _field_hint(name) or " docs/configs.md lists them."
            return InputError(f"--{name}: no such flag. Fields of the config are set by --config.FIELD=VALUE.{hint}")
        return InputError(f"--{name}: no such flag.{did_you_mean(f'--{name}', self._names().values())}")

    def _names(self) -> dict[str, str]:
        names = [*(["config"] if self.experiment else []), *(flag.name for flag in self.flags), "help"]
        return {name: f"--{name}" for name in names}

    def help(self) -> str:
        """Summary, description, flags with their defaults, and examples."""
        summary, _, rest = self.doc.strip().partition("\n")
        flags = list(self.flags)
        if self.experiment:
            unless = (self.instead,) if self.instead else ()
            flags.insert(0, Flag("config", experiments.HELP, metavar="EXPERIMENT", required=True, unless=unless))
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


def _field_hint(name: str) -> str:
    """What a flag that there isn't may have meant as a field of the config."""
    if name in TOP_FIELDS:
        return f" Did you mean {name!r}?"
    from research.cli import fields  # late, and for names alone that nothing else explains: it imports jax

    return fields.hint(name)


def _is_folder(word: str) -> bool:
    """Whether a word may be the name of a folder: it is no flag, not even one without its dashes, and no experiment."""
    return bool(word) and not word.startswith("-") and "=" not in word and not word.partition(":")[0].endswith(".py")


def _check_output(args: SimpleNamespace) -> None:
    """Raises InputError where --output would be written over what the other flags name to be read."""
    if not getattr(args, "output", None):
        return
    read = [getattr(args, name, None) for name in _READ]  # in some commands a switch has such a name
    inputs = [each for value in read if value not in (None, True, False) for each in _several(value)]
    files.check_apart(args.output, [*inputs, *([args.experiment.path] if getattr(args, "experiment", None) else [])])


def _several(value: str | Sequence[str]) -> Sequence[str]:
    return (value,) if isinstance(value, str) else value
