"""Regular expressions of a folder's config, which may take as long as they like: matched within a limit of time."""

import json
import re
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from research.errors import InputError

_SECONDS = 10.0
_QUICK = re.compile(r"(\(\.\*\\\.\)\?)?\(?[\w.|]*\)?")  # with nothing in it that is repeated or grouped once more
_PROGRAM = """
import json, re, sys
patterns, groups = json.load(sys.stdin)
patterns = [re.compile(pattern) for pattern in patterns]
matching = lambda names: (i for i, pattern in enumerate(patterns) if any(map(pattern.fullmatch, names)))
print(json.dumps([next(matching(names), None) for names in groups]))
"""


def first_matching(patterns: Sequence[str], groups: Sequence[Sequence[str]], where: Path) -> list[int | None]:
    """The number of the first pattern that matches the whole of one of some names, for each group of these; else None.

    What could take long is done by a process of its own, which Python's regular expressions can't be stopped without.

    Args:
      patterns: of Python's module re.
      groups: names of modules.
      where: the folder that the patterns come from, for errors.

    Raises:
      InputError: they take too long, or one isn't a regular expression.
    """
    for pattern in patterns:
        try:
            re.compile(pattern)
        except (re.error, RecursionError, OverflowError) as error:
            raise InputError(f"{where}: {pattern!r:.200} is no regular expression ({error}). Mend it.") from error
    if all(map(_QUICK.fullmatch, patterns)):
        return [
            next((i for i, pattern in enumerate(patterns) if any(re.fullmatch(pattern, name) for name in names)), None)
            for names in groups
        ]
    work = json.dumps([list(patterns), [list(names) for names in groups]])
    command = [sys.executable, "-I", "-c", _PROGRAM]
    try:
        found = subprocess.run(command, input=work, capture_output=True, text=True, check=True, timeout=_SECONDS)
        return json.loads(found.stdout)
    except subprocess.SubprocessError:
        longest = max(patterns, key=len)
        raise InputError(
            f"{where}: its regular expressions of modules' names, such as {longest!r:.200}, take more than "
            f"{_SECONDS:g} s to match. Write the names in their place."
        ) from None
