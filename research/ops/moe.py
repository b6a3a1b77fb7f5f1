"""Mixture of experts: each token goes through the few experts that its router chooses, none is dropped.

Axes: N tokens, D model, F feed-forward, E experts, k experts per token.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp

Linear = Callable[[jax.Array, jax.Array], jax.Array]


def route(logits: jax.Array, k: int, normalize: bool) -> tuple[jax.Array, jax.Array]:
    """Softmax over the experts, then the k likeliest (Mixtral, arXiv:2401.04088, section 2.1).

    Args:
      logits: [N, E] float32.
      k: experts per token.
      normalize: make the chosen probabilities add up to 1.

    Returns:
      weights: [N, k] float32.
      experts: [N, k] int32.
    """
    weights, experts = jax.lax.top_k(jax.nn.softmax(logits, axis=1), k)
    if normalize:
        weights = weights / jnp.sum(weights, axis=1, keepdims=True)
    return weights, experts


def mixture(
    x: jax.Array,
    weights: jax.Array,
    experts: jax.Array,
    num_experts: int,
    apply: Callable[[Linear, jax.Array], jax.Array],
) -> jax.Array:
    """Sum over each token's experts of weight * expert(x).

    Tokens are sorted by expert, so that an expert's weights meet all its tokens in one product (as in MegaBlocks,
    arXiv:2211.15841).

    Args:
      x: [N, D].
      weights, experts: of `route`.
      num_experts: E.
      apply: (linear, x [M, D]) -> [M, D], the network of an expert. It multiplies by `linear(y, kernel)`, y [M, in]
        and kernel [E, in, out], which picks the kernel of each row's expert.

    Returns:
      [N, D] in x.dtype.
    """
    N, k = experts.shape
    chosen = experts.reshape(-1)
    order = jnp.argsort(chosen, stable=True)
    sizes = jnp.bincount(chosen, length=num_experts).astype(jnp.int32)

    def linear(y: jax.Array, kernel: jax.Array) -> jax.Array:
        return jax.lax.ragged_dot(y, kernel.astype(y.dtype), sizes)

    y = apply(linear, x[order // k])
    y = y * weights.reshape(-1)[order].astype(y.dtype)[:, None]
    return jnp.zeros_like(y).at[order].set(y).reshape(N, k, -1).sum(axis=1)
