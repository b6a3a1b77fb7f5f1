"""The parameters of a model: a ParamSpec for each array of its pytree."""

from typing import Any

import jax

from research.models.config import MLPS, ModelConfig
from research.params import ParamSpec

Params = Any  # a pytree of arrays in the shape of the specs


def make_specs(c: ModelConfig) -> Params:
    """Shapes, logical axes and initial values. Kernels that write to the residual stream start at std / sqrt(2 L)
    (Radford et al. 2019), so that the stream's variance doesn't grow with depth."""
    normal = jax.nn.initializers.normal(c.init_std)
    residual = jax.nn.initializers.normal(c.init_std / (2 * c.num_layers) ** 0.5)
    zeros, ones = jax.nn.initializers.zeros, jax.nn.initializers.constant(1.0 - c.norm_offset)
    L, D, H, K, h, F, V = (
        c.num_layers,
        c.d_model,
        c.num_heads,
        c.num_kv_heads,
        c.dim_per_head,
        c.d_ff,
        c.vocab_size,
    )

    def linear(shape, axes, contracts, bias, init=normal, stack=(("layers", L),)):
        """A stacked kernel, and its bias on the axes that aren't contracted."""
        names, sizes = tuple(n for n, _ in stack), tuple(s for _, s in stack)
        spec = {"kernel": ParamSpec((*sizes, *shape), (*names, *axes), init, contracts)}
        if bias:
            out = [(n, a) for n, a in zip(shape, axes, strict=True) if a not in contracts]
            spec["bias"] = ParamSpec((*sizes, *(n for n, _ in out)), (*names, *(a for _, a in out)), zeros)
        return spec

    def norm(*shape, axes=("layers", "embed_replicated"), kind=c.norm):
        spec = {"scale": ParamSpec(shape, axes, ones)}
        if kind == "layernorm":
            spec["bias"] = ParamSpec(shape, axes, zeros)
        return spec

    attention = {
        "q": linear((D, H, h), ("embed", "heads", "head_dim"), ("embed",), c.attention_bias),
        "k": linear((D, K, h), ("embed", "kv_heads", "head_dim"), ("embed",), c.attention_bias),
        "v": linear((D, K, h), ("embed", "kv_heads", "head_dim"), ("embed",), c.attention_bias),
        "o": linear((H, h, D), ("heads", "head_dim", "embed"), ("heads", "head_dim"), c.attention_out_bias, residual),
    }
    if c.qk_norm == "head":
        for name in ("q_norm", "k_norm"):
            attention[name] = norm(L, h, axes=("layers", "head_dim"), kind="rmsnorm")
    elif c.qk_norm == "full":
        attention["q_norm"] = norm(L, H, h, axes=("layers", "heads", "head_dim"), kind="rmsnorm")
        attention["k_norm"] = norm(L, K, h, axes=("layers", "kv_heads", "head_dim"), kind="rmsnorm")

    stack = (("layers", L), *((("experts", c.num_experts),) if c.num_experts else ()))
    mlp = {
        "up": linear((D, F), ("embed", "mlp"), ("embed",), c.mlp_bias, stack=stack),
        "down": linear((F, D), ("mlp", "embed"), ("mlp",), c.mlp_bias, residual, stack),
    }
    if MLPS[c.mlp][1]:
        mlp["gate"] = linear((D, F), ("embed", "mlp"), ("embed",), c.mlp_bias, stack=stack)
    if c.num_experts:
        mlp["router"] = linear((D, c.num_experts), ("embed", "experts"), ("embed",), bias=False)

    layers = {"attention_norm": norm(L, D), "attention": attention, "mlp_norm": norm(L, D), "mlp": mlp}
    if c.block == "sandwich":
        layers |= {"attention_post_norm": norm(L, D), "mlp_post_norm": norm(L, D)}

    alone = ("embed_replicated",)
    specs = {"embed": ParamSpec((V, D), ("vocab", "embed"), normal, ("vocab",)), "layers": layers}
    if c.positions == "learned":
        specs["position_embed"] = ParamSpec((c.max_length, D), ("positions", "embed"), normal, ("positions",))
    if c.token_types:
        specs["token_type_embed"] = ParamSpec((c.token_types, D), ("token_types", "embed"), normal, ("token_types",))
    if c.embed_norm:
        specs["embed_norm"] = norm(D, axes=alone)
    if c.block != "residual":
        specs["final_norm"] = norm(D, axes=alone)
    if c.head_transform:
        dense = linear((D, D), ("embed", "embed_replicated"), ("embed",), bias=True, stack=())
        specs["head_transform"] = {"dense": dense, "norm": norm(D, axes=alone)}
    columns, axis = (c.num_labels, "labels") if c.num_labels else (V, "vocab")
    if c.num_labels or not c.tie_embeddings:
        specs["head"] = ParamSpec((D, columns), ("embed", axis), normal, ("embed",))
    if c.head_bias:
        specs["head_bias"] = ParamSpec((columns,), (axis,), zeros)
    return specs
