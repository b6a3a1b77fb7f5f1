"""A decoder-only transformer: one ModelConfig, pure functions over a pytree of arrays.

Axes: B batch, T time, S cached time, D model, H query heads, K key/value heads, h head dimension, F feed-forward,
V vocabulary, L layers. Parameters are stored in float32 with layers stacked along L; the computation is in `dtype`.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from research import params as params_lib
from research import sharding
from research.errors import InputError, did_you_mean
from research.ops.attention import IMPLEMENTATIONS, cached_attention, self_attention
from research.ops.losses import Head
from research.params import ParamSpec

Params = Any  # a pytree of arrays in the shape of `specs`
Cache = tuple[tuple[jax.Array, jax.Array], ...]  # per layer: keys and values, each [B, S, K, h]

_ACTIVATIONS = {
    "swiglu": jax.nn.silu,
    "geglu": functools.partial(jax.nn.gelu, approximate=True),
    "gelu": jax.nn.gelu,
}
_NORMS = ("rmsnorm", "layernorm")
_REMAT = {
    "none": None,
    "full": jax.checkpoint_policies.nothing_saveable,
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
    "attention": jax.checkpoint_policies.save_only_these_names("attention"),
}


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """Everything that decides what the model computes.

    Attributes:
      head_dim: 0 means d_model / num_heads.
      mlp: "swiglu" and "geglu" are gated (Shazeer 2020, arXiv:2002.05202); "gelu" is a plain two-layer MLP.
      max_length: the longest sequence that it may be given.
      sliding_window: tokens that each token sees, itself included, in layer i: sliding_window[i % len]; 0 means all.
      attention_softcap, logit_softcap: cap * tanh(x / cap) on scores and logits (Gemma 2, arXiv:2408.00118); 0 is off.
      embed_scale: multiply embeddings by sqrt(d_model).
      remat: what the backward pass recomputes in each layer: "none" keeps all activations, "full" only the layer's
        input, "dots" the results of matmuls with weights, "attention" the layer's input and attention's output.
      attention: an implementation of ops.attention, or "auto".
      dtype: of activations and matmuls: float32 or bfloat16.
    """

    vocab_size: int
    num_layers: int = 4
    d_model: int = 256
    num_heads: int = 8
    num_kv_heads: int = 8
    head_dim: int = 0
    d_ff: int = 768
    mlp: str = "swiglu"
    norm: str = "rmsnorm"
    norm_eps: float = 1e-6
    rope_theta: float = 10_000.0
    max_length: int = 2048
    attention_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    tie_embeddings: bool = True
    embed_scale: bool = False
    attention_softcap: float = 0.0
    logit_softcap: float = 0.0
    sliding_window: tuple[int, ...] = (0,)
    init_std: float = 0.02
    remat: str = "none"
    attention: str = "auto"
    dtype: str = "float32"

    def __post_init__(self) -> None:
        for field in (
            "vocab_size",
            "num_layers",
            "d_model",
            "num_heads",
            "num_kv_heads",
            "d_ff",
            "max_length",
        ):
            if getattr(self, field) < 1:
                raise InputError(f"model.{field} = {getattr(self, field)}: must be at least 1.")
        for field, known in (
            ("mlp", _ACTIVATIONS),
            ("norm", _NORMS),
            ("remat", _REMAT),
            ("attention", IMPLEMENTATIONS),
        ):
            if getattr(self, field) not in known:
                value = getattr(self, field)
                raise InputError(f"model.{field} = {value!r}: no such choice.{did_you_mean(value, known)}")
        if self.dtype not in ("float32", "bfloat16"):
            raise InputError(f"model.dtype = {self.dtype!r}: must be 'float32' or 'bfloat16'.")
        if self.num_heads % self.num_kv_heads:
            raise InputError(
                f"model.num_kv_heads = {self.num_kv_heads} doesn't divide model.num_heads = {self.num_heads}. "
                "Every key/value head serves the same number of query heads: choose a divisor."
            )
        if not self.head_dim and self.d_model % self.num_heads:
            raise InputError(
                f"model.d_model = {self.d_model} isn't divisible by model.num_heads = {self.num_heads}. "
                "Change one of them, or set model.head_dim."
            )
        if self.dim_per_head % 2:
            raise InputError(f"model.head_dim = {self.dim_per_head} is odd: rotary embeddings turn pairs.")
        if not self.sliding_window or min(self.sliding_window) < 0:
            raise InputError(f"model.sliding_window = {self.sliding_window}: give sizes >= 0, 0 for full attention.")

    @property
    def dim_per_head(self) -> int:
        return self.head_dim or self.d_model // self.num_heads


class Model(NamedTuple):
    """Pure functions closed over a ModelConfig, never over parameters.

    Attributes:
      specs: pytree of ParamSpec.
      hidden: (params, batch) -> [B, T, D], the last hidden states after the final norm, in the compute dtype. `batch`
        holds tokens, segment_ids, positions, each [B, T] int32.
      unembed: (params) -> Head, kernel [D, V].
      init_cache: (batch size, length S) -> empty Cache.
      unstack: (params) -> params with "layers" as a tuple of trees, as `decode` wants them. Decoding loops run it once,
        outside the loop: slicing stacked weights inside copies them at every token.
      decode: (unstacked params, tokens [B, T], positions [B, T], mask [B, T, S], cache, index) -> ([B, T, D], cache).
        Writes the keys and values of the T tokens at cache[:, index : index + T]; `mask` says which of the S cached
        entries each token may see (sliding windows are applied on top, by cache index).
    """

    config: ModelConfig
    specs: Params
    hidden: Callable[[Params, Mapping[str, jax.Array]], jax.Array]
    unembed: Callable[[Params], Head]
    init_cache: Callable[[int, int], Cache]
    unstack: Callable[[Params], Params]
    decode: Callable[..., tuple[jax.Array, Cache]]


def make_model(config: ModelConfig, rules: Mapping[str, Any] = sharding.RULES) -> Model:
    """Returns the model's functions; `rules` maps logical axes to the mesh."""
    return Model(
        config=config,
        specs=make_specs(config),
        hidden=functools.partial(hidden, config, rules),
        unembed=functools.partial(unembed, config),
        init_cache=functools.partial(init_cache, config),
        unstack=functools.partial(unstack, config),
        decode=functools.partial(decode, config, rules),
    )


def make_specs(c: ModelConfig) -> Params:
    """Shapes, logical axes and initial values. Kernels that write to the residual stream start at std / sqrt(2 L)
    (Radford et al. 2019), so that the stream's variance doesn't grow with depth."""
    normal = jax.nn.initializers.normal(c.init_std)
    residual = jax.nn.initializers.normal(c.init_std / (2 * c.num_layers) ** 0.5)
    zeros, ones = jax.nn.initializers.zeros, jax.nn.initializers.ones
    L, D, H, K, h, F, V = (
        c.num_layers,
        c.d_model,
        c.num_heads,
        c.num_kv_heads,
        c.dim_per_head,
        c.d_ff,
        c.vocab_size,
    )

    def linear(shape, axes, contracts, bias, init=normal):
        """A kernel stacked over layers, and its bias on the axes that aren't contracted."""
        spec = {"kernel": ParamSpec((L, *shape), ("layers", *axes), init, contracts)}
        if bias:
            out = [(n, a) for n, a in zip(shape, axes, strict=True) if a not in contracts]
            spec["bias"] = ParamSpec((L, *(n for n, _ in out)), ("layers", *(a for _, a in out)), zeros)
        return spec

    def norm(*stack, size=D, axis="embed_replicated"):
        axes = ("layers",) * len(stack) + (axis,)
        spec = {"scale": ParamSpec((*stack, size), axes, ones)}
        if c.norm == "layernorm":
            spec["bias"] = ParamSpec((*stack, size), axes, zeros)
        return spec

    attention = {
        "q": linear((D, H, h), ("embed", "heads", "head_dim"), ("embed",), c.attention_bias),
        "k": linear((D, K, h), ("embed", "kv_heads", "head_dim"), ("embed",), c.attention_bias),
        "v": linear((D, K, h), ("embed", "kv_heads", "head_dim"), ("embed",), c.attention_bias),
        "o": linear((H, h, D), ("heads", "head_dim", "embed"), ("heads", "head_dim"), c.attention_bias, residual),
    }
    if c.qk_norm:
        attention |= {"q_norm": norm(L, size=h, axis="head_dim"), "k_norm": norm(L, size=h, axis="head_dim")}
    mlp = {
        "up": linear((D, F), ("embed", "mlp"), ("embed",), c.mlp_bias),
        "down": linear((F, D), ("mlp", "embed"), ("mlp",), c.mlp_bias, residual),
    }
    if c.mlp != "gelu":
        mlp["gate"] = linear((D, F), ("embed", "mlp"), ("embed",), c.mlp_bias)
    specs = {
        "embed": ParamSpec((V, D), ("vocab", "embed"), normal, ("vocab",)),
        "layers": {"attention_norm": norm(L), "attention": attention, "mlp_norm": norm(L), "mlp": mlp},
        "final_norm": norm(),
    }
    if not c.tie_embeddings:
        specs["head"] = ParamSpec((D, V), ("embed", "vocab"), normal, ("embed",))
    return specs


def linear(p: Params, x: jax.Array, contract: int = 1) -> jax.Array:
    """x [..., *in] times kernel [*in, *out], plus the bias if there is one; `contract` counts the axes of *in."""
    kernel = p["kernel"].astype(x.dtype)
    y = jnp.tensordot(x, kernel, axes=contract)
    if "bias" in p:
        bias = p["bias"].astype(x.dtype)
        y = y + bias.reshape((1,) * (y.ndim - bias.ndim) + bias.shape)
    return y


def norm(c: ModelConfig, p: Params, x: jax.Array) -> jax.Array:
    """RMSNorm (arXiv:1910.07467) or LayerNorm (arXiv:1607.06450) over the last axis, in float32."""
    y = x.astype(jnp.float32)
    if c.norm == "layernorm":
        y = y - jnp.mean(y, axis=-1, keepdims=True)
    y = y * jax.lax.rsqrt(jnp.mean(jnp.square(y), axis=-1, keepdims=True) + c.norm_eps)
    row = (1,) * (x.ndim - 1) + (-1,)
    y = y * p["scale"].reshape(row)
    if "bias" in p:
        y = y + p["bias"].reshape(row)
    return y.astype(x.dtype)


def rope_angles(c: ModelConfig, positions: jax.Array) -> tuple[jax.Array, jax.Array]:
    """cos and sin [B, T, 1, h/2] float32 of positions [B, T] (RoFormer, arXiv:2104.09864)."""
    half = c.dim_per_head // 2
    frequency = c.rope_theta ** (-jnp.arange(half, dtype=jnp.float32) / half)
    angle = positions[:, :, None, None].astype(jnp.float32) * frequency[None, None, None, :]
    return jnp.cos(angle), jnp.sin(angle)


def rope(x: jax.Array, angles: tuple[jax.Array, jax.Array]) -> jax.Array:
    """Turns pairs (x[i], x[i + h/2]) of the head dimension, x [B, T, heads, h]; the layout of Llama in transformers."""
    cos, sin = angles
    a, b = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1).astype(x.dtype)


def _qkv(c: ModelConfig, p: Params, x: jax.Array, angles: Any) -> tuple[jax.Array, jax.Array, jax.Array]:
    q, k, v = linear(p["q"], x), linear(p["k"], x), linear(p["v"], x)
    if c.qk_norm:
        q, k = norm(c, p["q_norm"], q), norm(c, p["k_norm"], k)
    return rope(q, angles), rope(k, angles), v


def _mlp(c: ModelConfig, rules: Mapping[str, Any], p: Params, x: jax.Array) -> jax.Array:
    y = linear(p["up"], x)
    y = _ACTIVATIONS[c.mlp](linear(p["gate"], x)) * y if "gate" in p else _ACTIVATIONS[c.mlp](y)
    return linear(p["down"], sharding.constrain(y, ("batch", "time", "mlp"), rules))


def _layer(c: ModelConfig, rules: Mapping[str, Any], window: int, x, p, segment_ids, angles) -> jax.Array:
    with jax.named_scope("attention"):
        q, k, v = _qkv(c, p["attention"], norm(c, p["attention_norm"], x), angles)
        q = sharding.constrain(q, ("batch", "time", "heads", "head_dim"), rules)
        k = sharding.constrain(k, ("batch", "time", "kv_heads", "head_dim"), rules)
        v = sharding.constrain(v, ("batch", "time", "kv_heads", "head_dim"), rules)
        y = self_attention(
            q,
            k,
            v,
            segment_ids,
            scale=c.dim_per_head**-0.5,
            window=window,
            softcap=c.attention_softcap,
            implementation=c.attention,
            spec=sharding.partition(("batch", "time", "heads", "head_dim"), rules),
        )
        x = x + linear(p["attention"]["o"], y, contract=2)
    with jax.named_scope("mlp"):
        x = x + _mlp(c, rules, p["mlp"], norm(c, p["mlp_norm"], x))
    return sharding.constrain(x, ("batch", "time", None), rules)


def _embed(c: ModelConfig, rules: Mapping[str, Any], params: Params, tokens: jax.Array) -> jax.Array:
    x = params["embed"].astype(c.dtype)[tokens]
    if c.embed_scale:
        x = x * jnp.asarray(c.d_model**0.5, x.dtype)
    return sharding.constrain(x, ("batch", "time", None), rules)


def hidden(c: ModelConfig, rules: Mapping[str, Any], params: Params, batch: Mapping[str, jax.Array]) -> jax.Array:
    """See Model.hidden. Layers run under a scan, one period of `sliding_window` at a time."""
    segment_ids, angles = batch["segment_ids"], rope_angles(c, batch["positions"])
    period = len(c.sliding_window)

    def one_period(x: jax.Array, layers: Params) -> jax.Array:
        for i in range(jax.tree.leaves(layers)[0].shape[0]):
            layer = functools.partial(_layer, c, rules, c.sliding_window[i])
            if c.remat != "none":
                layer = jax.checkpoint(layer, policy=_REMAT[c.remat])
            x = layer(x, jax.tree.map(lambda w, i=i: w[i], layers), segment_ids, angles)
        return x

    x = _embed(c, rules, params, batch["tokens"])
    whole = c.num_layers // period
    split = jax.tree.map(lambda w: w[: whole * period].reshape(whole, period, *w.shape[1:]), params["layers"])
    x, _ = jax.lax.scan(lambda x, layers: (one_period(x, layers), None), x, split)
    if whole * period < c.num_layers:
        x = one_period(x, jax.tree.map(lambda w: w[whole * period :], params["layers"]))
    return norm(c, params["final_norm"], x)


def unembed(c: ModelConfig, params: Params) -> Head:
    """The kernel [D, V] that turns hidden states into logits, and its soft-cap."""
    kernel = params["embed"].T if c.tie_embeddings else params["head"]
    return Head(kernel=kernel, bias=None, softcap=c.logit_softcap)


def init_cache(c: ModelConfig, batch_size: int, length: int) -> Cache:
    shape = (batch_size, length, c.num_kv_heads, c.dim_per_head)
    return tuple((jnp.zeros(shape, c.dtype), jnp.zeros(shape, c.dtype)) for _ in range(c.num_layers))


def unstack(c: ModelConfig, params: Params) -> Params:
    """See Model.unstack. Kernels are cast to the compute dtype here, once."""
    specs = make_specs(c)
    params = jax.tree.map(lambda w, s: w.astype(c.dtype) if s.contracts else w, params, specs)
    layers = tuple(jax.tree.map(lambda w, i=i: w[i], params["layers"]) for i in range(c.num_layers))
    return {**params, "layers": layers}


def decode(
    c: ModelConfig,
    rules: Mapping[str, Any],
    params: Params,
    tokens: jax.Array,
    positions: jax.Array,
    mask: jax.Array,
    cache: Cache,
    index: jax.Array | int,
) -> tuple[jax.Array, Cache]:
    """See Model.decode."""
    angles = rope_angles(c, positions)
    T, S = mask.shape[1:]
    age = index + jnp.arange(T)[:, None] - jnp.arange(S)[None, :]
    x = _embed(c, rules, params, tokens)
    out = []
    for i, (p, (keys, values)) in enumerate(zip(params["layers"], cache, strict=True)):
        q, k, v = _qkv(c, p["attention"], norm(c, p["attention_norm"], x), angles)
        keys = jax.lax.dynamic_update_slice_in_dim(keys, k, index, axis=1)
        values = jax.lax.dynamic_update_slice_in_dim(values, v, index, axis=1)
        window = c.sliding_window[i % len(c.sliding_window)]
        seen = mask & (age < window)[None] if window else mask
        y = cached_attention(q, keys, values, seen, scale=c.dim_per_head**-0.5, softcap=c.attention_softcap)
        x = x + linear(p["attention"]["o"], y, contract=2)
        x = x + _mlp(c, rules, p["mlp"], norm(c, p["mlp_norm"], x))
        out.append((keys, values))
    return norm(c, params["final_norm"], x), tuple(out)


def flops_per_token(c: ModelConfig, length: int) -> float:
    """Model FLOPs of one training token (forward and backward) in causal sequences of `length` tokens.

    6 per matmul weight, the head included and the embedding look-up not, plus causal attention's 6 L H h T
    (PaLM, arXiv:2204.02311, appendix B, halved for the causal mask), windows counted at their size.
    """
    layers = jax.tree.leaves(make_specs(c)["layers"], is_leaf=params_lib.is_spec)
    weights = params_lib.count([s for s in layers if s.contracts]) + c.d_model * c.vocab_size
    seen = [min(w or length, length) for w in c.sliding_window]
    context = sum(
        seen[i % len(seen)] * (1 - seen[i % len(seen)] / (2 * length)) for i in range(c.num_layers)
    )  # mean number of keys per query, summed over layers
    return 6.0 * weights + 12.0 * c.num_heads * c.dim_per_head * context
