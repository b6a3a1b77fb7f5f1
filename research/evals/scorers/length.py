"""How long a record is."""

from collections.abc import Mapping, Sequence
from typing import Any

from research.evals.scorers.types import Chunk, Scorer


def make() -> Scorer:
    """Columns `characters` and `words` of the text, or of all that is said in the conversation; a word is what white
    space parts. (`tokens` and `supervised` are in every row.)"""
    return Length()


class Length(Scorer):
    """See `make`."""

    columns = ("characters", "words")

    def score(self, chunk: Chunk) -> Mapping[str, Sequence[Any]]:
        return {"characters": list(map(len, chunk.texts)), "words": [len(text.split()) for text in chunk.texts]}
