"""The one error for bad input: it says which field or file, what it held, and what to do."""

import difflib
from collections.abc import Iterable


class InputError(ValueError):
    """Something the user gave can't be used. The message names the field or file, its value and the remedy."""


def did_you_mean(name: str, options: Iterable[str]) -> str:
    """Returns " Did you mean 'x'?" for the nearest of `options`, else the list of what is allowed."""
    options = sorted(options)
    near = difflib.get_close_matches(name, options, n=1, cutoff=0.6)
    if near:
        return f" Did you mean {near[0]!r}?"
    return f" Known: {', '.join(options)}."
