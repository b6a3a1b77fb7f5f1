"""The experiment that --config names, with what --config.FIELD=VALUE overrides."""

import importlib.util
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

from research.devices import startup
from research.errors import InputError, check_field, explain_flag_error, own_code

EXPERIMENTS = Path(__file__).parents[2] / "experiments"
HELP = "an experiment, NAME or experiments/NAME.py[:VARIANT,...]; --config.FIELD=VALUE overrides a field of its config"


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


def read_experiment(argv: Sequence[str]) -> Experiment:
    """Reads the experiment that flags describe.

    Args:
      argv: --config=EXPERIMENT and --config.FIELD=VALUE.

    Raises:
      InputError: the file, its variant or a field is at fault.
    """
    from absl import flags  # late, as ml_collections: half of the start of commands that take no experiment
    from ml_collections import config_flags

    from research.cli import fields

    argv = [_with_path(flag) for flag in argv]
    for flag in argv:
        check_field(flag)
    named = [flag for flag in argv if flag.partition("=")[0] == "--config"]
    if len(named) > 1:
        raise InputError(f"{' '.join(named)}: names {len(named)} experiments. Give one.")
    path, _, variants = named[0].removeprefix("--config=").partition(":")
    values, module = flags.FlagValues(), None
    try:
        module = _experiment_module(path)
        finish = getattr(module, "finish", None)
        new = _new_fields(module, path, variants, argv)
        ordered = named + [flag for flag in argv if flag not in named + new]  # config_flags wants the experiment first
        config_flags.DEFINE_config_file("config", None, HELP, flag_values=values, sys_argv=["", *ordered])
        with startup.quick_imports():
            rest = values(["understudy", *ordered])[1:]
            if not hasattr(values.config, "to_dict"):
                raise InputError(f"{named[0]}: get_config() gives no ConfigDict. Begin with experiments/base.py.")
            values.config.to_dict()  # raises what went wrong with its file
            added = dict(_field(flag) for flag in new)
            added = {name: fields.add(values.config, name, text) for name, text in added.items()}
    except Exception as error:

        def hint(field: str) -> str:
            return fields.hint(field, _own_config(module, variants))

        raise InputError(explain_flag_error(error, argv, hint, EXPERIMENTS)) from error
    if rest:
        raise InputError(f"{rest[0]}: is no flag. Flags have the form --name=value.")
    holder = values["config"]
    overrides = {**holder.override_values, **added}
    if finish is not None:
        with own_code(path):
            _finish(finish, values.config, variants, overrides)
    return Experiment(holder.config_filename, values.config, overrides, tuple(argv))


def _field(flag: str) -> tuple[str, str]:
    """The dotted name and the text of --config.FIELD=VALUE."""
    name, _, text = flag.partition("=")
    return name.removeprefix("--config."), text


def _new_fields(module: ModuleType, path: str, variants: str, argv: Sequence[str]) -> list[str]:
    """The flags that set what the experiment's config doesn't have and may: terms, roles and other names that are free.

    The config is made once more for that, where a flag lies in such a mapping at all.
    """
    from research.cli import fields

    free = [flag for flag in argv if "=" in flag and fields.mapping_of(_field(flag)[0]) is not None]
    if not free:
        return []
    with own_code(path):
        config = module.get_config(variants) if variants else module.get_config()
    return [flag for flag in free if fields.is_new(config, _field(flag)[0])]


def _own_config(module: ModuleType | None, variants: str) -> Any:
    """The config that an experiment makes, for the names of its fields; None where its file can't make one."""
    try:
        return module.get_config(variants) if variants else module.get_config()
    except Exception:
        return None


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


def _experiment_module(path: str) -> ModuleType:
    module = load_module(path)
    if not hasattr(module, "get_config"):
        raise InputError(f"--config={path}: it defines no get_config(), so it isn't an experiment.")
    return module


def load_module(path: str) -> ModuleType:
    """The module of an experiment's file, as it is now: cached bytecode is told from a file by whole seconds.

    Raises:
      InputError: the file can't be read, or isn't a program that Python can run.
    """
    with own_code(path):
        spec = importlib.util.spec_from_file_location("experiment", path)
        if spec is None:
            raise InputError(f"--config={path}: is no Python file. Name one that ends in .py.")
        module = importlib.util.module_from_spec(spec)
        exec(compile(spec.loader.get_data(path), path, "exec"), module.__dict__)
    return module


def _with_path(flag: str) -> str:
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
