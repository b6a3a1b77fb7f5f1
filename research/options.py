"""Values of a config as the types that they are to have, and the modules that it names: objectives, views, adapters."""

import contextlib
import dataclasses
import importlib
import importlib.util
import math
import os
import pkgutil
import re
import types
import typing
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Annotated, Any

from research import other_names, ranges
from research.errors import MOST_SEED, InputError, did_you_mean, own_code

_PATHS = {
    "init_from",
    "annotations",
    "select",
    "cache_dir",
}  # fields that name a file or folder; data.path is read by sources/


def build(cls: type, values: Mapping[str, Any], path: str) -> Any:
    """A dataclass from a mapping; nested dataclasses from nested mappings; lists (of JSON) become tuples."""
    prefix = f"{path}." if path else ""
    if not isinstance(values, Mapping):
        raise InputError(f"{path} = {values!r}: is a section with the fields {', '.join(names(cls))}.")
    hints = typing.get_type_hints(cls, include_extras=True)
    fields = {}
    for name, value in values.items():
        if name not in hints:
            known = other_names.answer(name) or did_you_mean(name, names(cls))
            raise InputError(f"{prefix}{name}: no such field.{known}")
        fields[name] = convert(hints[name], value, f"{prefix}{name}")
    return cls(**_at_home(fields))


def convert(hint: Any, value: Any, field: str) -> Any:
    """A value of a config as the type that its field is to have.

    Raises:
      InputError: it is of another type, or a number that isn't finite, or out of its range.
    """
    if typing.get_origin(hint) is Annotated:
        converted = convert(hint.__origin__, value, field)
        if (allowed := ranges.range_of(hint)) is not None:
            allowed.check(value, field)
        return converted
    if dataclasses.is_dataclass(hint):
        return value if isinstance(value, hint) else build(hint, value, field)
    kind, args = typing.get_origin(hint) or hint, typing.get_args(hint) or (Any, Any)  # a bare Mapping is of anything
    if kind is Any:
        return value
    if kind is Mapping and isinstance(value, Mapping):
        for name in value:
            if not isinstance(name, str):
                raise InputError(f"{field}: has the name {name!r}, and names are texts. Write it in quotes.")
        return {name: convert(args[1], section, f"{field}.{name}") for name, section in value.items()}
    if kind in (types.UnionType, typing.Union):
        fitting = [option for option in args if _fits(option, value)]
        if not fitting:
            kinds = " or ".join("None" if option is type(None) else _name(_kind(option)) for option in args)
            raise InputError(f"{field} = {value!r:.200}: must be of type {kinds}, and is {type(value).__name__}.")
        return convert(fitting[0], value, field)
    if kind is tuple:
        value = tuple(value) if isinstance(value, list | tuple) else (value,)
        return tuple(convert(args[0], v, field) for v in value)
    if kind is Sequence and _fits(kind, value):
        return tuple(convert(args[0], v, field) for v in value)
    if isinstance(kind, type) and not _fits(kind, value):
        raise InputError(f"{field} = {value!r:.200}: must be of type {_name(kind)}, and is {type(value).__name__}.")
    if kind is float:
        return _float(value, field)
    if kind is int and not -(2**31) <= value <= MOST_SEED:
        shown = "a number of very many digits" if value.bit_length() > 200 else value
        raise InputError(f"{field} = {shown}: is out of the range of 32 bits.")
    return value


def _float(value: float, field: str) -> float:
    """A number of a config as float32 could have it. Raises InputError where it couldn't."""
    if isinstance(value, float) and not math.isfinite(value):
        raise InputError(f"{field} = {value}: must be a finite number.")
    if value and not ranges.LEAST_FLOAT <= abs(value) <= ranges.MOST_FLOAT:
        shown = value if isinstance(value, float) else "a number of very many digits"
        raise InputError(f"{field} = {shown}: is out of the range of 32-bit floating-point numbers.")
    return float(value)


def check(make: Callable[..., Any], values: Mapping[str, Any], fields: Mapping[str, str]) -> None:
    """Checks that options are of the types that a function `make` gives to its parameters, and in their ranges.

    Args:
      make: of an objective, a view or an adapter; where its author has written no types that can be read, any will do.
      values: of the options that the config sets.
      fields: option -> the config's field for it.

    Raises:
      InputError: one is of another type, or out of its range.
    """
    try:
        hints = typing.get_type_hints(make, include_extras=True)
    except (NameError, TypeError):
        hints = {}
    for option, value in values.items():
        convert(hints.get(option, Any), value, fields[option])


@contextlib.contextmanager
def naming_fields(fields: Mapping[str, str]) -> Iterator[None]:
    """An InputError raised within that begins with an option's name begins with the config's field for it instead."""
    try:
        yield
    except InputError as error:
        first = re.match(r"\w+(?=[ =:,])", str(error))
        if first is None or first[0] not in fields:
            raise
        raise InputError(fields[first[0]] + str(error)[first.end() :]) from error


def module(package: types.ModuleType, kind: str, field: str, parts: Sequence[str] = ()) -> types.ModuleType:
    """The module of a kind: one of a package of ours, or of the user's own, beside the run.

    Args:
      package: of ours.
      kind: the module's name.
      field: what names it in the config, for errors.
      parts: modules of the package that are no kinds.

    Raises:
      InputError: there is none, and the message names the nearest; or Python can't run it.
    """
    kinds = [each.name for each in pkgutil.iter_modules(package.__path__) if each.name not in parts]
    if kind in kinds:
        return importlib.import_module(f"{package.__name__}.{kind}")
    spec = importlib.util.find_spec(kind) if isinstance(kind, str) and kind.isidentifier() else None
    if spec is not None:
        with own_code(spec.origin or kind):
            return importlib.import_module(kind)
    raise InputError(
        f"{field}: no module {package.__name__.replace('.', '/')}/{kind}.py, and no {kind}.py in the folder that this "
        f"is run in.{did_you_mean(str(kind), kinds)}"
    )


def names(cls: type) -> list[str]:
    """Of the fields of a dataclass."""
    return [f.name for f in dataclasses.fields(cls)]


def _at_home(values: Mapping[str, Any]) -> dict[str, Any]:
    """A section, with the home folder in the place of ~ where a field names a file."""
    return {k: os.path.expanduser(v) if k in _PATHS and isinstance(v, str) else v for k, v in values.items()}


def _kind(hint: Any) -> Any:
    hint = hint.__origin__ if typing.get_origin(hint) is Annotated else hint
    return typing.get_origin(hint) or hint


def _name(kind: type) -> str:
    """What a type is called where values are written."""
    return {Sequence: "list", Mapping: "mapping"}.get(kind, kind.__name__)


def _fits(hint: Any, value: Any) -> bool:
    """Whether a value is of a type; a bool is an int to Python, and not here, and an int is a float."""
    kind = _kind(hint)
    if isinstance(value, bool) and kind is not bool:
        return kind is Any
    if kind is Any or not isinstance(kind, type):
        return True
    if kind is Sequence and isinstance(value, str):  # a text is a sequence to Python, and not here
        return False
    return isinstance(value, (int, float) if kind is float else kind)
