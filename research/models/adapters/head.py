"""The head is trained, and nothing else: a probe."""

from research.models.adapters.types import Adapter, also_trained


def make(also: str = "") -> Adapter:
    """Trains the head and its bias. Where embeddings are tied there is none.

    Args:
      also: an expression on whole names of parameters that are trained besides.
    """
    return Adapter(lambda specs: specs, {"adapter.kind": r"head(_\w+)?(/.*)?"} | also_trained(also))
