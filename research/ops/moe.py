"""Mixture of experts: each token goes through the few experts that its router chooses, none is dropped.

Axes: N tokens, I and O what goes into and out of a product, D model, F feed-forward, E experts, k experts per token.
"""

import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, Int, PyTree

from research.devices import sharding
from research.ops import quantized

Linear = Callable[[Float[Array, "M I"], Float[Array, "E I O"]], Float[Array, "M O"]]


def route(logits: Float[Array, "N E"], k: int, normalize: bool) -> tuple[Float[Array, "N k"], Int[Array, "N k"]]:
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
    x: Float[Array, "N D"],
    weights: Float[Array, "N k"],
    experts: Int[Array, "N k"],
    num_experts: int,
    apply: Callable[[Linear, Float[Array, "M D"]], Float[Array, "M D"]],
    first: Int[Array, ""] | int = 0,
) -> Float[Array, "N D"]:
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
    expert = experts.reshape(-1) - first
    here = (expert >= 0) & (expert < num_experts)
    expert = jnp.where(here, expert, num_experts)  # what another device does comes last
    order = jnp.argsort(expert, stable=True)
    sizes = jnp.bincount(expert, length=num_experts).astype(jnp.int32)

    def linear(y: Float[Array, "M I"], kernel: Float[Array, "E I O"]) -> Float[Array, "M O"]:
        return checkpoint_name(quantized.product_by_expert(y, kernel, sizes), "linear")

    y = apply(linear, x[order // k])
    weights = jnp.where(here, weights.reshape(-1), 0)[order].astype(y.dtype)
    y = jnp.where(here[order][:, None], y, 0) * weights[:, None]
    return jnp.zeros_like(y).at[order].set(y).reshape(N, k, -1).sum(axis=1)


def sharded_mixture(
    x: Float[Array, "B T D"],
    weights: Float[Array, "B T k"],
    experts: Int[Array, "B T k"],
    num_experts: int,
    params: PyTree[Float[Array, "E I O"]],
    apply: Callable[[PyTree, Linear, Float[Array, "M D"]], Float[Array, "M D"]],
    *,
    kernels: PyTree,
    rules: Mapping[str, Any],
) -> Float[Array, "B T D"]:
    """`mixture` under the mesh in context, where every device sorts no tokens but its own.

    Where mesh axes cut the experts (expert parallelism), the devices along them gather each other's tokens, each does
    what its experts are chosen for, and the sums go back to where the tokens came from (a reduce-scatter): no token is
    dropped. Where others cut F, each has a part of every expert, and the parts are added up. What cuts D is gathered.

    Args:
      x: [B, T, D].
      weights, experts: [B, T, k], of `route`.
      num_experts: E.
      params: pytree of kernels [E, in, out], which may be quantised, without groups of scales.
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
    inner = tuple(axis for axis in inner if axis not in batch)  # along those, devices have tokens of their own
    added = (*inner, *(axis for axis in split if axis not in batch))
    parts = 1 if whole else sharding.num_parts(split)

    def local(x: Array, weights: Array, experts: Array, params: PyTree) -> Array:
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
    held = {**rules, "embed": None, "mlp": inner}
    specs = jax.tree.map(lambda axes: sharding.partition(axes, held), kernels, is_leaf=lambda x: isinstance(x, tuple))
    return jax.shard_map(local, in_specs=(rows, rows, rows, specs), out_specs=rows)(x, weights, experts, params)
