"""How sure a classifier is of a record's class."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from research.errors import InputError, did_you_mean
from research.evals import labels
from research.evals.scorers.inputs import Inputs
from research.evals.scorers.types import Chunk, Scorer


def make(inputs: Inputs, model: str, of: str = "") -> Scorer:
    """Columns `confidence`, the probability of the likeliest class, and `class`, its number. With `of` the confidence
    is the probability of that class, such as "good".

    Args:
      inputs: of the command.
      model: a classifier, which reads the records as `understudy label` has it read them.
      of: a class, by its name or number.
    """
    (classifier,) = labels.open_classifiers([model], inputs.origin, labels.Reading())
    return Confidence(classifier, of)


class Confidence(Scorer):
    """See `make`."""

    columns = ("confidence", "class")

    def __init__(self, classifier: labels.Classifier, of: str):
        self._classifier, self._of = classifier, of
        names = classifier.names
        if of and of not in names and not of.isdecimal():
            raise InputError(f"of = {of!r}: is no class of {classifier.name}.{did_you_mean(of, names or ['0', '1'])}")

    @property
    def identity(self) -> Any:
        return self._classifier.weights

    def score(self, chunk: Chunk) -> Mapping[str, Sequence[Any]]:
        probs = labels.probabilities(self._classifier, chunk.numbers)
        likeliest = np.argmax(probs, axis=1)
        if not self._of:
            return {"confidence": np.max(probs, axis=1), "class": likeliest}
        names = self._classifier.names
        number = names.index(self._of) if self._of in names else int(self._of)
        if number >= probs.shape[1]:
            raise InputError(f"of = {self._of!r}: {self._classifier.name} has {probs.shape[1]} classes, from 0 on.")
        return {"confidence": probs[:, number], "class": likeliest}
