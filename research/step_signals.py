"""Signals of a train step that are always measured, because they cost next to nothing: of its gradient, its update, its
batch and its predictions. What costs more is measured on demand (research/diagnosis/probes).

Nothing here is a pass over all parameters that the step doesn't make anyway: sums of squares are those of the
gradient's norm and of clipping, which XLA computes once, and what happens to parameters is measured on a sample of
them. Each metric is (sum, weight), as those of terms are.

Axes: B batch, T time, D model, N positions of a row.
"""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, UInt

from research import params as params_lib
from research import updates as updates_lib
from research.objectives.types import Batch, Forward, LossOut, next_token_targets

Metrics = dict[str, tuple[jax.Array, jax.Array]]
Tree = Any
Clips = Sequence[tuple[float, Tree]]  # (largest norm, True for the parameters that it is of), see optim.clips

GROUPS = ("embed", "attention", "mlp", "norms", "head", "adapter", "terms")
_ADAPTERS = {"lora", "vera", "ia3", "embed_lora", "prompt", "prefix", "prefix_encoder"}
_SAMPLE = 4096  # numbers of each array whose update is looked at
_ENTROPY = "prediction_entropy"  # in LossOut.metrics, until `detach` takes it out
_ROUTERS = "routers/"  # begins what of a Routing is there as well
_ROUNDING = "rounding/"  # and what `attach_rounding` adds
_PLACES = (1 / 3, 2 / 3)  # of a row's targets: where the entropy of predictions is measured


def group_of(name: str) -> str:
    """The part of a model that a parameter belongs to, one of GROUPS.

    Args:
      name: the parts of its path joined by "/", from its role on: "policy/layers/attention/q/kernel".
    """
    parts = name.split("/")
    if parts[0] == "objectives":
        return "terms"
    if _ADAPTERS.intersection(parts):
        return "adapter"
    if any("norm" in part for part in parts):
        return "norms"
    for group in ("attention", "mlp"):
        if group in parts:
            return group
    return "head" if parts[1:] and parts[1].startswith("head") else "embed"


def gradient_norms(grads: Tree) -> Metrics:
    """`grad_norm/GROUP` of each group that is trained, and of routers, the policy's `first_layer` and `last_layer`."""
    groups: dict[str, list[jax.Array]] = {}
    for name, leaf in params_lib.named_leaves(grads):
        groups.setdefault(group_of(name), []).append(leaf)
        if "router" in name.split("/"):
            groups.setdefault("router", []).append(leaf)
    layers = grads.get("policy", {}).get("layers", {}) if isinstance(grads.get("policy"), Mapping) else {}
    if jax.tree.leaves(layers):
        pieces = params_lib.layer_pieces(layers)
        groups["first_layer"] = [leaf[0] for leaf in jax.tree.leaves(pieces[0].values)]
        groups["last_layer"] = [leaf[-1] for leaf in jax.tree.leaves(pieces[-1].values)]
    return {f"grad_norm/{group}": _one(optax.tree.norm(leaves)) for group, leaves in groups.items()}


def clipped(grads: Tree, clips: Clips) -> Metrics:
    """`clipped`, 1 where clipping made the gradient shorter; nothing where no gradient is clipped."""
    cuts = []
    for largest, members in clips:
        mask = jax.tree.map(lambda _: True, grads) if members is None else members
        own = [g for g, member in zip(*map(jax.tree.leaves, (grads, mask)), strict=True) if member]
        cuts.append(optax.tree.norm(own) >= largest)
    return {"clipped": _one(jnp.any(jnp.stack(cuts)))} if cuts else {}


def update_shares(
    params: Tree, updates: Tree, axes: Tree = None, due: jax.Array | bool = True, key: jax.Array | None = None
) -> Metrics:
    """`moved`, the share of trained numbers that the update changes, and `rounded`, the share with an update that isn't
    0 and is lost when it is added. By stochastic rounding none is lost in the mean, and `rounded` is 0 of what is in
    bfloat16.

    Both are of a sample, _SAMPLE numbers of each array or so, and each array counts by its size.

    Args:
      params: what is trained, before the update.
      updates: what is added.
      axes: of each array an axis that no device holds a part of, which the sample is cut along; -1 for none, and the
        array isn't looked at. None: any axis will do.
      due: see `where`.
      key: of stochastic rounding, see updates.apply; None of rounding to the nearest.
    """
    axes = jax.tree.map(longest_axis, params) if axes is None else axes
    triples = zip(*map(jax.tree.leaves, (params, updates, axes)), strict=True)
    looked = [(p, u, axis) for p, u, axis in triples if axis >= 0 and p.size]
    if not looked:
        return {}
    sizes = np.asarray([np.prod(p.shape, dtype=np.float64) for p, _, _ in looked])

    def shares(params: Sequence[jax.Array], updates: Sequence[jax.Array]) -> Metrics:
        moved, rounded = jnp.zeros(()), jnp.zeros(())
        for p, u, (_, _, axis), size in zip(params, updates, looked, sizes / sizes.sum(), strict=True):
            p, u = _sample(p, axis), _sample(u, axis)
            own = key if p.dtype == jnp.bfloat16 else None
            same = params_lib.widened(updates_lib.added(p, u, own)) == params_lib.widened(p)
            moved += float(size) * jnp.mean(~same)
            rounded += float(size) * jnp.mean(same & (u != 0)) if own is None else 0.0
        return {"moved": _one(moved), "rounded": _one(rounded)}

    return where(due, shares, [p for p, _, _ in looked], [u for _, u, _ in looked])


def made(shares: Metrics, ok: jax.Array) -> Metrics:
    """The shares of an update that is made where `ok`; else they are 0."""
    return {name: (jnp.where(ok, share, 0), weight) for name, (share, weight) in shares.items()}


def settled(*parts: Metrics) -> jax.Array:
    """True, which depends on metrics: what is done only where it holds comes after all that they read."""
    values = [total for part in parts for total, _ in part.values()]
    return jnp.all(jnp.stack([value != jnp.inf for value in values])) if values else jnp.asarray(True)


def where(due: jax.Array | bool, measure: Callable[..., Metrics], *operands: Tree) -> Metrics:
    """Metrics of operands where they are due; else sums and weights of 0, for which nothing is computed.

    Args:
      due: a bool, which is the same on all devices.
      measure: operands -> metrics.
      operands: arrays, which aren't differentiated.
    """
    if due is True:
        return measure(*operands)
    shapes = jax.eval_shape(measure, *operands)
    nothing = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
    return jax.lax.cond(due, measure, lambda *_: nothing, *operands)


def longest_axis(x: Any) -> int:
    """The axis of an array that is longest; -1 of a scalar."""
    return int(np.argmax(x.shape)) if x.shape else -1


def free_axis(x: jax.ShapeDtypeStruct) -> int:
    """The longest of the axes of an array that no device holds a part of; -1 where there is none."""
    mesh = x.sharding.mesh
    spec = (*x.sharding.spec, *(None,) * (len(x.shape) - len(x.sharding.spec)))

    def parts(names: Any) -> int:
        return math.prod(mesh.shape[name] for name in ((names,) if isinstance(names, str) else names or ()))

    free = [axis for axis, names in enumerate(spec) if parts(names) == 1]
    return max(free, key=lambda axis: x.shape[axis], default=-1)


def of_batch(batch: Batch, reads: Iterable[str]) -> Metrics:
    """`supervised_rows`, the share of rows with something to learn, and `batch_hash`.

    Args:
      batch: whole.
      reads: the batch fields that the objective reads.
    """
    wanted = jnp.sum(supervised(batch, reads), axis=1) > 0
    real = jnp.any(batch["segment_ids"] > 0, axis=1)
    rows = jnp.sum(wanted & real).astype(jnp.float32), jnp.sum(real).astype(jnp.float32)
    return {"supervised_rows": rows, "batch_hash": (batch_hash(batch), jnp.ones((), jnp.float32))}


def supervised(batch: Batch, reads: Iterable[str]) -> Float[Array, "B T"]:
    """1 where a position has something to predict: a class, or a token that `loss_mask` marks where the objective reads
    that; else any next token."""
    reads = tuple(reads)
    if "label_probs" in reads:
        return jnp.any(batch["label_probs"] > 0, axis=-1).astype(jnp.float32)
    return next_token_targets(batch, batch["loss_mask"] if "loss_mask" in reads else None)[1]


def batch_hash(batch: Batch) -> UInt[Array, ""]:
    """A uint32 that is the same for batches of the same rows, in whatever order: of their tokens, of what is to be
    learned of them, and of where documents begin."""
    tokens, starts = batch["tokens"].astype(jnp.uint32), (batch["positions"] == 0).astype(jnp.uint32)
    mask = (batch["loss_mask"] > 0).astype(jnp.uint32) if "loss_mask" in batch else jnp.ones_like(tokens)
    place = jnp.arange(tokens.shape[1], dtype=jnp.uint32)[None] * jnp.uint32(2654435761) + jnp.uint32(1)
    mixed = (tokens * jnp.uint32(4) + mask * jnp.uint32(2) + starts) * jnp.uint32(2246822519)
    row = _scrambled(jnp.sum(_scrambled(mixed ^ place), axis=1, dtype=jnp.uint32))
    return jnp.sum(row, dtype=jnp.uint32)


def attach(
    outs: Mapping[str, LossOut], forward: Forward, reads: Iterable[str], due: jax.Array | bool = True
) -> dict[str, LossOut]:
    """The terms' sums with the entropy of the policy's predictions at some targets of each row, where it has made a
    pass that predicts next tokens, and what its routers did in a pass.

    Args:
      outs: of the terms.
      forward: their passes.
      reads: the batch fields that the objective reads.
      due: see `where`.
    """
    hidden, model = forward.made("policy"), forward.models.get("policy")
    if hidden is not None and model.config.num_experts:
        routing = jax.lax.stop_gradient(forward.routing("policy"))
        sums = jax.tree.map(lambda y: (jnp.sum(y, axis=1), jnp.ones(())), routing._asdict())
        sums["choices"] = model.config.experts_per_token * jnp.sum(routing.tokens), jnp.ones(())
        name, out = next(iter(outs.items()))
        routers = {_ROUTERS + part: value for part, value in sums.items()}
        outs = {**outs, name: out._replace(metrics={**out.metrics, **routers})}
    if hidden is None or model.config.num_labels or not model.config.causal:
        return dict(outs)

    def entropy(hidden: jax.Array, head: Any, batch: Batch) -> Metrics:
        chosen, weights = _places(supervised(batch, reads))
        at = jnp.einsum("bnt,btd->bnd", chosen.astype(hidden.dtype), hidden)
        log_probs = jax.nn.log_softmax(head.logits(at).astype(jnp.float32), axis=-1)
        values = -jnp.sum(jnp.exp(log_probs) * log_probs, axis=-1)
        return {_ENTROPY: (jnp.sum(jnp.where(weights > 0, values, 0)), jnp.sum(weights))}

    metrics = where(due, entropy, *jax.lax.stop_gradient((hidden, forward.head())), forward.batch)
    name, out = next(iter(outs.items()))
    return {**outs, name: out._replace(metrics={**out.metrics, **metrics})}


def attach_rounding(outs: Mapping[str, LossOut], counts: Tree) -> dict[str, LossOut]:
    """The terms' sums with how much products in 8 bits lost, of inputs and of gradients: `underflow`, the share of
    numbers that are rounded to 0, and `saturated`, the share that get the largest code.

    Args:
      outs: of the terms.
      counts: arrays [L, low_precision.COUNTS], gradients of probes; none without such products.
    """
    leaves = jax.tree.leaves(counts)
    if not leaves:
        return dict(outs)
    totals = sum(jnp.sum(x, axis=0) for x in leaves)
    metrics = {}
    for what, (lost, full, there) in (("inputs", totals[:3]), ("gradients", totals[3:])):
        metrics |= {f"{_ROUNDING}underflow/{what}": (lost, there), f"{_ROUNDING}saturated/{what}": (full, there)}
    name, out = next(iter(outs.items()))
    return {**outs, name: out._replace(metrics={**out.metrics, **metrics})}


def detach(outs: Mapping[str, LossOut]) -> tuple[dict[str, LossOut], Metrics]:
    """The terms' sums without what `attach` and `attach_rounding` added, and that as metrics: `entropy`, those of
    `of_routers`, and what 8 bits lost."""
    kept, seen = {}, {}
    for name, out in outs.items():
        metrics = dict(out.metrics)
        routers = {part: metrics.pop(part)[0] for part in out.metrics if part.startswith(_ROUTERS)}
        if routers:
            seen |= of_routers(*(routers[_ROUTERS + part] for part in ("counts", "entropies", "tokens", "choices")))
        seen |= {part.removeprefix(_ROUNDING): metrics.pop(part) for part in out.metrics if part.startswith(_ROUNDING)}
        if _ENTROPY in metrics:
            seen["entropy"] = metrics.pop(_ENTROPY)
        kept[name] = out._replace(metrics=metrics)
    return kept, seen


def of_routers(
    counts: Float[Array, "L E"], entropies: Float[Array, " L"], tokens: Float[Array, " L"], choices: Float[Array, ""]
) -> Metrics:
    """What routers did with a batch: `router/entropy` of their probabilities, in nats; `router/largest_load` and
    `router/smallest_load`, of any layer's expert, where 1 is even; and `router/dropped`, the share of choices that
    reach no expert.

    Args:
      counts, entropies, tokens: of a Routing, summed over the batch.
      choices: how often an expert was chosen in all layers.
    """
    loads = counts * counts.shape[1] / jnp.maximum(jnp.sum(counts, axis=1, keepdims=True), 1)
    return {
        "router/entropy": (jnp.sum(entropies), jnp.sum(tokens)),
        "router/largest_load": _one(jnp.max(loads)),
        "router/smallest_load": _one(jnp.min(loads)),
        "router/dropped": (choices - jnp.sum(counts), choices),
    }


def _places(weights: Float[Array, "B T"]) -> tuple[Float[Array, "B N T"], Float[Array, "B N"]]:
    """One-hot places of a row's targets at _PLACES of their count, and 1 for each that is there."""
    count = jnp.cumsum(weights > 0, axis=1)
    wanted = jnp.ceil(count[:, -1:].astype(jnp.float32) * jnp.asarray(_PLACES)[None]).astype(count.dtype)
    chosen = (count[:, None, :] == wanted[:, :, None]) & (weights > 0)[:, None, :]
    return chosen.astype(jnp.float32), jnp.any(chosen, axis=-1).astype(jnp.float32)


def _sample(x: jax.Array, axis: int) -> jax.Array:
    """Every k-th part of an array along an axis, so that about _SAMPLE numbers are left."""
    stride = min(max(x.size // _SAMPLE, 1), x.shape[axis])
    return jax.lax.slice_in_dim(x, stride // 2, x.shape[axis], stride, axis)


def _scrambled(x: UInt[Array, "*n"]) -> UInt[Array, "*n"]:
    """Bits of a uint32 that look drawn by chance (the finaliser of MurmurHash3, Appleby 2008)."""
    x = (x ^ (x >> jnp.uint32(16))) * jnp.uint32(0x85EBCA6B)
    x = (x ^ (x >> jnp.uint32(13))) * jnp.uint32(0xC2B2AE35)
    return x ^ (x >> jnp.uint32(16))


def _one(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    return jnp.asarray(x, jnp.float32), jnp.ones((), jnp.float32)
