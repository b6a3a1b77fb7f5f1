"""JSON past the limits of Python's reader, which refuses numbers of more than 4,300 digits and deep nesting."""

import json
import re
from typing import Any

MOST_NESTED = 100  # what is deeper can be read, and not be written again: the writer's limit depends on its callers
_TOKEN = re.compile(r'"[^"\\]*(?:\\.[^"\\]*)*"|[\[\]{},]', re.DOTALL)


def elements(data: bytes) -> list[bytes] | None:
    """The text of each element of a JSON list, so that one that can't be read doesn't hide the others.

    Args:
      data: the list. Of brackets and commas no more is checked than what parts its elements.

    Returns:
      the elements in UTF-8; None where `data` is no list.
    """
    text = data.decode(json.detect_encoding(data)).strip()
    if not text.startswith("["):
        return None
    parts, depth, start = [], 0, 1
    for token in _TOKEN.finditer(text):
        mark = token[0]
        if depth == 1 and mark in (",", "]"):
            parts.append(text[start : token.start()])
            start = token.end()
        depth += (mark in ("[", "{")) - (mark in ("]", "}"))
    rest = text[start:]
    return [part.strip().encode() for part in (*parts, *([rest] if rest.strip() else []))]


def deeper_than(value: Any, most: int) -> bool:
    """Whether lists and objects lie in each other more than `most` deep."""
    level = [value] if isinstance(value, dict | list) else []
    for _ in range(most):
        children = (child for each in level for child in (each.values() if isinstance(each, dict) else each))
        level = [child for child in children if isinstance(child, dict | list)]
        if not level:
            return False
    return True
