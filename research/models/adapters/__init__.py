"""Adapters by name: each module here that has a `make` function is a kind, and any that Python can import by its name,
such as mine.py in the folder that a command is run in. Nothing is registered.

A kind says which parameters lie beside those of a model, which of all are trained, and how they begin; kernels.py reads
them in a forward pass. Everything else about them (shardings, gradients, checkpoints) follows from their ParamSpecs.
"""

import contextlib
import dataclasses
import inspect
import re
import sys
from collections.abc import Iterator, Mapping
from types import ModuleType
from typing import Any

from research import options as option_types
from research import other_names
from research.errors import InputError, did_you_mean
from research.models.adapters.types import Adapter

__all__ = ["Adapter", "load", "naming_fields"]

_PARTS = ("starts", "targets", "types")  # modules of this package that are no kinds


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
    for option in options:
        if option not in allowed:
            hint = other_names.answer(option) or did_you_mean(option, [*allowed, "kind", "init_from"])
            raise InputError(f"{field}.{option}: no such option.{hint}")
    option_types.check(module.make, options, {option: f"{field}.{option}" for option in options})
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


def _find(kind: Any, field: str) -> ModuleType:
    """The module of a kind. Raises InputError where there is none."""
    if not isinstance(kind, str):
        raise InputError(f'{field}.kind = {kind!r}: names no kind. For example {{"kind": "lora", "rank": 16}}.')
    module = option_types.module(sys.modules[__name__], kind, f"{field}.kind = {kind!r}", _PARTS)
    if not hasattr(module, "make"):
        raise InputError(f"{field}.kind = {kind!r}: {module.__file__} has no function make(**options) -> Adapter.")
    return module
