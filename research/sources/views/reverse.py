"""Documents from their end to their beginning, for models that are to read either way.

Training on both directions lets a model answer "who is B's parent?" after it has read "A's child is B" (Golovneva et
al., arXiv:2403.13799, "token reversal"): name the same path in two sources, one of them with this view.
"""

import numpy as np

from research.sources.tokenizers import Tokenizer
from research.sources.views import Document, View


def make(tokenizer: Tokenizer | None = None) -> View:
    """The tokens of a document are seen in reverse order, between those that begin and end it.

    Args:
      tokenizer: of the run, whose bos and eos stay where they are.
    """

    def documents(document: Document, rng: np.random.Generator) -> list[Document]:
        tokens, mask = document.tokens.copy(), document.mask.copy()
        first = int(tokens[0] == tokenizer.bos)
        stop = len(tokens) - int(tokens[-1] == tokenizer.eos)
        tokens[first:stop], mask[first:stop] = tokens[first:stop][::-1], mask[first:stop][::-1]
        return [Document(tokens, mask)]

    return View(documents)
