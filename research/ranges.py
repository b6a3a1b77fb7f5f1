"""Ranges of the numbers that a config holds. Each stands beside its declaration: `beta: Annotated[float, Range(0, 1)]`.

options.convert checks them where a config is read, and `check` where a dataclass is made in Python. docs/configs.md
lists them. What depends on other fields is checked where both are known.
"""

import dataclasses
import functools
import math
import types
import typing
from collections.abc import Iterator, Mapping
from typing import Annotated, Any

from research.errors import InputError

# The numbers of float32, in which a run computes: what is smaller than the least would be 0, what is larger infinite.
LEAST_FLOAT, MOST_FLOAT = 2.0**-126, 2.0**128 * (1 - 2.0**-24)


@dataclasses.dataclass(frozen=True)
class Range:
    """Which numbers an option may be; without a bound any finite one.

    Attributes:
      least, most: the bounds, where they are allowed themselves.
      above, below: the bounds, where they aren't.
    """

    least: float | None = None
    most: float | None = None
    above: float | None = None
    below: float | None = None

    def __contains__(self, value: float) -> bool:
        return (
            math.isfinite(value)
            and (self.least is None or value >= self.least)
            and (self.most is None or value <= self.most)
            and (self.above is None or value > self.above)
            and (self.below is None or value < self.below)
        )

    def __str__(self) -> str:
        """In words, which follow "must be"; "" where any finite number is one."""
        low, high = self.least if self.above is None else self.above, self.most if self.below is None else self.below
        if low is not None and high is not None:
            return f"in {'[' if self.above is None else '('}{low}, {high}{']' if self.below is None else ')'}"
        if low is not None:
            return f"at least {low}" if self.above is None else f"above {low}"
        if high is not None:
            return f"at most {high}" if self.below is None else f"below {high}"
        return ""

    def check(self, value: float, field: str) -> None:
        """Raises InputError, which begins with `field`, where a number is out of range."""
        if value not in self:
            finite = "" if isinstance(value, int) or math.isfinite(value) else "a finite number"
            raise InputError(f"{field} = {value}: must be {', '.join(filter(None, (finite, str(self))))}.")


Count = Annotated[int, Range(0)]
Size = Annotated[int, Range(1)]
Whole = Annotated[int, Range()]
Real = Annotated[float, Range()]
NotNegative = Annotated[float, Range(0)]
Positive = Annotated[float, Range(above=0)]
Share = Annotated[float, Range(0, 1)]
Part = Annotated[float, Range(above=0, most=1)]  # a share of which there is something
Fraction = Annotated[float, Range(0, below=1)]  # a share that is never all


def check(values: Any, section: str = "") -> None:
    """Checks the numbers of a dataclass by the ranges of its fields.

    Args:
      values: an instance.
      section: what its fields' names follow in errors, such as "optimizer".

    Raises:
      InputError: one is out of its range.
    """
    for name, hint in hints(type(values)).items():
        for field, number, range in _numbers(hint, getattr(values, name), f"{section}.{name}" if section else name):
            range.check(number, field)


@functools.cache
def hints(cls: type) -> Mapping[str, Any]:
    """The types of a dataclass's fields, with their ranges."""
    every = typing.get_type_hints(cls, include_extras=True)
    return {field.name: every[field.name] for field in dataclasses.fields(cls)}


def range_of(hint: Any) -> Range | None:
    """The range that a type has beside it; of a union, or of what is in a tuple or a mapping, the first."""
    if typing.get_origin(hint) is Annotated:
        return next((each for each in hint.__metadata__ if isinstance(each, Range)), None)
    return next((found for arg in typing.get_args(hint) if (found := range_of(arg)) is not None), None)


def _numbers(hint: Any, value: Any, field: str) -> Iterator[tuple[str, float, Range]]:
    """(field, number, range) of each number of a value that has a range."""
    kind, args = typing.get_origin(hint), typing.get_args(hint)
    if kind is Annotated:
        if isinstance(value, int | float) and not isinstance(value, bool) and (range := range_of(hint)) is not None:
            yield field, value, range
    elif kind in (types.UnionType, typing.Union):
        for option in args:
            yield from _numbers(option, value, field)
    elif kind is tuple and isinstance(value, tuple | list):
        for each in value:
            yield from _numbers(args[0], each, field)
    elif kind is not None and isinstance(kind, type) and issubclass(kind, Mapping) and isinstance(value, Mapping):
        for name, each in value.items():
            yield from _numbers(args[1], each, f"{field}.{name}")
