"""One layer of the transformer and what stands before and after the layers, used by training and by decoding.

Axes: B batch, T time, D model, H query heads, K key/value heads, h head dimension.
"""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from research.devices import sharding
from research.models.config import MLPS, ModelConfig
from research.models.specs import Params
from research.ops import moe
from research.ops.cpu import matmul
from research.ops.rope import Angles, RopeScaling, rope, rope_angles


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


def rotations(c: ModelConfig, positions: jax.Array, lengths: jax.Array) -> tuple[Angles | None, Angles | None]:
    """Rotations of the layers that see everything and of those with a window; None where there are none."""
    if c.positions != "rope":
        return None, None
    everywhere = rope_angles(c.rope_theta, c.turned, c.rope_scaling, positions, lengths)
    if not c.local_rope_theta:
        return everywhere, everywhere
    return everywhere, rope_angles(c.local_rope_theta, c.turned, RopeScaling(), positions)


def project_qkv(
    c: ModelConfig, p: Params, x: jax.Array, angles: Angles | None
) -> tuple[jax.Array, jax.Array, jax.Array]:
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


def mlp(c: ModelConfig, rules: Mapping[str, Any], p: Params, x: jax.Array) -> jax.Array:
    activation, gated = MLPS[c.mlp]

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


def block(
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
        y = mlp(c, rules, p["mlp"], norm(c, p["mlp_norm"], z) if before else z)
        if c.block in ("post", "sandwich"):
            y = norm(c, p["mlp_norm" if c.block == "post" else "mlp_post_norm"], y)
        x = attended + y
        if c.block == "residual":
            x = norm(c, p["mlp_norm"], x)
    return sharding.constrain(x, ("batch", "time", None), rules)


@jax.named_scope("embed")
def embed(
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
def final(c: ModelConfig, params: Params, x: jax.Array) -> jax.Array:
    """From the last layer to what the head multiplies."""
    if c.block != "residual":
        x = norm(c, params["final_norm"], x)
    if c.head_transform:
        x = MLPS[c.mlp][0](linear(params["head_transform"]["dense"], x))
        x = norm(c, params["head_transform"]["norm"], x)
    return x


def document_lengths(segment_ids: jax.Array, positions: jax.Array) -> jax.Array:
    """Tokens of the document that each token is in, [B, T]."""
    T = positions.shape[1]

    def row(segments: jax.Array, positions: jax.Array) -> jax.Array:
        return jax.ops.segment_max(positions, segments, num_segments=T + 1)[segments] + 1

    return jax.vmap(row)(segment_ids, positions)
