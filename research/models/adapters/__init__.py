"""Adapters by name: each module here that has a `make` function is a kind, and any that Python can import by its name,
such as mine.py in the folder that a command is run in. Nothing is registered.

A kind says which parameters lie beside those of a model, which of all are trained, and how they begin; kernels.py reads
them in a forward pass. Everything else about them (shardings, gradients, checkpoints) follows from their ParamSpecs.
"""

import contextlib
import dataclasses
import importlib
import importlib.util
import inspect
import pkgutil
import re
import typing
from collections.abc import Iterator, Mapping
from types import ModuleType, UnionType
from typing import Any

from research.errors import InputError, did_you_mean
from research.models.adapters.types import Adapter

__all__ = ["Adapter", "load", "naming_fields"]

_PARTS = ("targets", "types")  # modules of this package that are no kinds


def load(spec: Mapping[str, Any], field: str = "adapter", tokenizer: Any = None) -> Adapter | None:
    """The adapter that a config names; None for {}.

    Args:
      spec: {"kind": NAME, option: value, ...}: research/models/adapters/NAME.py, and the options of its `make`;
        init_from, which says where its parameters are read from, is no matter here.
      field: where the config says it, for errors.
      tokenizer: of the run, for those whose `make` has a parameter `tokenizer`. None where it isn't known yet, and
        options are only to be checked, or shapes to be known.

    Raises:
      InputError: there is no such kind or option, or a value can't be used.
    """
    if not spec:
        return None
    module = _find(spec.get("kind"), field)
    options = {option: value for option, value in spec.items() if option not in ("kind", "init_from")}
    parameters = inspect.signature(module.make).parameters
    allowed = {name: parameter for name, parameter in parameters.items() if name != "tokenizer"}
    hints = typing.get_type_hints(module.make)
    for option, value in options.items():
        if option not in allowed:
            raise InputError(
                f"{field}.{option}: no such option.{did_you_mean(option, [*allowed, 'kind', 'init_from'])}"
            )
        _check_type(f"{field}.{option}", value, hints.get(option, Any))
    for option, parameter in allowed.items():
        if parameter.default is parameter.empty and option not in options:
            raise InputError(f"{field}.{option}: is missing. The adapter {spec['kind']!r} needs it.")
    with naming_fields(field):
        adapter = module.make(**options, **({"tokenizer": tokenizer} if "tokenizer" in parameters else {}))
    return dataclasses.replace(adapter, kind=spec["kind"])


def defaults(kind: str, field: str = "adapter") -> dict[str, Any]:
    """The defaults of a kind's options.

    Raises:
      InputError: there is no such kind.
    """
    options = inspect.signature(_find(kind, field).make).parameters
    named = {name: option.default for name, option in options.items() if name != "tokenizer"}
    return {name: default for name, default in named.items() if default is not inspect.Parameter.empty}


@contextlib.contextmanager
def naming_fields(field: str = "adapter") -> Iterator[None]:
    """An InputError that begins with an option, such as "rank = 0", begins with the field of the config instead."""
    try:
        yield
    except InputError as error:
        option = re.match(r"\w+( = |\[)", str(error))
        raise InputError(f"{field}{'.' if option else ': '}{error}") from error


def _check_type(field: str, value: Any, hint: Any) -> None:
    """Raises InputError where an option is of another type; a whole number is a fraction too."""
    hints = typing.get_args(hint) if isinstance(hint, UnionType) else (hint,)
    kinds = [typing.get_origin(kind) or kind for kind in hints]
    for kind in kinds:
        if kind is Any or (isinstance(value, kind) and (kind is bool or not isinstance(value, bool))):
            return
        if kind is float and isinstance(value, int) and not isinstance(value, bool):
            return
    names = " or ".join(kind.__name__ for kind in kinds)
    raise InputError(f"{field} = {value!r}: must be of type {names}, and is {type(value).__name__}.")


def _find(kind: Any, field: str) -> ModuleType:
    """The module of a kind. Raises InputError where there is none."""
    kinds = [module.name for module in pkgutil.iter_modules(__path__) if module.name not in _PARTS]
    if not isinstance(kind, str):
        raise InputError(f'{field}.kind = {kind!r}: names no kind. For example {{"kind": "lora", "rank": 16}}.')
    if kind in kinds:
        module = importlib.import_module(f"{__name__}.{kind}")
    elif kind.isidentifier() and importlib.util.find_spec(kind) is not None:  # of the user's own, beside the run
        module = importlib.import_module(kind)
    else:
        raise InputError(
            f"{field}.kind = {kind!r}: no module research/models/adapters/{kind}.py, and no {kind}.py in the folder "
            f"that this is run in.{did_you_mean(kind, kinds)}"
        )
    if not hasattr(module, "make"):
        raise InputError(f"{field}.kind = {kind!r}: {module.__file__} has no function make(**options) -> Adapter.")
    return module
