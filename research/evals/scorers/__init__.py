"""Scorers by name: each module here that has a `make` function is one, and any that Python can import by that name,
such as mine.py in the folder that a command is run in. Nothing is registered.

`make(inputs, **options) -> Scorer`: a parameter `inputs` is given what the command was told (inputs.Inputs), and may be
left out; all others are options.
"""

import inspect
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from research import options as option_types
from research.errors import InputError, did_you_mean
from research.evals.scorers.inputs import Inputs
from research.evals.scorers.types import Chunk, Scorer
from research.sources import scores

__all__ = ["Chunk", "Inputs", "Scorer", "load"]

_PARTS = ("inputs", "read_before", "types")  # modules of this package that are no scorers
_FLAG = "--options"


def load(names: Sequence[str], options: Mapping[str, Any], inputs: Inputs) -> dict[str, Scorer]:
    """The scorers of these names.

    Args:
      names: of modules.
      options: scorer -> its options.
      inputs: of the command.

    Raises:
      InputError: there is no such scorer or option, a value can't be used, or two scorers give scores of one name.
    """
    for name in options:
        if name not in names:
            raise InputError(f"{_FLAG}: is of a scorer {name!r}, which --with doesn't name.{did_you_mean(name, names)}")
    for name in names:
        if names.count(name) > 1:
            raise InputError(f"--with = {','.join(names)}: {name} is there twice. Leave one out.")
    calls = [(name, *_checked(name, options.get(name, {}))) for name in names]  # all before any model is loaded
    scorers: dict[str, Scorer] = {}
    for name, make, values in calls:
        given = {"inputs": inputs} if "inputs" in inspect.signature(make).parameters else {}
        with option_types.naming_fields({option: f"{_FLAG}: {name}.{option}" for option in values}):
            scorers[name] = make(**given, **values)
        if taken := set(scorers[name].columns) & set(scores.ROW):
            raise InputError(f"--with = {name}: its column {min(taken)!r} is in every row already. Rename it.")
        for other, scorer in scorers.items():
            if other != name and (same := set(scorer.columns) & set(scorers[name].columns)):
                raise InputError(f"--with: {other} and {name} both give {min(same)!r}. Leave one out.")
    return scorers


def _checked(name: str, values: Any) -> tuple[Any, Mapping[str, Any]]:
    """A scorer's `make`, and its options, which are of the right names and types."""
    field = f"{_FLAG}: {name}"
    if not isinstance(values, Mapping):
        raise InputError(
            f'{field} = {values!r:.80}: must be an object of options, such as {{"ifd": {{"form": "loss"}}}}.'
        )
    module = option_types.module(sys.modules[__name__], name, "--with", _PARTS)
    if not hasattr(module, "make"):
        raise InputError(f"--with = {name}: {module.__file__} has no function make(**options) -> Scorer.")
    parameters = {key: p for key, p in inspect.signature(module.make).parameters.items() if key != "inputs"}
    for option in values:
        if option not in parameters:
            raise InputError(f"{field}.{option}: no such option.{did_you_mean(option, parameters)}")
    for option, parameter in parameters.items():
        if parameter.default is inspect.Parameter.empty and option not in values:
            raise InputError(
                f'{field}.{option}: is missing. The scorer needs it: {_FLAG}=\'{{"{name}": {{"{option}": ...}}}}\'.'
            )
    option_types.check(module.make, values, {option: f"{field}.{option}" for option in values})
    return module.make, values
