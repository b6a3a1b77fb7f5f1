"""The head is trained, and nothing else: a probe."""

from research.errors import InputError
from research.models.adapters.types import Adapter, also_trained
from research.models.specs import Specs


def make(also: str = "") -> Adapter:
    """Trains the head and its bias. Where embeddings are tied there is none.

    Args:
      also: an expression on whole names of parameters that are trained besides.
    """
    return Adapter(with_head, {"adapter.kind": r"head(_\w+)?(/.*)?"} | also_trained(also))


def with_head(specs: Specs) -> Specs:
    """The specs of a model. Raises InputError where it has no head."""
    if "head" not in specs:
        raise InputError(
            "kind = 'head': the model has none, since its embedding is its head (model.tie_embeddings). To train both, "
            "match them: adapter = {'kind': 'layers', 'match': 'embed'}."
        )
    return specs
