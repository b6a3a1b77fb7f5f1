"""The transformer: one ModelConfig, pure functions over a pytree of arrays.

Axes: B batch, T time, S cached time, D model, H query heads, K key/value heads, h head dimension, F feed-forward,
V vocabulary, E experts, L layers. Parameters are stored in float32 with layers stacked along L; the computation is in
`dtype`.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from research import params as params_lib
from research.devices import sharding
from research.errors import InputError, did_you_mean
from research.ops import moe
from research.ops.attention import IMPLEMENTATIONS, cached_attention, self_attention
from research.ops.cpu import matmul
from research.ops.losses import Head
from research.ops.rope import Angles, RopeScaling, rope, rope_angles
from research.params import ParamSpec

Params = Any  # a pytree of arrays in the shape of `specs`
Cache = tuple[tuple[jax.Array, jax.Array], ...]  # per layer: keys and values, each [B, K, S, h]

_MLPS = {  # activation, and whether a gate is multiplied by it
    "swiglu": (jax.nn.silu, True),
    "geglu": (functools.partial(jax.nn.gelu, approximate=False), True),
    "geglu_tanh": (functools.partial(jax.nn.gelu, approximate=True), True),
    "gelu": (functools.partial(jax.nn.gelu, approximate=False), False),
    "gelu_tanh": (functools.partial(jax.nn.gelu, approximate=True), False),
    "relu": (jax.nn.relu, False),
}
_CACHED = ("batch", "kv_heads", None, "head_dim")
_NORMS = ("rmsnorm", "layernorm")
_BLOCKS = ("pre", "post", "sandwich", "parallel", "residual")
_POSITIONS = ("rope", "learned")
_QK_NORMS = ("none", "head", "full")
_REMAT = {
    "none": None,
    "full": jax.checkpoint_policies.nothing_saveable,
    "dots": jax.checkpoint_policies.save_only_these_names("linear", "attention"),
    "attention": jax.checkpoint_policies.save_only_these_names("attention"),
}


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """Everything that decides what the model computes.

    Attributes:
      head_dim: 0 means d_model / num_heads.
      d_ff: F; with experts, of each.
      mlp: "swiglu" and "geglu" are gated (Shazeer 2020, arXiv:2002.05202), "gelu" and "relu" plain two-layer MLPs;
        "_tanh" is GELU's approximation.
      num_experts: E; 0 is one dense MLP. Experts have no biases.
      experts_per_token: how many experts each token goes through.
      normalize_router: the chosen experts' probabilities are made to add up to 1.
      block: where the norms of a layer are. "pre": x + f(norm(x)), for attention and then the MLP. "post": x +
        norm(f(x)) (OLMo 2, arXiv:2501.00656). "sandwich": x + norm(f(norm(x))) (Gemma 2, arXiv:2408.00118).
        "parallel": x + attention(norm(x)) + mlp(norm(x)), each with its norm (GPT-NeoX, arXiv:2204.06745).
        "residual": norm(x + f(x)), and no norm at the end (the first transformer, arXiv:1706.03762, and BERT).
      norm_offset: is added to the scale of RMSNorm, which is then stored around 0 (Gemma: 1).
      positions: "rope", or "learned" embeddings, max_length of them.
      rotary_dim: how many dimensions of each head RoPE turns; 0 is all.
      local_rope_theta: of layers with a sliding window, which then aren't stretched by rope_scaling either (Gemma 3,
        arXiv:2503.19786); 0: as the others.
      max_length: the longest sequence that it may be given.
      causal: else every token sees all of its document (an encoder).
      sliding_window: tokens that each token sees, itself included, in layer i: sliding_window[i % len]; 0 means all.
      attention_bias, attention_out_bias, mlp_bias, head_bias: of the query, key and value maps, of attention's output
        map, of the MLP's maps, and of the logits.
      qk_norm: RMSNorm of queries and keys before RoPE: "head", over each head's dimensions; "full", over all heads'
        together (OLMo 2).
      attention_scale: of scores; 0 means head_dim^-0.5.
      attention_softcap, logit_softcap: cap * tanh(x / cap) on scores and logits (Gemma 2, arXiv:2408.00118); 0 is off.
      embed_scale: multiply embeddings by sqrt(d_model).
      embed_norm: norm of the embeddings (BERT).
      token_types: kinds of segment with an embedding each (BERT): the batch field `token_types`, [B, T] int32, says
        which; without it all tokens are of the first.
      head_transform: a dense layer, the MLP's activation and a norm before the logits (BERT's masked-LM head).
      num_labels: the head gives so many logits and not V: a classifier or reward model. 0 is a language model.
      remat: what the backward pass recomputes in each layer: "none" keeps all activations, "full" only the layer's
        input, "attention" that and attention's output, "dots" also the results of matmuls with weights: what is then
        computed again is element by element, which takes less than storing it.
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
    num_experts: int = 0
    experts_per_token: int = 2
    normalize_router: bool = True
    block: str = "pre"
    norm: str = "rmsnorm"
    norm_eps: float = 1e-6
    norm_offset: float = 0.0
    positions: str = "rope"
    rope_theta: float = 10_000.0
    rope_scaling: RopeScaling = RopeScaling()
    rotary_dim: int = 0
    local_rope_theta: float = 0.0
    max_length: int = 2048
    causal: bool = True
    sliding_window: tuple[int, ...] = (0,)
    attention_bias: bool = False
    attention_out_bias: bool = False
    mlp_bias: bool = False
    head_bias: bool = False
    qk_norm: str = "none"
    attention_scale: float = 0.0
    attention_softcap: float = 0.0
    logit_softcap: float = 0.0
    tie_embeddings: bool = True
    embed_scale: bool = False
    embed_norm: bool = False
    token_types: int = 0
    head_transform: bool = False
    num_labels: int = 0
    init_std: float = 0.02
    remat: str = "dots"
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
            ("mlp", _MLPS),
            ("block", _BLOCKS),
            ("norm", _NORMS),
            ("positions", _POSITIONS),
            ("qk_norm", _QK_NORMS),
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
        if self.positions == "rope":
            if self.turned % 2 or self.turned > self.dim_per_head:
                field = "rotary_dim" if self.rotary_dim else "head_dim"
                raise InputError(
                    f"model.{field} = {self.turned}: rotary embeddings turn pairs of at most head_dim = "
                    f"{self.dim_per_head} dimensions. Choose an even number up to that."
                )
            self.rope_scaling.check(self.turned)
        if self.num_experts and not 1 <= self.experts_per_token <= self.num_experts:
            raise InputError(
                f"model.experts_per_token = {self.experts_per_token}: must be from 1 to model.num_experts = "
                f"{self.num_experts}."
            )
        if self.num_experts and self.mlp_bias:
            raise InputError("model.mlp_bias = True: experts have no biases. Set it to False.")
        if not self.sliding_window or min(self.sliding_window) < 0:
            raise InputError(f"model.sliding_window = {self.sliding_window}: give sizes >= 0, 0 for full attention.")

    @property
    def dim_per_head(self) -> int:
        return self.head_dim or self.d_model // self.num_heads

    @property
    def turned(self) -> int:
        """How many dimensions of a head RoPE turns."""
        return self.rotary_dim or self.dim_per_head

    @property
    def scale(self) -> float:
        """What attention's scores are multiplied by."""
        return self.attention_scale or self.dim_per_head**-0.5


class Model(NamedTuple):
    """Pure functions closed over a ModelConfig, never over parameters.

    Attributes:
      specs: pytree of ParamSpec.
      hidden: (params, batch) -> [B, T, D], the last hidden states after the final norm, in the compute dtype. `batch`
        holds tokens, segment_ids, positions, each [B, T] int32.
      hidden_at: (params, batch, layers) -> (hidden, states): the residual stream [B, T, D] after each of the layers,
        which are numbered from 1; 0 is the embedding, and negative ones count from the end.
      attention_inputs: (params, state, batch, layer) -> queries [B, T, H, h], keys and values [B, T, K, h] of a layer,
        as attention takes them, from the state before it.
      unembed: (params) -> Head, kernel [D, V] or [D, num_labels].
      init_cache: (batch size, length S) -> empty Cache.
      unstack: (params) -> params with "layers" as a tuple of trees, as `decode` wants them. Decoding loops run it once,
        outside the loop: slicing stacked weights inside copies them at every token.
      decode: (unstacked params, tokens [B, T], positions [B, T], mask [B, T, S], cache, index) -> ([B, T, D], cache).
        Writes the keys and values of the T tokens at cache[:, :, index : index + T]; `mask` says which of the S cached
        entries each token may see (sliding windows are applied on top, by cache index).
    """

    config: ModelConfig
    specs: Params
    hidden: Callable[[Params, Mapping[str, jax.Array]], jax.Array]
    hidden_at: Callable[..., tuple[jax.Array, tuple[jax.Array, ...]]]
    attention_inputs: Callable[..., tuple[jax.Array, jax.Array, jax.Array]]
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
        hidden_at=functools.partial(hidden_at, config, rules),
        attention_inputs=functools.partial(attention_inputs, config),
        unembed=functools.partial(unembed, config),
        init_cache=functools.partial(init_cache, config, rules),
        unstack=functools.partial(unstack, config),
        decode=functools.partial(decode, config, rules),
    )


def in_compute_dtype(model: Model) -> Params:
    """The specs of a model that isn't trained: kernels are in the dtype that they are used in."""
    dtype = jnp.dtype(model.config.dtype)
    return params_lib.tree_map(lambda s: dataclasses.replace(s, dtype=dtype) if s.contracts else s, model.specs)


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
    if _MLPS[c.mlp][1]:
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


def linear(p: Params, x: jax.Array, contract: int = 1) -> jax.Array:
    """x [..., *in] times kernel [*in, *out], plus the bias if there is one; `contract` counts the axes of *in."""
    kernel = p["kernel"].astype(x.dtype)
    y = matmul.matmul(x, kernel, contract)
    if "bias" in p:
        bias = p["bias"].astype(x.dtype)
        y = y + bias.reshape((1,) * (y.ndim - bias.ndim) + bias.shape)
    return y


def norm(c: ModelConfig, p: Params, x: jax.Array, center: bool | None = None) -> jax.Array:
    """RMSNorm (arXiv:1910.07467) or LayerNorm (arXiv:1607.06450) over the axes that the scale has, in float32."""
    axes = tuple(range(x.ndim - p["scale"].ndim, x.ndim))
    y = x.astype(jnp.float32)
    if c.norm == "layernorm" if center is None else center:
        y = y - jnp.mean(y, axis=axes, keepdims=True)
    y = y * jax.lax.rsqrt(jnp.mean(jnp.square(y), axis=axes, keepdims=True) + c.norm_eps)
    row = (1,) * axes[0] + p["scale"].shape
    y = y * (p["scale"].astype(jnp.float32).reshape(row) + c.norm_offset)
    if "bias" in p:
        y = y + p["bias"].astype(jnp.float32).reshape(row)
    return y.astype(x.dtype)


def _angles(c: ModelConfig, positions: jax.Array, lengths: jax.Array) -> tuple[Angles | None, Angles | None]:
    """Rotations of the layers that see everything and of those with a window; None where there are none."""
    if c.positions != "rope":
        return None, None
    everywhere = rope_angles(c.rope_theta, c.turned, c.rope_scaling, positions, lengths)
    if not c.local_rope_theta:
        return everywhere, everywhere
    return everywhere, rope_angles(c.local_rope_theta, c.turned, RopeScaling(), positions)


def _qkv(c: ModelConfig, p: Params, x: jax.Array, angles: Angles | None) -> tuple[jax.Array, jax.Array, jax.Array]:
    if "qkv" in p:
        y = linear(p["qkv"], x)
        q, k, v = y[..., :-2, :].reshape(*x.shape[:2], c.num_heads, c.dim_per_head), y[..., -2, :], y[..., -1, :]
    else:
        q, k, v = linear(p["q"], x), linear(p["k"], x), linear(p["v"], x)
    if c.qk_norm != "none":
        q, k = norm(c, p["q_norm"], q, center=False), norm(c, p["k_norm"], k, center=False)
    if angles is not None:
        q, k = rope(q, angles), rope(k, angles)
    return q, k, v


def _mlp(c: ModelConfig, rules: Mapping[str, Any], p: Params, x: jax.Array) -> jax.Array:
    activation, gated = _MLPS[c.mlp]

    def network(apply: Callable, x: jax.Array, constrain: Callable = lambda y: y) -> jax.Array:
        y = apply("up", x)
        y = activation(apply("gate", x)) * y if gated else activation(y)
        return apply("down", constrain(y))

    if not c.num_experts:
        constrain = lambda y: sharding.constrain(y, ("batch", "time", "mlp"), rules)  # noqa: E731
        if "up_gate" in p:
            y = linear(p["up_gate"], x)
            both = {"up": y[..., 0, :], "gate": y[..., 1, :]}
            return network(lambda name, x: both[name] if name in both else linear(p[name], x), x, constrain)
        return network(lambda name, x: linear(p[name], x), x, constrain)
    B, T = x.shape[:2]
    logits = linear(p["router"], x.astype(jnp.float32))
    chosen = moe.route(logits.reshape(B * T, -1), c.experts_per_token, c.normalize_router)
    weights, experts = (y.reshape(B, T, -1) for y in chosen)

    def expert(kernels: Params, dot: Callable, x: jax.Array) -> jax.Array:
        apply = lambda name, x: dot(x, kernels[name])  # noqa: E731
        return network(apply, x)

    kernels = {name: q["kernel"] for name, q in p.items() if name != "router"}
    axes = {name: ("experts", *(("mlp", "embed") if name == "down" else ("embed", "mlp"))) for name in kernels}
    return moe.sharded_mixture(x, weights, experts, c.num_experts, kernels, expert, kernels=axes, rules=rules)


def _block(
    c: ModelConfig, rules: Mapping[str, Any], p: Params, x: jax.Array, attend: Callable[[jax.Array], jax.Array]
) -> jax.Array:
    """One layer around `attend`, which maps [B, T, D] to attention's output [B, T, D]."""
    before = c.block in ("pre", "sandwich", "parallel")
    with jax.named_scope("attention"):
        y = attend(norm(c, p["attention_norm"], x) if before else x)
        if c.block in ("post", "sandwich"):
            y = norm(c, p["attention_norm" if c.block == "post" else "attention_post_norm"], y)
        attended = x + y
        if c.block == "residual":
            attended = norm(c, p["attention_norm"], attended)
    with jax.named_scope("mlp"):
        z = x if c.block == "parallel" else attended
        y = _mlp(c, rules, p["mlp"], norm(c, p["mlp_norm"], z) if before else z)
        if c.block in ("post", "sandwich"):
            y = norm(c, p["mlp_norm" if c.block == "post" else "mlp_post_norm"], y)
        x = attended + y
        if c.block == "residual":
            x = norm(c, p["mlp_norm"], x)
    return sharding.constrain(x, ("batch", "time", None), rules)


def _layer(c: ModelConfig, rules: Mapping[str, Any], window: int, x, p, segment_ids, angles) -> jax.Array:
    def attend(y: jax.Array) -> jax.Array:
        q, k, v = _qkv(c, p["attention"], y, angles[1] if window else angles[0])
        q = sharding.constrain(q, ("batch", "time", "heads", "head_dim"), rules)
        k = sharding.constrain(k, ("batch", "time", "kv_heads", "head_dim"), rules)
        v = sharding.constrain(v, ("batch", "time", "kv_heads", "head_dim"), rules)
        y = self_attention(
            q,
            k,
            v,
            segment_ids,
            scale=c.scale,
            causal=c.causal,
            window=window,
            softcap=c.attention_softcap,
            implementation=c.attention,
            spec=sharding.partition(("batch", "time", "heads", "head_dim"), rules),
        )
        return linear(p["attention"]["o"], y, contract=2)

    return _block(c, rules, p, x, attend)


@jax.named_scope("embed")
def _embed(
    c: ModelConfig,
    rules: Mapping[str, Any],
    params: Params,
    tokens: jax.Array,
    positions: jax.Array,
    token_types: jax.Array | None = None,
) -> jax.Array:
    x = params["embed"].astype(c.dtype)[tokens]
    if c.embed_scale:
        x = x * jnp.asarray(c.d_model**0.5, x.dtype)
    if c.positions == "learned":
        x = x + params["position_embed"].astype(c.dtype)[positions]
    if c.token_types:
        types = jnp.zeros_like(tokens) if token_types is None else token_types
        x = x + params["token_type_embed"].astype(c.dtype)[types]
    if c.embed_norm:
        x = norm(c, params["embed_norm"], x)
    return sharding.constrain(x, ("batch", "time", None), rules)


@jax.named_scope("final_norm")
def _finish(c: ModelConfig, params: Params, x: jax.Array) -> jax.Array:
    """From the last layer to what the head multiplies."""
    if c.block != "residual":
        x = norm(c, params["final_norm"], x)
    if c.head_transform:
        x = _MLPS[c.mlp][0](linear(params["head_transform"]["dense"], x))
        x = norm(c, params["head_transform"]["norm"], x)
    return x


def _segment_lengths(segment_ids: jax.Array, positions: jax.Array) -> jax.Array:
    """Tokens of the document that each token is in, [B, T]."""
    T = positions.shape[1]

    def row(segments: jax.Array, positions: jax.Array) -> jax.Array:
        return jax.ops.segment_max(positions, segments, num_segments=T + 1)[segments] + 1

    return jax.vmap(row)(segment_ids, positions)


def hidden(c: ModelConfig, rules: Mapping[str, Any], params: Params, batch: Mapping[str, jax.Array]) -> jax.Array:
    """See Model.hidden."""
    return hidden_at(c, rules, params, batch, ())[0]


def hidden_at(
    c: ModelConfig,
    rules: Mapping[str, Any],
    params: Params,
    batch: Mapping[str, jax.Array],
    layers: Sequence[int],
) -> tuple[jax.Array, tuple[jax.Array, ...]]:
    """See Model.hidden_at. Layers run under a scan, one period of `sliding_window` at a time; it ends at each of
    `layers` and another begins, so that only these states are held."""
    wanted = [layer_number(c, layer) for layer in layers]
    segment_ids, positions = batch["segment_ids"], batch["positions"]
    angles = _angles(c, positions, _segment_lengths(segment_ids, positions))
    period = len(c.sliding_window)

    def one_layer(x: jax.Array, p: Params, i: int, nth: int | None = None, scanned: bool = True) -> jax.Array:
        """Layer i, whose parameters are `p`, or with `nth` among those of several: then taken from them inside, so that
        remat keeps none a second time. Outside a scan the compiler must be kept from sharing what is to be repeated."""

        def layer(x, p, segment_ids, angles):
            p = p if nth is None else jax.tree.map(lambda w: w[nth], p)
            return _layer(c, rules, c.sliding_window[i % period], x, p, segment_ids, angles)

        if c.remat != "none":
            layer = jax.checkpoint(layer, policy=_REMAT[c.remat], prevent_cse=not scanned)
        return layer(x, p, segment_ids, angles)

    def some_layers(x: jax.Array, layers: Params, first: int = 0, scanned: bool = False) -> jax.Array:
        for nth in range(jax.tree.leaves(layers)[0].shape[0]):
            x = one_layer(x, layers, first + nth, nth, scanned)
        return x

    def run(x: jax.Array, first: int, stop: int) -> jax.Array:
        cut = lambda a, b: jax.tree.map(lambda w: w[a:b], params["layers"])  # noqa: E731
        if (
            period == 1
        ):  # as they are: another axis would make XLA copy all weights, and the scan keep them a second time
            return jax.lax.scan(lambda x, p: (one_layer(x, p, 0), None), x, cut(first, stop))[0]
        aligned = min(-(-first // period) * period, stop)
        whole = (stop - aligned) // period
        if first < aligned:
            x = some_layers(x, cut(first, aligned), first)
        if whole:
            split = jax.tree.map(
                lambda w: w.reshape(whole, period, *w.shape[1:]), cut(aligned, aligned + whole * period)
            )
            x, _ = jax.lax.scan(lambda x, layers: (some_layers(x, layers, scanned=True), None), x, split)
        if aligned + whole * period < stop:
            x = some_layers(x, cut(aligned + whole * period, stop))
        return x

    x = _embed(c, rules, params, batch["tokens"], positions, batch.get("token_types"))
    states, done = {0: x}, 0
    for stop in sorted({*wanted, c.num_layers}):
        with jax.named_scope("layers"):
            x = run(x, done, stop)
        states[stop], done = x, stop
    return _finish(c, params, x), tuple(states[layer] for layer in wanted)


def layer_number(c: ModelConfig, layer: int) -> int:
    """The number of a layer that may count from the end. Raises InputError where there is no such layer."""
    if not -c.num_layers - 1 <= layer <= c.num_layers:
        raise InputError(f"layer {layer}: the model has {c.num_layers}, numbered from 1; 0 is the embedding.")
    return layer if layer >= 0 else c.num_layers + 1 + layer


def attention_inputs(
    c: ModelConfig, params: Params, x: jax.Array, batch: Mapping[str, jax.Array], layer: int
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """See Model.attention_inputs."""
    i = layer_number(c, layer) - 1
    if i < 0:
        raise InputError(f"layer {layer}: is the embedding, which has no attention. The first layer is 1.")
    p = jax.tree.map(lambda w: w[i], params["layers"])
    if c.block in ("pre", "sandwich", "parallel"):
        x = norm(c, p["attention_norm"], x)
    positions = batch["positions"]
    angles = _angles(c, positions, _segment_lengths(batch["segment_ids"], positions))
    return _qkv(c, p["attention"], x, angles[1] if c.sliding_window[i % len(c.sliding_window)] else angles[0])


def unembed(c: ModelConfig, params: Params) -> Head:
    """The kernel that turns hidden states into logits, its bias and soft-cap."""
    tied = "head" not in params
    kernel = params["embed"].T if tied else params["head"]
    return Head(kernel=kernel, bias=params.get("head_bias"), softcap=c.logit_softcap, by_token=tied)


def init_cache(c: ModelConfig, rules: Mapping[str, Any], batch_size: int, length: int) -> Cache:
    shape = (batch_size, c.num_kv_heads, length, c.dim_per_head)
    empty = lambda: sharding.constrain(jnp.zeros(shape, c.dtype), _CACHED, rules)  # noqa: E731
    return tuple((empty(), empty()) for _ in range(c.num_layers))


def unstack(c: ModelConfig, params: Params) -> Params:
    """See Model.unstack. Kernels are cast to the compute dtype here, once, and those that read the same are joined."""
    specs = make_specs(c)
    params = jax.tree.map(lambda w, s: w.astype(c.dtype) if s.contracts else w, params, specs)
    layers = (jax.tree.map(lambda w, i=i: w[i], params["layers"]) for i in range(c.num_layers))
    return {**params, "layers": tuple(_join(c, layer) for layer in layers)}


def _join(c: ModelConfig, p: Params) -> Params:
    """One layer with fewer, larger kernels: qkv [D, K, G + 2, h], each key/value head after the G query heads that it
    serves, and up_gate [D, 2, F]. With few tokens the time goes into reading them."""
    attention, mlp = dict(p["attention"]), dict(p["mlp"])

    def heads(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
        q = q.reshape(*q.shape[:-2], c.num_kv_heads, -1, q.shape[-1])
        return jnp.concatenate([q, k[..., None, :], v[..., None, :]], axis=-2)

    attention["qkv"] = jax.tree.map(heads, *(attention.pop(name) for name in "qkv"))
    if "gate" in mlp and not c.num_experts:
        mlp["up_gate"] = jax.tree.map(lambda *w: jnp.stack(w, axis=-2), mlp.pop("up"), mlp.pop("gate"))
    return {**p, "attention": attention, "mlp": mlp}


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
    if not c.causal or c.num_labels:
        kind = "a classifier" if c.num_labels else "an encoder, which reads in both directions"
        raise InputError(f"model: is {kind}, and can't generate. Use a causal language model.")
    rules = {**rules, "time": None}  # there is one token at a time
    angles = _angles(c, positions, jnp.max(positions, axis=1, keepdims=True) + 1)
    T, S = mask.shape[1:]
    age = index + jnp.arange(T)[:, None] - jnp.arange(S)[None, :]
    x = _embed(c, rules, params, tokens, positions)
    out = []
    for i, (p, (keys, values)) in enumerate(zip(params["layers"], cache, strict=True)):
        window = c.sliding_window[i % len(c.sliding_window)]
        seen = mask & (age < window)[None] if window else mask

        def attend(y, p=p, keys=keys, values=values, window=window, seen=seen):
            q, k, v = _qkv(c, p["attention"], y, angles[1] if window else angles[0])
            keys = jax.lax.dynamic_update_slice_in_dim(keys, k.swapaxes(1, 2), index, axis=2)
            values = jax.lax.dynamic_update_slice_in_dim(values, v.swapaxes(1, 2), index, axis=2)
            keys, values = (sharding.constrain(y, _CACHED, rules) for y in (keys, values))
            out.append((keys, values))
            y = cached_attention(q, keys, values, seen, scale=c.scale, softcap=c.attention_softcap)
            return linear(p["attention"]["o"], y, contract=2)

        with jax.named_scope("layers"):
            x = _block(c, rules, p, x, attend)
    return _finish(c, params, x), tuple(out)


def flops_per_token(c: ModelConfig, length: int) -> float:
    """Model FLOPs of one training token (forward and backward) in sequences of `length` tokens.

    6 per matmul weight, the head included and the embedding look-up not, plus causal attention's 6 L H h T
    (PaLM, arXiv:2204.02311, appendix B, halved for the causal mask), windows counted at their size.
    """
    layers = jax.tree.leaves(make_specs(c)["layers"], is_leaf=params_lib.is_spec)
    used = {False: 1.0, True: c.experts_per_token / max(c.num_experts, 1)}
    weights = sum(params_lib.count([s]) * used["experts" in s.axes and len(s.shape) > 3] for s in layers if s.contracts)
    weights += c.d_model * (c.num_labels or c.vocab_size) + c.d_model**2 * c.head_transform
    seen = [min(w or length, length) for w in c.sliding_window]
    context = sum(
        seen[i % len(seen)] * (1 - seen[i % len(seen)] / (2 * length)) for i in range(c.num_layers)
    )  # mean number of keys per query, summed over layers
    if not c.causal:
        context = float(sum(min(w or length, length) for w in (seen[i % len(seen)] for i in range(c.num_layers))))
    return 6.0 * weights + 12.0 * c.num_heads * c.dim_per_head * context
