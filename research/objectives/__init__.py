"""Objectives by name: each module here that has a `make` function is one, and any that Python can import by that name,
such as mine.py in the folder that a command is run in. Nothing is registered."""

import dataclasses
import inspect
import sys
from collections.abc import Mapping
from types import ModuleType
from typing import Any

import jax.numpy as jnp
import optax

from research import options as option_types
from research import other_names
from research.errors import InputError, did_you_mean
from research.objectives.terms import Coefficient, Term, Terms
from research.objectives.types import Objective, Sampler
from research.ranges import MOST_FLOAT
from research.sources import special_tokens, stand_in
from research.sources.tokenizers import Tokenizer

__all__ = ["Coefficient", "Objective", "Sampler", "Term", "Terms", "load", "needed_tokens"]

# Modules of this package that are no objectives.
_PARTS = ("answers", "classes", "excess", "pairs", "policy_options", "terms", "types", "verdicts")
_FIELDS = ("objective", "weight", "sources")  # of a term, beside its objective's options
_OF_RUN = ("tokenizer", "sampler")  # parameters of a `make` that the run gives, and no config
_SCHEDULE = ("start", "end", "steps")


def load(
    spec: Mapping[str, Any], tokenizer: Tokenizer | None = None, sampler: Sampler | None = None
) -> dict[str, Term]:
    """The terms of a composed objective, by name.

    Args:
      spec: {"terms": {name: term}}. A term is its weight, or a mapping of
          objective: the module, by default the term's name;
          weight: a number, or a linear schedule {"start": 0.0, "end": 1.0, "steps": 1000}; by default 1;
          sources: the names of the sources of data whose tokens it counts, by default all;
          and the options of the module's `make`, which may also lie beside the terms: {"terms": ..., name: {options}}.
      tokenizer: of the run, for those whose `make` has a parameter `tokenizer`. None where it isn't known yet, and
        options are only to be checked; a `make` whose parameter has no default is then given a stand-in.
      sampler: of the run, for those whose `make` has a parameter `sampler`.

    Raises:
      InputError: an unknown objective or option, or no term at all.
    """
    terms = spec.get("terms", {})
    if not isinstance(terms, Mapping):
        raise InputError(f"objective.terms = {terms!r}: must be a mapping, such as {{'next_token': 1.0}}.")
    if not terms:
        raise InputError("objective.terms: names no objective. For example: objective.terms = {'next_token': 1.0}.")
    for name in spec:
        if name != "terms" and name not in terms:
            raise InputError(f"objective.{name}: options for a term that isn't used.{did_you_mean(name, terms)}")
    return {
        name: _Entry.read(name, value, spec.get(name, {})).term(tokenizer, sampler or Sampler())
        for name, value in terms.items()
    }


def needed_tokens(spec: Mapping[str, Any], tokenizer: Tokenizer) -> tuple[str, ...]:
    """The names of the special tokens that the objectives need, which the tokenizer may lack.

    An objective that puts special tokens into a batch has a function special_tokens(tokenizer, **options) beside its
    `make`; a run adds what its tokenizer lacks of them before there are tokens.

    Args:
      spec: see `load`, which has checked it.
      tokenizer: of the run.
    """
    entries = [_Entry.read(name, value, spec.get(name, {})) for name, value in sorted(spec["terms"].items())]
    return tuple(name for entry in entries for name in entry.needed_tokens(tokenizer))


@dataclasses.dataclass(frozen=True)
class _Entry:
    """A term as the config spells it.

    Attributes:
      name: of the term.
      fields: those of _FIELDS that the config sets.
      inside: options in objective.terms.NAME.
      beside: options in objective.NAME.
    """

    name: str
    fields: Mapping[str, Any]
    inside: Mapping[str, Any] | None
    beside: Mapping[str, Any]

    @classmethod
    def read(cls, name: str, value: Any, beside: Mapping[str, Any]) -> "_Entry":
        """Raises InputError where the term is spelt in no way that `load` knows."""
        if not isinstance(beside, Mapping):
            raise InputError(f"objective.{name} = {beside!r}: is a section with the options of the term.")
        if not isinstance(value, Mapping) or (value and set(value) <= set(_SCHEDULE)):
            return cls(name, {"weight": value}, None, beside)
        inside = {option: x for option, x in value.items() if option not in _FIELDS}
        for option in inside:
            if option in beside:
                raise InputError(f"objective.{name}.{option}: is objective.terms.{name}.{option} too. Leave one out.")
        return cls(name, {field: x for field, x in value.items() if field in _FIELDS}, inside, beside)

    def field_of(self, option: str) -> str:
        """The config's field for an option: where it is set, or else would be."""
        beside = self.inside is None or option in self.beside
        return f"objective.{self.name}.{option}" if beside else f"objective.terms.{self.name}.{option}"

    def needed_tokens(self, tokenizer: Tokenizer) -> tuple[str, ...]:
        """See the function of this name."""
        module, parameters = self._make()
        options = {**(self.inside or {}), **self.beside}
        fields = {option: self.field_of(option) for option in (*parameters, *options) if option not in _OF_RUN}
        with option_types.naming_fields(fields):
            return special_tokens.needed_by(module, tokenizer, options, {})

    def term(self, tokenizer: Tokenizer | None, sampler: Sampler) -> Term:
        """Raises InputError for what `load` says."""
        module, parameters = self._make()
        options = {**(self.inside or {}), **self.beside}
        accepted = [name for name, p in parameters.items() if p.kind is not p.VAR_KEYWORD and name not in _OF_RUN]
        if not any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
            self._check_known(options, accepted)
        else:
            self._check_known([name for name in _OF_RUN if name in options], accepted)
        fields = {option: self.field_of(option) for option in (*accepted, *options)}
        option_types.check(module.make, options, fields)
        with option_types.naming_fields(fields):
            more = {}
            if "tokenizer" in parameters:
                more["tokenizer"] = tokenizer or stand_in.tokenizer(module, options, {})
            if "sampler" in parameters:
                more["sampler"] = sampler
            objective = module.make(**options, **more)
        return Term(objective, self._coefficient(), self._sources(), self.name, fields)

    def _check_known(self, options: Any, accepted: list[str]) -> None:
        for option in options:
            if option not in accepted:
                known = (*accepted, *_FIELDS) if self.inside is not None else accepted
                hint = other_names.answer(option) or did_you_mean(option, known)
                raise InputError(f"{self.field_of(option)}: no such option.{hint}")

    def _make(self) -> tuple[ModuleType, Mapping[str, inspect.Parameter]]:
        """The module, and the parameters of its `make`."""
        kind = self.fields.get("objective", self.name)
        field = f"objective.terms.{self.name}" + (f".objective = {kind!r}" if "objective" in self.fields else "")
        module = _find(kind, field)
        if not hasattr(module, "make"):
            raise InputError(f"{field}: {module.__file__} has no function make(**options) -> Objective.")
        parameters = inspect.signature(module.make).parameters
        for reserved in _FIELDS:
            if reserved in parameters:
                raise InputError(
                    f"{field}: make in {module.__file__} has an option {reserved!r}, which is a field of every term "
                    f"({', '.join(_FIELDS)}). Give the option another name."
                )
        return module, parameters

    def _coefficient(self) -> Coefficient:
        weight = self.fields.get("weight", 1.0)
        field = f"objective.terms.{self.name}" + ("" if self.inside is None else ".weight")
        if isinstance(weight, Mapping):
            if set(weight) != set(_SCHEDULE):
                raise InputError(f"{field} = {dict(weight)}: a schedule has the fields start, end and steps.")
            steps = weight["steps"]
            if isinstance(steps, bool) or not isinstance(steps, int) or steps < 1:
                raise InputError(f"{field}.steps = {steps!r}: must be a whole number, at least 1.")
            for end in ("start", "end"):
                _check_number(f"{field}.{end}", weight[end])
            return optax.linear_schedule(float(weight["start"]), float(weight["end"]), steps)
        _check_number(field, weight)
        return lambda step: jnp.asarray(weight, jnp.float32)

    def _sources(self) -> tuple[str, ...]:
        sources = self.fields.get("sources", ())
        sources = (sources,) if isinstance(sources, str) else sources
        if not isinstance(sources, list | tuple) or not all(isinstance(source, str) for source in sources):
            raise InputError(f"objective.terms.{self.name}.sources = {sources!r}: is a list of names of data.sources.")
        return tuple(sources)


def _check_number(field: str, weight: Any) -> None:
    number = isinstance(weight, int | float) and not isinstance(weight, bool)
    if not (number and abs(weight) <= MOST_FLOAT):  # nan is neither
        raise InputError(f"{field} = {weight!r}: a weight is a finite number or a schedule {{start, end, steps}}.")


def _find(kind: Any, field: str) -> ModuleType:
    """The module of an objective. Raises InputError, in which `field` is what names it, where there is none."""
    return option_types.module(sys.modules[__name__], kind, field, _PARTS)
