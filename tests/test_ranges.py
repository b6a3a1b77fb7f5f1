"""Every number that a config may hold has a range beside its declaration, and what is out of it is refused by name."""

import importlib
import math
import pkgutil
import types
import typing
from collections.abc import Mapping, Sequence
from typing import Annotated, Any

import pytest

from research import config, objectives, options, ranges
from research.errors import InputError
from research.models import adapters
from research.objectives import weak_to_strong
from research.ranges import LEAST_FLOAT, MOST_FLOAT, Count, NotNegative, Range, Real
from research.rollouts import rewards
from research.sources import views
from research.sources.spec import SourceSpec
from research.sources.views.denoise import Denoiser

OF_RUN = ("seq_len", "tokenizer", "sampler", "return")
DENSE = {"objectives": objectives, "views": views, "adapters": adapters, "rewards": rewards}


def unranged(hint: Any) -> bool:
    """Whether somewhere in a type there is a number without a range."""
    if hint in (int, float):
        return True
    if typing.get_origin(hint) is Annotated:
        return not any(isinstance(each, Range) for each in hint.__metadata__)
    return any(unranged(arg) for arg in typing.get_args(hint))


def numbers(cls: type, prefix: str = "") -> dict[str, Any]:
    """Field -> type, of all fields of a section and of those inside it."""
    found = {}
    for name, hint in ranges.hints(cls).items():
        nested = hint if isinstance(hint, type) and hasattr(hint, "__dataclass_fields__") else None
        found |= numbers(nested, f"{prefix}{name}.") if nested else {f"{prefix}{name}": hint}
    return found


def makes() -> dict[str, Any]:
    """NAME.option -> type, of all modules with a `make`."""
    found = {}
    for kind, package in DENSE.items():
        for module in pkgutil.iter_modules(package.__path__):
            make = getattr(importlib.import_module(f"{package.__name__}.{module.name}"), "make", None)
            hints = typing.get_type_hints(make, include_extras=True) if make else {}
            found |= {f"{kind}.{module.name}.{name}": hint for name, hint in hints.items() if name not in OF_RUN}
    return found


FIELDS = numbers(config.Config) | numbers(config.RoleSection, "roles.NAME.") | numbers(SourceSpec, "data.sources.NAME.")


def test_every_number_has_a_range():
    options_of_losses = {
        f"{loss}.{k}": v for loss, cls in weak_to_strong.LOSSES.items() for k, v in numbers(cls).items()
    }
    every = (
        FIELDS | makes() | options_of_losses | numbers(Denoiser, "denoiser.") | numbers(rewards.Entry, "rewards.NAME.")
    )
    assert len(every) > 250
    assert [name for name, hint in every.items() if unranged(hint)] == []


def outside(hint: Any) -> list[float]:
    """Numbers that a type refuses: beside each bound, and those that aren't finite."""
    allowed = ranges.range_of(hint)
    whole = "int" in str(hint)
    low = allowed.least if allowed.above is None else allowed.above
    high = allowed.most if allowed.below is None else allowed.below
    values = [] if whole else [math.nan, math.inf, -math.inf, 1e300, 1e-300]
    values += [] if low is None else [low - 1 if whole or allowed.above is None else low]
    return values + ([] if high is None else [high + 1 if whole or allowed.below is None else high])


@pytest.mark.parametrize(
    "field", [name for name, hint in FIELDS.items() if ranges.range_of(hint) and "NAME" not in name]
)
def test_numbers_out_of_range_are_refused_by_name(field):
    *sections, name = field.split(".")
    hint = FIELDS[field]
    kind = typing.get_origin(hint)
    for value in outside(hint):
        wrapped = (value, value) if "tuple" in str(hint) else {"v4": value} if kind is Mapping else value
        values: Any = {name: wrapped}
        for section in reversed(sections):
            values = {section: values}
        with pytest.raises(InputError, match=rf"^{field}(\.v4)? = "):
            config.parse(values)


@pytest.mark.parametrize(
    ("allowed", "words", "inside", "outside"),
    [
        (Range(0, below=1), "in [0, 1)", [0, 0.5], [1, -0.1, math.nan]),
        (Range(above=0, most=1), "in (0, 1]", [1, 1e-30], [0, 1.1]),
        (Range(1), "at least 1", [1, 10**9], [0, math.inf]),
        (Range(above=0), "above 0", [1], [0, -1]),
        (Range(below=0), "below 0", [-1], [0]),
        (Range(most=3), "at most 3", [3], [4]),
        (Range(), "", [-1e30], [math.inf, math.nan]),
    ],
)
def test_a_range_and_its_words(allowed, words, inside, outside):
    assert str(allowed) == words
    assert all(value in allowed for value in inside)
    assert not any(value in allowed for value in outside)


def test_values_are_converted_inside_unions_and_containers():
    assert options.convert(NotNegative | None, 3, "x") == 3.0
    assert options.convert(NotNegative | None, None, "x") is None
    assert options.convert(Sequence[Count], [0, 1], "x") == (0, 1)
    assert options.convert(Mapping[str, Real], {"a": -2}, "x") == {"a": -2.0}
    assert options.convert(Real, MOST_FLOAT, "x") == MOST_FLOAT
    assert options.convert(Real, LEAST_FLOAT, "x") == LEAST_FLOAT
    for hint, value in ((Count | None, -1), (Sequence[Count], [0, -1]), (Mapping[str, Count], {"a": -1})):
        with pytest.raises(InputError, match=r"^x(\.a)? = -1: must be at least 0\.$"):
            options.convert(hint, value, "x")
    for value in (10**400, -(10**400), 1e39, 1e-39):
        with pytest.raises(InputError, match=r"^x = .*out of the range of 32-bit"):
            options.convert(Real, value, "x")
    for value in (True, "1", 1.5):
        with pytest.raises(InputError, match=r"^x = .*must be of type int"):
            options.convert(Count, value, "x")


def test_dataclasses_of_other_types_are_checked_by_their_own_ranges():
    assert types.MappingProxyType(ranges.hints(SourceSpec))["weight"] == NotNegative
    spec = SourceSpec("a.jsonl", weight=-1.0)
    with pytest.raises(InputError, match=r"^data\.sources\.a\.weight = -1\.0: must be at least 0\.$"):
        ranges.check(spec, "data.sources.a")
