"""Parsers of the values of flags: text -> value. Each raises ValueError with what the value must be."""

import json
import math
import os
from collections.abc import Callable
from typing import Any

from research.errors import MOST_SEED, did_you_mean


def path(text: str) -> str:
    """A file or folder; ~ is the home folder, which shells leave as it is after `=`."""
    expanded = os.path.expanduser(text)
    if expanded.startswith("~"):
        name = expanded.partition(os.path.sep)[0]
        raise ValueError(f"there is no user {name[1:]!r}. Write ./{expanded} for a folder called {name}.")
    return expanded


def paths(text: str) -> tuple[str, ...]:
    """Files, folders or other entries, parted by commas."""
    return tuple(path(word) for word in words(text))


def number(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise ValueError("must be a finite number.")
    return value


def whole(least: int | None = None, most: int = 2**31 - 1) -> Callable[[str], int]:
    """A parser of whole numbers from `least` to `most`; of more than 4,300 digits Python reads none."""

    def parse(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            value = None
        if value is None or (least is not None and value < least):
            raise ValueError("must be a whole number" + ("." if least is None else f", at least {least}."))
        if abs(value) > most:
            raise ValueError(f"must be a whole number, at most {most}.")
        return value

    return parse


def above_zero(text: str) -> float:
    value = number(text)
    if not value > 0:
        raise ValueError("must be above 0.")
    return value


def share(text: str) -> float:
    value = number(text)
    if not 0 < value <= 1:
        raise ValueError("must be in (0, 1].")
    return value


def amount(text: str) -> float:
    """A share, up to 1, or else a whole number of what there is."""
    value = above_zero(text)
    if value > 1 and not value.is_integer():
        raise ValueError("must be a whole number, or up to 1, where it is a share.")
    return value


def one_of(*options: str) -> Callable[[str], str]:
    """A parser of a choice."""

    def parse(text: str) -> str:
        if text not in options:
            raise ValueError(f"no such choice.{did_you_mean(text, options)}")
        return text

    return parse


def words(text: str) -> tuple[str, ...]:
    """Words that are parted by commas."""
    return tuple(word for word in text.split(",") if word)


def urls(text: str) -> tuple[str, ...]:
    """URLs of servers that are parted by commas."""
    found = tuple(url.rstrip("/") for url in words(text))
    for url in found:
        if not url.startswith(("http://", "https://")) or found.count(url) > 1:
            raise ValueError("must be URLs of servers, each once, such as http://127.0.0.1:8000.")
    return found


def section(text: str) -> dict[str, Any]:
    """A JSON object, as a section of a config."""
    parsed = _json_object(text)
    if not parsed:
        raise ValueError('must be a JSON object, such as {"exact_match": 1.0}.')
    return parsed


def names_by_name(text: str) -> dict[str, str]:
    """A JSON object of texts."""
    parsed = _json_object(text)
    if parsed is None or not all(isinstance(value, str) for value in parsed.values()):
        raise ValueError('must be a JSON object of texts, such as {"text": "headline"}.')
    return parsed


def _json_object(text: str) -> dict[str, Any] | None:
    """The object that `text` is in JSON; None where it is none."""
    try:
        parsed = json.loads(text)
    except (ValueError, RecursionError):
        return None
    return parsed if isinstance(parsed, dict) else None


def step(text: str) -> int | str:
    """The number of a step, or "best"."""
    if text == "best":
        return text
    try:
        return whole(0)(text)
    except ValueError:
        raise ValueError("must be the number of a step, or 'best'.") from None


def mesh(text: str) -> dict[str, int]:
    """AXIS=SIZE,... -> axis -> size."""
    sizes = {}
    for part in text.split(","):
        axis, _, size = part.partition("=")
        if not size.removeprefix("-").isdecimal():
            raise ValueError(f"{part!r} is not of the form AXIS=SIZE. Write data=4,tensor=2.")
        if axis in sizes:
            raise ValueError(f"{axis} is there twice. Leave one out.")
        sizes[axis] = int(size)
    return sizes


seed = whole(0, MOST_SEED)
