"""What a source of batches is."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np

State = dict[str, Any]  # small, and of JSON types only: it is saved with every checkpoint


class Source(NamedTuple):
    """Where batches come from.

    Attributes:
      spec: field -> shape and dtype of the GLOBAL batch; see sources.fields. segment_ids is 0 at padding and 1, 2, ...
        in the documents of a row; positions restart at 0 in each document; loss_mask is 1 where the token is to be
        predicted.
      init: () -> the state before the first batch.
      next: state -> (this process's rows of the batch, the next state). A pure function, safe to call from any
        thread.
    """

    spec: dict[str, jax.ShapeDtypeStruct]
    init: Callable[[], State]
    next: Callable[[State], tuple[dict[str, np.ndarray], State]]
