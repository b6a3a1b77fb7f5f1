"""How alike an answer and the record's response are, from 0 to 1."""

import dataclasses
from collections import Counter
from collections.abc import Callable, Sequence

from research.errors import InputError, did_you_mean
from research.rollouts.rewards import texts
from research.rollouts.rewards.types import Reward, Sample


def make(kind: str = "edit", within: str = "") -> Reward:
    """Compares the answer with the response, white space around them aside.

    Args:
      kind: "edit": 1 - the Levenshtein distance of the characters / the length of the longer text; "words": F1 of the
        words, whatever their order (arXiv:1606.05250, section 6.1); "rouge_l": F1 of the longest common subsequence
        of words (Lin, 2004). Words are compared in lower case, with their punctuation.
      within: only what stands in the last <within>...</within> of the answer counts; without that it gets 0.

    Raises:
      InputError: there is no such kind.
    """
    if kind not in KINDS:
        raise InputError(f"kind = {kind!r}: no such similarity.{did_you_mean(kind, KINDS)}")
    texts.check_tag("within", within)
    return Similarity(kind, within)


@dataclasses.dataclass(frozen=True)
class Similarity:
    """The attributes are the options of `make`."""

    kind: str
    within: str

    def __call__(self, sample: Sample) -> float | None:
        """None where the record has no response."""
        response, answer = texts.response(sample.record), texts.between(sample.answer, self.within)
        if response is None:
            return None
        return 0.0 if answer is None else KINDS[self.kind](answer, response.strip())


def edit(a: str, b: str) -> float:
    """1 - Levenshtein's distance / the length of the longer one; 1 of two empty texts."""
    row = list(range(len(b) + 1))
    for i, x in enumerate(a, start=1):
        diagonal, row[0] = row[0], i
        for j, y in enumerate(b, start=1):
            diagonal, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, diagonal + (x != y))
    return 1.0 - row[-1] / max(len(a), len(b), 1)


def words(a: str, b: str) -> float:
    """F1 of the words of two texts, each counted as often as it is there."""
    mine, right = a.lower().split(), b.lower().split()
    return _f1(sum((Counter(mine) & Counter(right)).values()), mine, right)


def rouge_l(a: str, b: str) -> float:
    """F1 of the longest common subsequence of the words of two texts."""
    mine, right = a.lower().split(), b.lower().split()
    row = [0] * (len(right) + 1)
    for x in mine:
        diagonal = 0
        for j, y in enumerate(right, start=1):
            diagonal, row[j] = row[j], diagonal + 1 if x == y else max(row[j], row[j - 1])
    return _f1(row[-1], mine, right)


def _f1(common: int, a: Sequence[str], b: Sequence[str]) -> float:
    """2 P R / (P + R), where P = common / len(a) and R = common / len(b); 1 of two empty texts."""
    return 2.0 * common / (len(a) + len(b)) if a or b else 1.0


KINDS: dict[str, Callable[[str, str], float]] = {"edit": edit, "words": words, "rouge_l": rouge_l}
