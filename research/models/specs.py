"""The parameters of a model: a ParamSpec for each array, with the logical axes beside its shape.

Axes: L layers, D model, H query heads, K key/value heads, h head dimension, F feed-forward, E experts, V vocabulary,
n added tokens.
"""

from typing import Any

import jax

from research.models.config import ModelConfig
from research.params import Initializer, ParamSpec

Params = Any  # a pytree of arrays in the shape of the specs
Specs = dict[str, Any]  # a pytree of ParamSpecs


def make_specs(c: ModelConfig) -> Specs:
    """Returns shapes, logical axes and initial values of all parameters.

    Kernels that write to the residual stream start at init_std / sqrt(2 L) (Radford et al. 2019), so that the stream's
    variance doesn't grow with depth.
    """
    return {"layers": _layers(c), **_embeddings(c), **_head(c)}


def _layers(c: ModelConfig) -> Specs:
    names = ["attention_norm", "mlp_norm"]
    if c.block == "sandwich":
        names += ["attention_post_norm", "mlp_post_norm"]
    norms = {name: _norm(c, (c.num_layers, c.d_model), ("layers", "embed_replicated")) for name in names}
    return {"attention": _attention(c), "mlp": _mlp(c), **norms}


def _attention(c: ModelConfig) -> Specs:
    L, D, H, K, h = c.num_layers, c.d_model, c.num_heads, c.num_kv_heads, c.dim_per_head
    q = ParamSpec((L, D, H, h), ("layers", "embed", "heads", "head_dim"), _normal(c), ("embed",))
    kv = ParamSpec((L, D, K, h), ("layers", "embed", "kv_heads", "head_dim"), _normal(c), ("embed",))
    o = ParamSpec((L, H, h, D), ("layers", "heads", "head_dim", "embed"), _residual(c), ("heads", "head_dim"))
    specs = {
        "q": _linear(q, c.attention_bias),
        "k": _linear(kv, c.attention_bias),
        "v": _linear(kv, c.attention_bias),
        "o": _linear(o, c.attention_out_bias),
    }
    if c.qk_norm == "head":
        scale = {"scale": ParamSpec((L, h), ("layers", "head_dim"), _ones(c))}
        specs |= {"q_norm": scale, "k_norm": scale}
    elif c.qk_norm == "full":
        specs["q_norm"] = {"scale": ParamSpec((L, H, h), ("layers", "heads", "head_dim"), _ones(c))}
        specs["k_norm"] = {"scale": ParamSpec((L, K, h), ("layers", "kv_heads", "head_dim"), _ones(c))}
    return specs


def _mlp(c: ModelConfig) -> Specs:
    L, D, F, E = c.num_layers, c.d_model, c.d_ff, c.num_experts
    sizes, stack = ((L, E), ("layers", "experts")) if E else ((L,), ("layers",))
    up = ParamSpec((*sizes, D, F), (*stack, "embed", "mlp"), _normal(c), ("embed",))
    down = ParamSpec((*sizes, F, D), (*stack, "mlp", "embed"), _residual(c), ("mlp",))
    specs = {"up": _linear(up, c.mlp_bias), "down": _linear(down, c.mlp_bias)}
    if c.gated:
        specs["gate"] = _linear(up, c.mlp_bias)
    if E:
        router = ParamSpec((L, D, E), ("layers", "embed", "experts"), _normal(c), ("embed",))
        specs["router"] = _linear(router, bias=False)
    return specs


def _embeddings(c: ModelConfig) -> Specs:
    D, V, P, N = c.d_model, c.vocab_size, c.max_length, c.token_types
    specs: Specs = {"embed": ParamSpec((V, D), ("vocab", "embed"), _normal(c), ("vocab",))}
    if n := c.added_rows:
        specs["embed_added"] = ParamSpec((n, D), ("added_tokens", "embed"), _normal(c), ("added_tokens",))
    if c.positions == "learned":
        specs["position_embed"] = ParamSpec((P, D), ("positions", "embed"), _normal(c), ("positions",))
    if c.token_types:
        specs["token_type_embed"] = ParamSpec((N, D), ("token_types", "embed"), _normal(c), ("token_types",))
    if c.embed_norm:
        specs["embed_norm"] = _norm(c, (D,), ("embed_replicated",))
    return specs


def _head(c: ModelConfig) -> Specs:
    """What comes after the layers. A head of one number, a reward or a value, begins near 0 (OpenRLHF's scale)."""
    D = c.d_model
    columns, axis = (c.num_labels, "labels") if c.num_labels else (c.vocab_size, "vocab")
    specs: Specs = {}
    if c.block != "residual":
        specs["final_norm"] = _norm(c, (D,), ("embed_replicated",))
    if c.head_transform:
        dense = ParamSpec((D, D), ("embed", "embed_replicated"), _normal(c), ("embed",))
        specs["head_transform"] = {"dense": _linear(dense, bias=True), "norm": _norm(c, (D,), ("embed_replicated",))}
    if c.num_labels or not c.tie_embeddings:
        initial = jax.nn.initializers.normal(1 / (D + 1)) if c.num_labels == 1 else _normal(c)
        specs["head"] = ParamSpec((D, columns), ("embed", axis), initial, ("embed",))
    if c.head_bias:
        specs["head_bias"] = ParamSpec((columns,), (axis,), jax.nn.initializers.zeros)
    if (n := c.added_rows) and not c.num_labels:
        if not c.tie_embeddings:
            specs["head_added"] = ParamSpec((D, n), ("embed", "added_tokens"), _normal(c), ("embed",))
        if c.head_bias:
            specs["head_bias_added"] = ParamSpec((n,), ("added_tokens",), jax.nn.initializers.zeros)
    return specs


def _linear(kernel: ParamSpec, bias: bool) -> Specs:
    """A kernel, and its bias on the axes that aren't summed over."""
    if not bias:
        return {"kernel": kernel}
    kept = [i for i, axis in enumerate(kernel.axes) if axis not in kernel.contracts]
    shape, axes = tuple(kernel.shape[i] for i in kept), tuple(kernel.axes[i] for i in kept)
    return {"kernel": kernel, "bias": ParamSpec(shape, axes, jax.nn.initializers.zeros)}


def _norm(c: ModelConfig, shape: tuple[int, ...], axes: tuple[str, ...]) -> Specs:
    specs = {"scale": ParamSpec(shape, axes, _ones(c))}
    if c.norm == "layernorm":
        specs["bias"] = ParamSpec(shape, axes, jax.nn.initializers.zeros)
    return specs


def _normal(c: ModelConfig) -> Initializer:
    return jax.nn.initializers.normal(c.init_std)


def _residual(c: ModelConfig) -> Initializer:
    return jax.nn.initializers.normal(c.init_std / (2 * c.num_layers) ** 0.5)


def _ones(c: ModelConfig) -> Initializer:
    """Of scales: 1 once norm_offset has been added."""
    return jax.nn.initializers.constant(1.0 - c.norm_offset)
