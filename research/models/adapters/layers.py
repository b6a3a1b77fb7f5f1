"""Some of the parameters are trained as they are, and the others frozen."""

from research.errors import InputError
from research.models.adapters.types import Adapter


def make(match: str) -> Adapter:
    """Trains what an expression matches.

    Args:
      match: on whole names of parameters, as `trainable`: "layers/3/.*" is one layer, counted from 0.

    Raises:
      InputError: it is empty.
    """
    if not match:
        raise InputError("match = '': names nothing. For example: match = 'layers/3/.*'.")
    return Adapter(lambda specs: specs, {"adapter.match": match})
