"""Model FLOPs of a token: what a pass and its gradient must compute, whatever is recomputed or computed in vain.

Counted are the products of linear maps and of attention (PaLM, arXiv:2204.02311, appendix B); the embedding's look-up
is none. A map of N weights takes 2 N forward, 2 N for the gradient by its input and 2 N for that by its weights. The
gradient by weights is of those that are trained; that by inputs is needed from the lowest trained layer on: what lies
below has none. Attention takes 2 N forward and 4 N backward where N = 2 H h and the keys that a query sees.
"""

import math
from typing import Any, NamedTuple

import jax
import numpy as np

from research import params as params_lib
from research.models.config import ModelConfig
from research.models.specs import Params, make_specs

_AFTER = ("final_norm", "head_transform", "head", "head_bias", "head_added", "head_bias_added")  # the layers


class Flops(NamedTuple):
    """Of a token's forward pass, and of its gradient."""

    forward: float
    backward: float = 0.0

    @property
    def total(self) -> float:
        return self.forward + self.backward


def of_training(c: ModelConfig, length: int) -> float:
    """FLOPs of a token in sequences of `length` tokens where all of the model is trained."""
    specs = make_specs(c)
    return per_token(c, specs, params_lib.tree_map(lambda _: True, specs), length).total


def per_token(c: ModelConfig, specs: Params, trained: Params | None, length: int, prefix: int = 0) -> Flops:
    """FLOPs of a token in sequences of `length` tokens.

    What an adapter computes once a step isn't counted: the embeddings of a p_tuning, the keys of a projected prefix,
    the norms of DoRA.

    Args:
      c: the model's config.
      specs: its parameters, with what an adapter puts beside them, none of them quantised. Its layers may lie in pieces
        (params.cut).
      trained: True for those that are trained; None for none.
      length: windows are counted at their size.
      prefix: keys that each query sees besides (an adapter's).
    """
    trained = params_lib.tree_map(lambda _: False, specs) if trained is None else trained
    forward, backward = _embedding(specs, trained)
    below = any(_any(part) for name, part in trained.items() if name not in ("layers", *_AFTER))
    for first, stop, values in params_lib.layer_pieces(specs["layers"]):
        whole = values is specs["layers"]
        mask = (
            trained["layers"]
            if whole
            else next(trained["layers"][name] for name, piece in specs["layers"].items() if piece is values)
        )
        weights, own, trains = _weights(c, values, mask)
        keys = np.array([_keys(c, layer, length) + prefix for layer in range(first, stop)])
        attention = 4.0 * c.num_heads * c.dim_per_head * keys
        reached = np.logical_or.accumulate(trains) | below
        forward += float(np.sum(2 * weights + attention))
        backward += float(np.sum(2 * own + (2 * weights + 2 * attention) * reached))
        below = bool(reached[-1])
    last = _head(c, specs, trained, below)
    return Flops(forward + last.forward, backward + last.backward)


def _embedding(specs: Params, trained: Params) -> Flops:
    """Of a low-rank part of the embedding: its `a` is looked up."""
    if "embed_lora" not in specs:
        return Flops(0.0)
    weights = params_lib.count([specs["embed_lora"]["b"]])
    return Flops(2.0 * weights, 4.0 * weights * _any(trained["embed_lora"]))


def _head(c: ModelConfig, specs: Params, trained: Params, below: bool) -> Flops:
    """Of what follows the layers; `below`: whether something before is trained."""
    below |= _any(trained.get("final_norm", False))
    transform = c.d_model**2 * c.head_transform
    moved = _any(trained.get("head_transform", {}))
    backward = 2.0 * transform * (below + moved)
    head, name = c.d_model * (c.num_labels or c.vocab_size), "head" if "head" in specs else "embed"
    added = f"{name}_added"
    own = head * _any(trained[name])
    if added in specs and not own:
        own = math.prod(specs[added].shape) * _any(trained[added])
    return Flops(2.0 * (head + transform), backward + 2.0 * head * (below or moved) + 2.0 * own)


def _keys(c: ModelConfig, layer: int, length: int) -> float:
    """How many keys a query of a layer sees, on average."""
    window = min(c.sliding_window[layer % len(c.sliding_window)] or length, length)
    return window * (1 - window / (2 * length)) if c.causal else float(window)


def _weights(c: ModelConfig, specs: Params, trained: Params) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Of each layer of a stack: weights of the linear maps that a token meets, those of them that are trained, and
    whether anything is."""
    share = c.experts_per_token / max(c.num_experts, 1)
    masks = jax.tree.leaves(trained)
    leaves = jax.tree_util.tree_leaves_with_path(specs, is_leaf=params_lib.is_spec)
    n = leaves[0][1].shape[0]
    weights, own, trains = np.full(n, _shared(specs) / n), np.zeros(n), np.zeros(n, bool)
    for (path, spec), mask in zip(leaves, masks, strict=True):
        numbers = math.prod(spec.shape[1:]) - np.array(spec.padding or (0,) * n)
        trains |= (numbers > 0) & mask
        if spec.contracts and "prefix" not in params_lib.path_name(path).split("/"):  # whose keys are no map
            size = numbers * (share if spec.axes[:2] == ("layers", "experts") else 1.0)
            weights, own = weights + size, own + size * mask
    return weights, own, trains


def _shared(node: Any) -> float:
    """Weights of VeRA's random matrices as the maps of all layers read them: ranks times inputs and outputs."""
    if not isinstance(node, dict):
        return 0.0
    if "vera" not in node:
        return sum(_shared(part) for part in node.values())
    kernel, rank = node["kernel"], node["vera"]["d"].shape[-1]
    axes = list(zip(kernel.shape, kernel.axes, strict=True))[1:]
    ins = math.prod(size for size, axis in axes if axis in kernel.contracts)
    return float(kernel.shape[0] * rank * (ins + math.prod(kernel.shape[1:]) // ins))


def _any(mask: Any) -> bool:
    return any(jax.tree.leaves(mask))
