"""Which records repeat what a model is to be evaluated on."""

import array
import functools
import hashlib
import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from research.errors import InputError
from research.evals.scorers.inputs import Compared, Inputs
from research.evals.scorers.types import Chunk, Scorer

_WORD = re.compile(r"\w+")


def make(inputs: Inputs, eval_data: str = "", n: int = 13) -> Scorer:
    """Columns
      overlap: the share of a record's words that stand in an n-gram which evaluation data has too: 0 for a clean one;
      overlap_records: how many records of the evaluation data share one with it.

    Words are runs of letters and digits, in lower case, as in GPT-3's check with n = 13 (arXiv:2005.14165, appendix C).
    A record of the evaluation data with fewer words than n is looked for as a whole. The summary says how many records
    of both sides share something.

    Args:
      inputs: of the command.
      eval_data: what a model is to be evaluated on, in the place of --eval_data.
      n: words.
    """
    if n < 1:
        raise InputError(f"n = {n}: must be at least 1.")
    return Overlap(inputs.records(inputs.name("eval_data", eval_data, "overlap"), "--eval_data"), n)


def words(text: str) -> list[str]:
    return _WORD.findall(text.lower())


def grams(words: Sequence[str], n: int) -> list[bytes]:
    """A hash of 8 bytes of each n-gram."""
    joined = (" ".join(words[i : i + n]) for i in range(len(words) - n + 1))
    return [hashlib.blake2b(gram.encode(errors="surrogatepass"), digest_size=8).digest() for gram in joined]


class Overlap(Scorer):
    """See `make`."""

    columns = ("overlap", "overlap_records")

    def __init__(self, compared: Compared, n: int):
        self._compared, self._n = compared, n
        self._shares, self._counts = array.array("d"), array.array("q")
        self._there = set[int]()  # records of the evaluation data that share something

    @property
    def identity(self) -> Any:
        return self._compared.identity

    @functools.cached_property
    def _owners(self) -> dict[int, dict[bytes, list[int]]]:
        """Words of an n-gram -> its hash -> the records of the evaluation data that have it."""
        owners: dict[int, dict[bytes, list[int]]] = {}
        for chunk in self._compared.chunks():
            for number, text in zip(chunk.numbers, chunk.texts, strict=True):
                here = words(text)
                n = min(self._n, len(here))
                for gram in set(grams(here, n)) if n else ():
                    owners.setdefault(n, {}).setdefault(gram, []).append(number)
        return owners

    def observe(self, chunk: Chunk) -> None:
        for text in chunk.texts:
            here = words(text)
            covered, owners = np.zeros(len(here), bool), set[int]()
            for n, known in self._owners.items():
                for i, gram in enumerate(grams(here, n)):
                    if gram in known:
                        covered[i : i + n] = True
                        owners.update(known[gram])
            self._shares.append(float(covered.mean()) if here else 0.0)
            self._counts.append(len(owners))
            self._there |= owners

    def score(self, chunk: Chunk) -> Mapping[str, Sequence[Any]]:
        here = slice(chunk.first, chunk.first + len(chunk))
        return {"overlap": self._shares[here], "overlap_records": self._counts[here]}

    def summary(self) -> str:
        here = np.count_nonzero(np.frombuffer(self._counts, np.int64))
        return (
            f"overlap: {here:,} of {len(self._counts):,} records share {self._n} words in a row, or a whole short "
            f"record, with {len(self._there):,} records of {self._compared.name}"
        )
