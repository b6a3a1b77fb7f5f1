"""The norms' scales and biases are trained, and nothing else."""

from research.models.adapters.types import Adapter, also_trained


def make(also: str = "") -> Adapter:
    """Trains the norms of all layers and the last one.

    Args:
      also: an expression on whole names of parameters that are trained besides.
    """
    return Adapter(lambda specs: specs, {"adapter.kind": r"(.*/)?\w*norm/\w+"} | also_trained(also))
