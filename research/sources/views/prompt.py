"""Documents whose prompts a prefix LM reads whole (model.prefix), whatever the objective."""

import numpy as np

from research.sources.views import Document, View


def make() -> View:
    """A document's prefix is what stands before its first token that is to be predicted: the prompt of a record, all
    before the first answer of a conversation, and nothing of a text."""

    def documents(document: Document, rng: np.random.Generator) -> list[Document]:
        return [document._replace(fields={"prefix": np.cumsum(document.mask) == 0})]

    return View(documents, ("prefix",))
