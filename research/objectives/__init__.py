"""Objectives by name: each module here that has a `make` function is one, and any that Python can import by that name,
such as mine.py in the folder that a command is given in. Nothing is registered."""

import importlib
import importlib.util
import inspect
import pkgutil
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax

from research.errors import InputError, did_you_mean
from research.objectives.types import Objective
from research.sources.tokenizers import Tokenizer

Coefficient = Callable[[jax.Array], jax.Array]  # step -> weight of a term


def load(spec: Mapping[str, Any], tokenizer: Tokenizer | None = None) -> dict[str, tuple[Objective, Coefficient]]:
    """The terms of a composed objective: name -> (objective, its weight as a function of the step).

    Args:
      spec: {"terms": {"sft": 1.0, ...}, "sft": {options of its `make`}, ...}. A weight is a number, or a linear
        schedule {"start": 0.0, "end": 1.0, "steps": 1000}.
      tokenizer: of the run, for those whose `make` has a parameter `tokenizer`. None where it isn't known yet, and
        options are only to be checked.

    Raises:
      InputError: an unknown objective or option, or no term at all.
    """
    terms = spec.get("terms", {})
    if not terms:
        raise InputError("objective.terms: names no objective. For example: objective.terms = {'next_token': 1.0}.")
    for name in spec:
        if name != "terms" and name not in terms:
            raise InputError(f"objective.{name}: options for a term that isn't used.{did_you_mean(name, terms)}")
    return {n: (_objective(n, spec.get(n, {}), tokenizer), _coefficient(n, weight)) for n, weight in terms.items()}


def _objective(name: str, options: Mapping[str, Any], tokenizer: Tokenizer | None) -> Objective:
    known = [m.name for m in pkgutil.iter_modules(__path__) if m.name != "types"]
    if name in known:
        module = importlib.import_module(f"{__name__}.{name}")
    elif name.isidentifier() and importlib.util.find_spec(name) is not None:  # of the user's own, beside the run
        module = importlib.import_module(name)
    else:
        raise InputError(
            f"objective.terms.{name}: no module research/objectives/{name}.py, and no {name}.py where Python looks for "
            f"modules.{did_you_mean(name, known)}"
        )
    if not hasattr(module, "make"):
        raise InputError(f"objective.terms.{name}: {module.__file__} has no function make(**options) -> Objective.")
    make = module.make
    parameters = inspect.signature(make).parameters
    given = {"tokenizer": tokenizer} if "tokenizer" in parameters else {}
    allowed = [p for p in parameters if p not in given]
    for option in options:
        if option not in allowed:
            raise InputError(f"objective.{name}.{option}: no such option.{did_you_mean(option, allowed)}")
    return make(**options, **given)


def _coefficient(name: str, weight: Any) -> Coefficient:
    field = f"objective.terms.{name}"
    if isinstance(weight, Mapping):
        if set(weight) != {"start", "end", "steps"}:
            raise InputError(f"{field} = {dict(weight)}: a schedule has the fields start, end and steps.")
        return optax.linear_schedule(float(weight["start"]), float(weight["end"]), int(weight["steps"]))
    if isinstance(weight, bool) or not isinstance(weight, int | float):
        raise InputError(f"{field} = {weight!r}: a weight is a number or a schedule {{start, end, steps}}.")
    return lambda step: jnp.asarray(weight, jnp.float32)
