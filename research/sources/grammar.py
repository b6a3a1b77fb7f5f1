"""Small generated programs, each word of which stands in two places: what is missing can be known by the rest.

    def pola(k, s):
        return k - s

    assert pola(75, 2) == 75 - 2

Read from left to right, a word is a guess where it first comes and a copy after that. With a part taken out, it is a
copy wherever the word stands elsewhere. So these texts tell models that see what follows a hole from those that don't.
Nothing is downloaded.
"""

import random
import re
import string
from collections.abc import Iterator

from research.errors import InputError, did_you_mean

_CONSONANTS, _VOWELS, _OPERATORS = "bdfghklmnprstvz", "aeiou", "+-*%"
PARTS = {
    "functions": (
        *("def ", "f", "(", "a", ", ", "b", "):\n    return ", "a", " ", "op", " ", "b"),
        *("\n\nassert ", "f", "(", "x", ", ", "y", ") == ", "x", " ", "op", " ", "y", "\n"),
    )
}


def records(name: str, count: int, seed: int) -> Iterator[dict[str, str]]:
    """Yields `count` records of a grammar, fixed by name and seed; the first n don't depend on `count`.

    A record has `text`, a program, and the same in three parts, `prefix`, `middle` and `suffix`. The middle is
    not blank, and is determined by the other two: what it holds of a word, the word stands elsewhere whole.

    Args:
      name: "functions", whose middles are cut out between any two places; or "functions/N", with middles of N
        characters, of the same programs.
      count, seed: how many records, and of the random draws.

    Raises:
      InputError: there is no such grammar, or no such middle.
    """
    base, size = _parse(name)
    for number in range(count):
        rng = random.Random(f"{base}/{seed}/{number}")  # a string seeds alike in every process
        parts = _write(base, rng)
        text = "".join(part for _, part in parts)
        holes = _holes(len(text), size, rng)
        start, stop = next(hole for hole in holes if text[slice(*hole)].strip() and is_determined(parts, *hole))
        yield {"text": text, "prefix": text[:start], "middle": text[start:stop], "suffix": text[stop:]}


def is_determined(parts: list[tuple[str, str]], start: int, stop: int) -> bool:
    """Whether what stands around a hole in a program leaves one way to fill it.

    It is so where each word that the hole takes from stands elsewhere whole, with its end in sight: the hole takes
    neither of its neighbours. (Where it isn't, parts of a word may still determine it; those holes are not counted.)

    Args:
      parts: (word's name, or "" of what is the same in all programs; text).
      start, stop: the hole, in characters of the whole text.
    """
    taken, seen, at = set(), set(), 0
    for name, part in parts:
        end = at + len(part)
        if at < stop and end > start:
            taken.add(name)
        if end < start or at > stop:
            seen.add(name)
        at = end
    return taken - {""} <= seen


def _parse(name: str) -> tuple[str, int]:
    """The grammar's name and the size of its middles, 0 for any."""
    base, slash, size = name.partition("/")
    if base not in PARTS:
        raise InputError(f"grammar {name!r}: there is no {base!r}.{did_you_mean(base, PARTS)}")
    if slash and not re.fullmatch("[1-9]|1[0-9]", size):
        raise InputError(f"grammar {name!r}: middles of {size!r} characters. Use {base}/1 to {base}/19, or {base}.")
    return base, int(size) if slash else 0


def _write(base: str, rng: random.Random) -> list[tuple[str, str]]:
    """The parts of a program; see `is_determined`."""
    words = {
        "f": "".join(rng.choice(_CONSONANTS) + rng.choice(_VOWELS) for _ in range(rng.randint(1, 2))),
        "a": rng.choice(string.ascii_lowercase),
        "b": rng.choice(string.ascii_lowercase),
        "op": rng.choice(_OPERATORS),
        "x": _number(rng),
        "y": _number(rng),
    }
    return [(part, words[part]) if part in words else ("", part) for part in PARTS[base]]


def _number(rng: random.Random) -> str:
    """A number of one or two digits, each as often."""
    digits = rng.randint(1, 2)
    return str(rng.randrange(10 ** (digits - 1), 10**digits))


def _holes(length: int, size: int, rng: random.Random) -> Iterator[tuple[int, int]]:
    """Yields places to cut out: between two of all places, or of `size` characters."""
    while True:
        start = rng.randint(0, length - max(1, size))
        stop = start + size if size else rng.randint(0, length)
        if start != stop:
            yield min(start, stop), max(start, stop)
