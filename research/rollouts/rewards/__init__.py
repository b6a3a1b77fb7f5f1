"""Rewards by name: each module here that has a `make` function is one, and any that Python can import by that name,
such as mine.py in the folder that a command is run in; or a function in a file, "FILE.py:NAME". Nothing is registered.

Rewards run in worker processes (workers.py), which import this package: it needs nothing but the standard library.
"""

import dataclasses
import functools
import importlib.util
import inspect
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from types import ModuleType
from typing import Annotated, Any

from research import options as option_types
from research import ranges
from research.errors import InputError, did_you_mean, own_code
from research.ranges import Positive, Range, Real
from research.rollouts.rewards.types import LARGEST, Reward, Sample

__all__ = ["Entry", "Reward", "Sample", "load"]

_PARTS = ("judging", "texts", "types", "workers")  # modules of this package that are no rewards
_MODEL = "reward_model"  # the one that the run's devices compute
_FIELDS = ("reward", "weight", "seconds", "workers")  # of an entry, beside its reward's options


@dataclasses.dataclass(frozen=True)
class Entry:
    """A reward as the config spells it.

    Attributes:
      name: in the config, and of its metrics.
      reward: the module, or "FILE.py:NAME".
      weight: what it is multiplied by in the sum; 0 only reports it.
      seconds: how long it may take for one answer; one that takes longer is not judged.
      workers: how many processes judge at the same time.
      options: of the module's `make`, or of the function in the file beside the sample.
    """

    name: str
    reward: str
    weight: Real = 1.0
    seconds: Positive = 10.0
    workers: Annotated[int, Range(1, 64)] = 1
    options: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        for field in ("reward", "weight", "seconds", "workers"):
            option_types.convert(ranges.hints(Entry)[field], getattr(self, field), self.field(field))

    def field(self, name: str) -> str:
        """The config's field for one of the entry's."""
        return f"rewards.{self.name}.{name}"

    @property
    def path(self) -> str:
        """The user's file, where the reward is a function in one; else ""."""
        file, colon, _ = self.reward.rpartition(":")
        return file if colon else ""

    @property
    def by_model(self) -> bool:
        """Whether a model of the run gives the reward, in the place of a worker."""
        return self.reward == _MODEL

    @property
    def file(self) -> str:
        """The file with the reward's code."""
        return self.path or str(self._find()[0].__file__)

    def check(self) -> None:
        """Raises InputError where there is no such reward, or its options can't be used. Code of a file with a function
        isn't run, but read: only the workers run it."""
        for name in ("seconds", "workers") if self.by_model else ():
            if getattr(self, name) != getattr(Entry, name):
                raise InputError(f"{self.field(name)}: is of worker processes, and a model has none. Leave it out.")
        if self.path:
            _read(self.path, self.field("reward"))
        else:
            self.make()

    def make(self) -> Reward:
        """The reward, to be called where it may take long.

        Raises:
          InputError: see `check`; or a fault in a file of the user's.
        """
        return self._function() if self.path else self._module()

    def _find(self) -> tuple[ModuleType, Mapping[str, inspect.Parameter]]:
        """The module, and the parameters of its `make`."""
        field = self.field("reward") if self.reward != self.name else f"rewards.{self.name}"
        module = option_types.module(sys.modules[__name__], self.reward, field, _PARTS)
        if not hasattr(module, "make"):
            raise InputError(f"{field}: {module.__file__} has no function make(**options) -> Reward.")
        return module, inspect.signature(module.make).parameters

    def _module(self) -> Reward:
        module, parameters = self._find()
        self._check_options(module.make, parameters, str(module.__file__))
        with option_types.naming_fields({name: self.field(name) for name in parameters}):
            return module.make(**self.options)

    def _function(self) -> Reward:
        module, name = _import(self.path, self.field("reward")), self.reward.rpartition(":")[2]
        function = getattr(module, name, None)
        if not callable(function):
            known = [n for n, value in vars(module).items() if callable(value) and not n.startswith("_")]
            near = did_you_mean(name, known)
            raise InputError(f"{self.field('reward')}: {self.path} has no function {name!r}.{near}")
        parameters = dict(inspect.signature(function).parameters)
        if not parameters:
            raise InputError(f"{self.field('reward')}: {name} in {self.path} takes nothing. Write {name}(sample).")
        parameters.pop(next(iter(parameters)))
        self._check_options(function, parameters, self.path)
        return functools.partial(function, **self.options)

    def _check_options(self, make: Callable[..., Any], parameters: Mapping[str, inspect.Parameter], file: str) -> None:
        named = [name for name, p in parameters.items() if p.kind not in (p.VAR_KEYWORD, p.VAR_POSITIONAL)]
        for reserved in _FIELDS:
            if reserved in named:
                raise InputError(
                    f"rewards.{self.name}: {file} has an option {reserved!r}, which is a field of every reward "
                    f"({', '.join(_FIELDS)}). Give the option another name."
                )
        if not any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
            for option in self.options:
                if option not in named:
                    known = did_you_mean(option, [*named, *_FIELDS])
                    raise InputError(f"{self.field(option)}: no such option.{known}")
        for name in named:
            if parameters[name].default is inspect.Parameter.empty and name not in self.options:
                raise InputError(f"{self.field(name)}: is missing. The reward {self.reward!r} needs it.")
        option_types.check(make, self.options, {option: self.field(option) for option in self.options})


def load(spec: Mapping[str, Any]) -> dict[str, Entry]:
    """The rewards that a config names, checked.

    Args:
      spec: {name: reward}. A reward is its weight, a number, or a mapping of
          reward: the module here or beside the run, by default the name; or "FILE.py:FUNCTION";
          weight: a number, by default 1;
          seconds: how long it may take for one answer, by default 10;
          workers: how many processes judge, by default 1;
          and the options of the module's `make`, or of the function.

    Raises:
      InputError: an unknown reward or option, or a value that can't be used.
    """
    entries = {}
    for name, value in spec.items():
        if not name or "/" in name:
            raise InputError(
                f"rewards: has the name {name!r}, which metrics are named by. Give it one without '/', and the module "
                "as the field `reward`."
            )
        if isinstance(value, Mapping):
            fields = {field: value[field] for field in _FIELDS if field in value}
            options = {option: x for option, x in value.items() if option not in _FIELDS}
            entry = Entry(name, **{"reward": name, **fields}, options=options)
        elif not _is_finite(value):
            raise InputError(
                f"rewards.{name} = {value!r:.80}: must be a weight, or a mapping such as {{'reward': 'exact_match', "
                "'weight': 1.0}."
            )
        else:
            entry = Entry(name, name, weight=value)
        entry.check()
        entries[name] = entry
    return entries


def _is_finite(value: Any) -> bool:
    """Whether a value is a number, and one that float32 has."""
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < LARGEST


def _read(path: str, field: str) -> str:
    """The text of a user's file. Raises InputError where there is none, or it is no Python."""
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(
            f"{field}: {path}: can't be read ({error}). Name a file of Python, mine.py:NAME, by its path from the "
            "folder that the run is started from."
        ) from error
    with own_code(path):
        compile(text, path, "exec")
    return text


def _import(path: str, field: str) -> ModuleType:
    """The module of a user's file, which is run; its folder is searched for what it imports."""
    _read(path, field)
    spec = importlib.util.spec_from_file_location(Path(path).stem, path)
    if spec is None or spec.loader is None:
        raise InputError(f"{field}: {path}: isn't a file of Python. Name one that ends in .py.")
    module = importlib.util.module_from_spec(spec)
    sys.path.insert(0, str(Path(path).resolve().parent))
    with own_code(path):
        spec.loader.exec_module(module)
    return module
