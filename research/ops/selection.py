"""Numbers by which examples are selected, from what a model says of their tokens.

Axes: B batch, T time.
"""

import jax.numpy as jnp
from jaxtyping import Array, Float


def error_norms(log_prob: Float[Array, "B T"], collision: Float[Array, "B T"]) -> Float[Array, "B T"]:
    """The length of p - onehot(target) at each token (EL2N, arXiv:2107.07075, definition 2): the gradient of the loss
    by the logits.

    Args:
      log_prob: log p(target).
      collision: log sum_v p(v)^2.
    """
    return jnp.sqrt(jnp.maximum(jnp.exp(collision) - 2 * jnp.exp(log_prob) + 1, 0.0))
