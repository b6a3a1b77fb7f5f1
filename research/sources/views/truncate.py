"""The first or the last tokens of each document: headlines of long texts, or the ends of long conversations."""

from typing import Annotated

import numpy as np

from research.errors import InputError, did_you_mean
from research.ranges import Range
from research.sources.views import Document, View

KEEP = ("first", "last")


def make(tokens: Annotated[int, Range(2)], keep: str = "first") -> View:
    """A document is seen as its first or last `tokens` tokens; a shorter one as it is.

    Args:
      tokens: how many, those that begin and end the document included.
      keep: "first" or "last".

    Raises:
      InputError: an option can't be used.
    """
    if keep not in KEEP:
        raise InputError(f"keep = {keep!r}: is not known.{did_you_mean(str(keep), KEEP)}")
    part = slice(None, tokens) if keep == "first" else slice(-tokens, None)

    def documents(document: Document, rng: np.random.Generator) -> list[Document]:
        return [Document(document.tokens[part], document.mask[part])]

    return View(documents)
