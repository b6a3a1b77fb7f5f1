"""Numbers by which examples are selected, from what a model says of their tokens.

Axes: B batch, T time.
"""

import jax
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


def reducible_losses(loss: Float[Array, "*B"], irreducible: Float[Array, "*B"]) -> Float[Array, "*B"]:
    """RHO-LOSS (arXiv:2206.07137, equation 3): the loss of the current model less that of a model that was trained on
    held-out data."""
    return loss - irreducible


def top(scores: jax.Array, k: int) -> jax.Array:
    """The places of the k highest scores, [k] int32, the highest first; of equal ones the first come first."""
    return jnp.argsort(scores, descending=True, stable=True)[:k]
