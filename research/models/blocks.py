"""The parts of the transformer: a layer, and what stands before and after the layers. Training and decoding share them.

Axes: B batch, T time, D model, H query heads, K key/value heads, h head dimension, F feed-forward.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from research.devices import sharding
from research.devices.sharding import Rules
from research.models import added_rows, kernels, virtual
from research.models.config import ACTIVATIONS, ModelConfig
from research.models.kernels import linear, linears
from research.models.specs import Params
from research.ops import moe
from research.ops.rope import Angles, RopeScaling, rope, rope_angles

Choices = tuple[Float[Array, "B T E"], Int[Array, "B T k"]]  # a router's logits, and each token's experts


def norm(c: ModelConfig, p: Params, x: Float[Array, "*n"], center: bool | None = None) -> Float[Array, "*n"]:
    """RMSNorm (arXiv:1910.07467) or LayerNorm (arXiv:1607.06450) over the axes that the scale has, in float32.

    `center` says whether the mean is taken off, by default as config.norm has it.
    """
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


def rotations(
    c: ModelConfig, positions: Int[Array, "B T"], lengths: Int[Array, "B T"] | Int[Array, "B 1"]
) -> tuple[Angles | None, Angles | None]:
    """RoPE's angles: of the layers that see everything, and of those with a sliding window. None: without RoPE.

    `lengths` are those of the documents, by which LongRoPE chooses its factors.
    """
    if c.positions != "rope":
        return None, None
    everywhere = rope_angles(c.rope_theta, c.rotary_size, c.rope_scaling, positions, lengths)
    if not c.local_rope_theta:
        return everywhere, everywhere
    return everywhere, rope_angles(c.local_rope_theta, c.rotary_size, RopeScaling(), positions)


def project_qkv(
    c: ModelConfig, p: Params, x: Float[Array, "B T D"], angles: Angles | None
) -> tuple[Float[Array, "B T H h"], Float[Array, "B T K h"], Float[Array, "B T K h"]]:
    """Queries, keys and values, normed and turned, by the kernels q, k and v or by qkv (see decoding.unstack).

    Queries are divided by `divisor` where the layer has one (see `with_divisors`).
    """
    if "qkv" in p:
        y = linear(p["qkv"], x, precision=c.precision)
        q, k, v = y[..., :-2, :].reshape(*x.shape[:2], c.num_heads, c.dim_per_head), y[..., -2, :], y[..., -1, :]
    else:
        q, k, v = linears([p["q"], p["k"], p["v"]], x, precision=c.precision)
    if c.qk_norm != "none":
        q, k = norm(c, p["q_norm"], q, center=False), norm(c, p["k_norm"], k, center=False)
    if angles is not None:
        q, k = rope(q, angles), rope(k, angles)
    if "divisor" in p:
        q = q / p["divisor"].astype(q.dtype)
    return q, k, v


def with_divisors(c: ModelConfig, layer: Params, number: Int[Array, "*n"] | int) -> Params:
    """A layer, or a stack of them, with what config.attention_scale_by_layer has its queries divided by.

    Args:
      layer: its parameters; a stack's begin with an axis of layers.
      number: of the layer, or of each, counted from 0.
    """
    if not c.attention_scale_by_layer:
        return layer
    divisor = jnp.asarray(number, jnp.float32) + 1
    return {**layer, "attention": {**layer["attention"], "divisor": divisor}}


def mlp(
    c: ModelConfig, rules: Rules, p: Params, x: Float[Array, "B T D"]
) -> tuple[Float[Array, "B T D"], Choices | None]:
    """The feed-forward part of a layer: one MLP, or a mixture of experts, whose router's choices are given too."""
    if c.num_experts:
        return _mixture(c, rules, p, x)
    if "up_gate" in p:
        both = linear(p["up_gate"], x, precision=c.precision)
        up, gate = both[..., 0, :], both[..., 1, :]
    else:
        up, *gates = linears([p["up"], p["gate"]] if c.gated else [p["up"]], x, precision=c.precision)
        gate = gates[0] if gates else None
    y = sharding.constrain(_activate(c, up, gate), ("batch", "time", "mlp"), rules)
    return linear(p["down"], y, precision=c.precision), None


def _activate(c: ModelConfig, up: Float[Array, "*n F"], gate: Float[Array, "*n F"] | None) -> Float[Array, "*n F"]:
    activation = ACTIVATIONS[c.mlp]
    return activation(up) if gate is None else activation(gate) * up


def _mixture(
    c: ModelConfig, rules: Rules, p: Params, x: Float[Array, "B T D"]
) -> tuple[Float[Array, "B T D"], Choices]:
    B, T = x.shape[:2]
    logits = linear(p["router"], x.astype(jnp.float32))
    routes = moe.route(logits.reshape(B * T, -1), c.experts_per_token, c.normalize_router)
    weights, experts = (y.reshape(B, T, -1) for y in routes)
    maps = {name: kernels.for_experts(q) for name, q in p.items() if name != "router"}
    axes = {
        name: kernels.expert_axes(q, *(("mlp", "embed") if name == "down" else ("embed", "mlp")))
        for name, q in maps.items()
    }
    expert = functools.partial(_expert, c)
    y = moe.sharded_mixture(x, weights, experts, c.num_experts, maps, expert, kernels=axes, rules=rules)
    return y, (logits, experts)


def _expert(c: ModelConfig, maps: Params, dot: Callable, x: Float[Array, "n D"]) -> Float[Array, "n D"]:
    """`dot` multiplies tokens, each by the kernel of its expert."""
    up = kernels.expert_linear(maps["up"], dot, x)
    gate = kernels.expert_linear(maps["gate"], dot, x) if c.gated else None
    return kernels.expert_linear(maps["down"], dot, _activate(c, up, gate))


def block(
    c: ModelConfig, rules: Rules, p: Params, x: Float[Array, "B T D"], attend: Callable[[jax.Array], jax.Array]
) -> tuple[Float[Array, "B T D"], Choices | None]:
    """One layer: norms and residual sums as config.block has them, around attention and the MLP. Gives its output, and
    of a mixture of experts what the router chose.

    `attend` maps [B, T, D] to attention's output [B, T, D]; it is another for training than for decoding.
    """
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
        y, choices = mlp(c, rules, p["mlp"], norm(c, p["mlp_norm"], z) if before else z)
        if c.block in ("post", "sandwich"):
            y = norm(c, p["mlp_norm" if c.block == "post" else "mlp_post_norm"], y)
        x = attended + y
        if c.block == "residual":
            x = norm(c, p["mlp_norm"], x)
    return sharding.constrain(x, ("batch", "time", None), rules), choices


@jax.named_scope("embed")
def embed(
    c: ModelConfig,
    rules: Rules,
    params: Params,
    tokens: Int[Array, "B T"],
    positions: Int[Array, "B T"],
    token_types: Int[Array, "B T"] | None = None,
) -> Float[Array, "B T D"]:
    """The input of the first layer. Without `token_types` all tokens are of the first type. Virtual tokens have the
    rows of params["prompt"], `realized` (models.virtual)."""
    x = added_rows.look_up(c, params, tokens)
    if "embed_lora" in params:
        x = x + kernels.look_up(params["embed_lora"], tokens, x.dtype)
    if c.embed_scale:
        x = x * jnp.asarray(c.d_model**0.5, x.dtype)
    x = virtual.put_rows(params, c.vocab_size, tokens, x)
    if c.positions == "learned":
        x = x + params["position_embed"].astype(c.dtype)[positions]
    if c.token_types:
        types = jnp.zeros_like(tokens) if token_types is None else token_types
        x = x + params["token_type_embed"].astype(c.dtype)[types]
    if c.embed_norm:
        x = norm(c, params["embed_norm"], x)
    return sharding.constrain(x, ("batch", "time", None), rules)


@jax.named_scope("final_norm")
def final(c: ModelConfig, params: Params, x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
    """From the output of the last layer to what the head multiplies."""
    if c.block != "residual":
        x = norm(c, params["final_norm"], x)
    if c.head_transform:
        x = ACTIVATIONS[c.mlp](linear(params["head_transform"]["dense"], x))
        x = norm(c, params["head_transform"]["norm"], x)
    return x


def document_lengths(segment_ids: Int[Array, "B T"], positions: Int[Array, "B T"]) -> Int[Array, "B T"]:
    """How many tokens the document of each token has."""

    def of_row(segments: Int[Array, " T"], positions: Int[Array, " T"]) -> Int[Array, " T"]:
        return jax.ops.segment_max(positions, segments, num_segments=len(positions) + 1)[segments] + 1

    return jax.vmap(of_row)(segment_ids, positions)
