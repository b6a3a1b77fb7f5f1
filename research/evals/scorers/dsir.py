"""How much likelier a record is among target texts than among all: importance weights of hashed n-grams."""

import functools
import hashlib
import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from research.errors import InputError
from research.evals.scorers.inputs import Compared, Inputs
from research.evals.scorers.types import Chunk, Scorer

_TOKEN = re.compile(r"\w+|[^\w\s]+")  # WordPunctTokenizer of nltk
SMOOTHING = 1e-8


def make(inputs: Inputs, target: str = "", buckets: int = 10_000, ngrams: int = 2) -> Scorer:
    """Column `dsir`: the log importance weight of a record, sum over its n-grams of log p_target - log p_raw (DSIR,
    arXiv:2302.03169, section 4; the numbers are those of its package data-selection). Both distributions are of the
    n-grams of words and signs, hashed into buckets: those of the target's texts, and of the records that are scored.
    Selecting draws records by Gumbel top-k on it.

    Args:
      inputs: of the command.
      target: a file of texts of the kind that is wanted, in the place of --target.
      buckets: how many.
      ngrams: up to so many words and signs each.
    """
    for name, value in (("buckets", buckets), ("ngrams", ngrams)):
        if value < 1:
            raise InputError(f"{name} = {value}: must be at least 1.")
    return Dsir(inputs.records(inputs.name("target", target, "dsir"), "--target"), buckets, ngrams)


@functools.lru_cache(maxsize=2**20)
def _bucket(ngram: str, buckets: int) -> int:
    digest = hashlib.sha256(ngram.encode(errors="surrogatepass")).digest()
    return int.from_bytes(digest, "big") % buckets


def features(text: str, buckets: int, ngrams: int) -> np.ndarray:
    """The bucket of each n-gram of a text, [n] int64: of words and signs, in lower case, of 1 to `ngrams` of them."""
    tokens = _TOKEN.findall(text.lower())
    parts = [tokens] + [[" ".join(tokens[i : i + n]) for i in range(len(tokens) - n + 1)] for n in range(2, ngrams + 1)]
    return np.array([_bucket(ngram, buckets) for part in parts for ngram in part], np.int64)


def log_ratio(target: np.ndarray, raw: np.ndarray) -> np.ndarray:
    """log p_target - log p_raw of each bucket, [buckets] float64, from how often each came."""
    p, q = target / target.sum(), raw / raw.sum()
    return np.log(p + SMOOTHING) - np.log(q + SMOOTHING)


class Dsir(Scorer):
    """See `make`."""

    columns = ("dsir",)

    def __init__(self, target: Compared, buckets: int, ngrams: int):
        self._target, self._buckets, self._ngrams = target, buckets, ngrams
        self._raw = np.zeros(buckets, np.int64)
        self._ratio: np.ndarray | None = None

    @property
    def identity(self) -> Any:
        return self._target.identity

    def _features(self, chunk: Chunk) -> list[np.ndarray]:
        return [features(text, self._buckets, self._ngrams) for text in chunk.texts]

    def _count(self, chunk: Chunk) -> np.ndarray:
        return np.bincount(np.concatenate(self._features(chunk)), minlength=self._buckets)

    def observe(self, chunk: Chunk) -> None:
        self._raw += self._count(chunk)

    def prepare(self) -> None:
        target = sum(map(self._count, self._target.chunks()))
        if not target.any() or not self._raw.any():
            raise InputError(f"--target = {self._target.name}: holds no word, or --data none. Give texts.")
        self._ratio = log_ratio(target, self._raw)

    def score(self, chunk: Chunk) -> Mapping[str, Sequence[Any]]:
        return {"dsir": [float(np.sum(self._ratio[each])) for each in self._features(chunk)]}
