"""Mixture of experts: each token goes through the few experts that its router chooses, none is dropped.

Axes: N tokens, I and O what goes into and out of a product, D model, F feed-forward, E experts, k experts per token,
L layers.
"""

import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import PartitionSpec
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


class Routing(NamedTuple):
    """What routers did with the tokens of each row; padding counts in none of it. All are float32, [B, ...] of a layer
    and [L, B, ...] of several.

    Attributes:
      counts: [L, B, E], how many tokens went to each expert. It has no gradient.
      probabilities: [L, B, E], the sum over tokens of the experts' probabilities.
      squares: [L, B], the sum over tokens of logsumexp(logits)^2.
      entropies: [L, B], the sum over tokens of the entropy of the probabilities, in nats.
      tokens: [L, B], how many tokens there are.
    """

    counts: Float[Array, "*L B E"]
    probabilities: Float[Array, "*L B E"]
    squares: Float[Array, "*L B"]
    entropies: Float[Array, "*L B"]
    tokens: Float[Array, "*L B"]


def routing(logits: Float[Array, "B T E"], experts: Int[Array, "B T k"], real: Float[Array, "B T"]) -> Routing:
    """The sums of a layer.

    Args:
      logits: of the router, float32.
      experts: of `route`.
      real: 1 where there is a token, 0 at padding.
    """
    logs = jax.nn.log_softmax(logits, axis=-1)
    probabilities = jnp.exp(logs)
    chosen = jnp.sum(jax.nn.one_hot(experts, logits.shape[-1], dtype=jnp.float32), axis=2)
    return Routing(
        counts=jnp.einsum("bt,bte->be", real, chosen),
        probabilities=jnp.einsum("bt,bte->be", real, probabilities),
        squares=jnp.sum(real * jnp.square(jax.nn.logsumexp(logits, axis=-1)), axis=1),
        entropies=-jnp.einsum("bt,bte,bte->b", real, probabilities, logs),
        tokens=jnp.sum(real, axis=1),
    )


def load_balance(
    counts: Float[Array, "L E"], tokens: Float[Array, ""], probabilities: Float[Array, "L E"], pooled: bool = False
) -> Float[Array, ""]:
    """The load-balancing loss, E sum_e f_e P_e, summed over the tokens that `probabilities` are of: f_e is the share of
    tokens that go to expert e, P_e the mean of its probability (Switch Transformer, arXiv:2101.03961, equations 4-6).

    A token goes to k experts, so that the shares add up to k, as in Mixtral of transformers. Of a layer the mean is k
    where all loads are even, and at most E. It is linear in the probabilities, and so are sums over parts of a batch.

    Args:
      counts: of each layer and expert, over the whole batch; constants.
      tokens: how many tokens the counts are of.
      probabilities: sums of each layer and expert over tokens: of the whole batch, or of a part of it.
      pooled: loads and probabilities are means over all layers, as in transformers' load_balancing_loss_func, where
        one layer may make up for another; else the loss is the mean of the layers'.
    """
    shares = jax.lax.stop_gradient(counts) / jnp.maximum(tokens, 1)
    if pooled:
        shares, probabilities = (jnp.mean(y, axis=0, keepdims=True) for y in (shares, probabilities))
    return shares.shape[1] * jnp.mean(jnp.sum(shares * probabilities, axis=1))


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

    One device's experts may be chosen for all tokens of a group of n devices, for which there must be room. So a group
    takes its tokens in n turns: each turn's are at most as many as a device has itself, k times, which is what it would
    meet in all if loads were even. The backward pass computes a turn again.

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

    held = {**rules, "embed": None, "mlp": inner}
    specs = jax.tree.map(lambda axes: sharding.partition(axes, held), kernels, is_leaf=lambda x: isinstance(x, tuple))

    def local(x: Array, weights: Array, experts: Array, params: PyTree) -> Array:
        if parts > 1:
            params = jax.tree.map(lambda w, spec: _varying(w, spec, rows), params, specs)
        first = 0 if whole or not split else jax.lax.axis_index(split) * (num_experts // parts)

        def turn(params: PyTree, tokens: tuple[Array, Array, Array]) -> Array:
            if gathered and not whole:
                tokens = tuple(jax.lax.all_gather(y, gathered, tiled=True) for y in tokens)
            y = mixture(*tokens, num_experts // parts, functools.partial(apply, params), first)
            return jax.lax.psum_scatter(y, gathered, tiled=True) if gathered and not whole else y

        y = _in_turns(turn, params, tuple(y.reshape(-1, y.shape[2]) for y in (x, weights, experts)), parts)
        return (jax.lax.psum(y, added) if added and not whole else y).reshape(x.shape)

    if whole:  # no mesh, or a batch too small for it: the partitioner does what it can
        return local(x, weights, experts, params)
    return jax.shard_map(local, in_specs=(rows, rows, rows, specs), out_specs=rows)(x, weights, experts, params)


def _in_turns(
    f: Callable[[PyTree, tuple[Array, ...]], Float[Array, "m D"]],
    params: PyTree,
    tokens: tuple[Array, ...],
    turns: int,
) -> Float[Array, "n D"]:
    """f(params, tokens), whose tokens [n, ...] go through it in so many turns, or as many as cut them evenly."""
    size = tokens[0].shape[0]
    turns = next(n for n in range(min(turns, size), 0, -1) if size % n == 0)
    if turns == 1:
        return f(params, tokens)
    parts = tuple(y.reshape(turns, size // turns, *y.shape[1:]) for y in tokens)
    y = jax.lax.scan(lambda _, part: (None, jax.checkpoint(f)(params, part)), None, parts)[1]
    return y.reshape(size, -1)


def _varying(x: Array, spec: PartitionSpec, rows: PartitionSpec) -> Array:
    """x, which the mesh cuts as `spec` says, as one that may differ along all axes that cut `rows`: its gradient is
    then added up over devices once, and not in every turn of a loop."""
    missing = tuple(sorted(_axes(rows) - _axes(spec)))
    return jax.lax.pcast(x, missing, to="varying") if missing else x


def _axes(spec: PartitionSpec) -> set[str]:
    """The mesh axes that cut anything."""
    return {axis for entry in spec for axis in sharding.mesh_axes(entry)}
