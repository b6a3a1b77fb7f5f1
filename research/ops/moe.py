"""Mixture of experts: each token goes through the few experts that its router chooses, none is dropped.

Axes: N tokens, D model, F feed-forward, E experts, k experts per token.
"""

import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from research.devices import sharding

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
    first: jax.Array | int = 0,
) -> jax.Array:
    """Sum over each token's experts of weight * expert(x).

    Tokens are sorted by expert, so that an expert's weights meet all its tokens in one product (as in MegaBlocks,
    arXiv:2211.15841).

    Args:
      x: [N, D].
      weights, experts: of `route`.
      num_experts: E, of those at hand: numbers `first` to `first` + E - 1. The others add nothing.
      apply: (linear, x [M, D]) -> [M, D], the network of an expert. It multiplies by `linear(y, kernel)`, y [M, in]
        and kernel [E, in, out], which picks the kernel of each row's expert.
      first: number of the first expert at hand.

    Returns:
      [N, D] in x.dtype.
    """
    N, k = experts.shape
    chosen = experts.reshape(-1) - first
    here = (chosen >= 0) & (chosen < num_experts)
    chosen = jnp.where(here, chosen, num_experts)  # what another device does comes last
    order = jnp.argsort(chosen, stable=True)
    sizes = jnp.bincount(chosen, length=num_experts).astype(jnp.int32)

    def linear(y: jax.Array, kernel: jax.Array) -> jax.Array:
        return checkpoint_name(jax.lax.ragged_dot(y, kernel.astype(y.dtype), sizes), "linear")

    y = apply(linear, x[order // k])
    weights = jnp.where(here, weights.reshape(-1), 0)[order].astype(y.dtype)
    y = jnp.where(here[order][:, None], y, 0) * weights[:, None]
    return jnp.zeros_like(y).at[order].set(y).reshape(N, k, -1).sum(axis=1)


def sharded_mixture(
    x: jax.Array,
    weights: jax.Array,
    experts: jax.Array,
    num_experts: int,
    params: Any,
    apply: Callable[[Any, Linear, jax.Array], jax.Array],
    *,
    kernels: Any,
    rules: Mapping[str, Any],
) -> jax.Array:
    """`mixture` under the mesh in context, where every device sorts no tokens but its own.

    Where mesh axes cut the experts (expert parallelism), the devices along them gather each other's tokens, each does
    what its experts are chosen for, and the sums go back to where the tokens came from (a reduce-scatter): no token is
    dropped. Where others cut F, each has a part of every expert, and the parts are added up. What cuts D is gathered.

    Args:
      x: [B, T, D].
      weights, experts: [B, T, k], of `route`.
      num_experts: E.
      params: pytree of kernels [E, in, out].
      apply: (params, linear, x [M, D]) -> [M, D], see `mixture`.
      kernels: as `params`, the logical axes of each kernel.
      rules: logical axis -> mesh axes.

    Returns:
      [B, T, D], as x.
    """
    rows = sharding.partition(("batch", "time", None), rules)
    whole = jax.sharding.get_abstract_mesh().empty or any(
        n % sharding.num_parts(axes) for n, axes in zip(x.shape, rows, strict=True)
    )
    batch, split, inner = (sharding.mesh_axes(rules[name]) for name in ("batch", "experts", "mlp"))
    gathered = tuple(axis for axis in split if axis in batch)
    added = (*inner, *(axis for axis in split if axis not in batch))
    parts = 1 if whole else sharding.num_parts(split)

    def local(x: jax.Array, weights: jax.Array, experts: jax.Array, params: Any) -> jax.Array:
        if gathered and not whole:
            x, weights, experts = (jax.lax.all_gather(y, gathered, tiled=True) for y in (x, weights, experts))
        first = 0 if whole or not split else jax.lax.axis_index(split) * (num_experts // parts)
        each = (y.reshape(-1, y.shape[2]) for y in (x, weights, experts))
        y = mixture(*each, num_experts // parts, functools.partial(apply, params), first).reshape(x.shape)
        if added and not whole:
            y = jax.lax.psum(y, added)
        return jax.lax.psum_scatter(y, gathered, tiled=True) if gathered and not whole else y

    if whole:  # no mesh, or a batch too small for it: the partitioner does what it can
        return local(x, weights, experts, params)
    held = {**rules, "embed": None}
    specs = jax.tree.map(lambda axes: sharding.partition(axes, held), kernels, is_leaf=lambda x: isinstance(x, tuple))
    return jax.shard_map(local, in_specs=(rows, rows, rows, specs), out_specs=rows)(x, weights, experts, params)
