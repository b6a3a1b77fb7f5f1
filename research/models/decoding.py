"""Decoding with a cache: the keys and values of every layer, and a pass of a few tokens that reads and extends it.

Axes: B batch, T new tokens, S entries of the cache, D model, K key/value heads, G query heads of each, h head
dimension, F feed-forward.
"""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from research import params as params_lib
from research.devices import sharding
from research.errors import InputError
from research.models import blocks
from research.models.config import ModelConfig
from research.models.specs import Params, make_specs
from research.ops.attention import cached_attention

Cache = tuple[tuple[jax.Array, jax.Array], ...]  # per layer: keys and values, each [B, K, S, h]

_CACHED = ("batch", "kv_heads", None, "head_dim")


def init_cache(c: ModelConfig, rules: Mapping[str, Any], batch_size: int, length: int) -> Cache:
    shape = (batch_size, c.num_kv_heads, length, c.dim_per_head)
    empty = lambda: sharding.constrain(jnp.zeros(shape, c.dtype), _CACHED, rules)  # noqa: E731
    return tuple((empty(), empty()) for _ in range(c.num_layers))


def unstack(c: ModelConfig, params: Params) -> Params:
    """See Model.unstack. Kernels are cast to the compute dtype here, once, and those that read the same are joined."""
    specs = make_specs(c)
    cast = lambda values, specs: jax.tree.map(lambda w, s: w.astype(c.dtype) if s.contracts else w, values, specs)  # noqa: E731
    layers = (params_lib.layer(params["layers"], i) for i in range(c.num_layers))
    rest = {name: values for name, values in params.items() if name != "layers"}
    return {
        **cast(rest, {name: specs[name] for name in rest}),
        "layers": tuple(_join(c, cast(layer, specs["layers"])) for layer in layers),
    }


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
    angles = blocks.rotations(c, positions, jnp.max(positions, axis=1, keepdims=True) + 1)
    T, S = mask.shape[1:]
    age = index + jnp.arange(T)[:, None] - jnp.arange(S)[None, :]
    x = blocks.embed(c, rules, params, tokens, positions)
    out = []
    for i, (p, (keys, values)) in enumerate(zip(params["layers"], cache, strict=True)):
        window = c.sliding_window[i % len(c.sliding_window)]
        seen = mask & (age < window)[None] if window else mask

        def attend(y, p=p, keys=keys, values=values, window=window, seen=seen):
            q, k, v = blocks.project_qkv(c, p["attention"], y, angles[1] if window else angles[0])
            keys = jax.lax.dynamic_update_slice_in_dim(keys, k.swapaxes(1, 2), index, axis=2)
            values = jax.lax.dynamic_update_slice_in_dim(values, v.swapaxes(1, 2), index, axis=2)
            keys, values = (sharding.constrain(y, _CACHED, rules) for y in (keys, values))
            out.append((keys, values))
            y = cached_attention(q, keys, values, seen, scale=c.scale, softcap=c.attention_softcap)
            return blocks.linear(p["attention"]["o"], y, contract=2)

        with jax.named_scope("layers"):
            x = blocks.block(c, rules, p, x, attend)
    return blocks.final(c, params, x), tuple(out)
