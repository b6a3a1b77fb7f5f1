"""Decoding with a cache: the keys and values of every layer, and a pass of a few tokens that reads and extends it.

Axes: B batch, T new tokens, S entries of the cache, D model, K key/value heads, G query heads of each, h head
dimension, F feed-forward.
"""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from research import params as params_lib
from research.devices import sharding
from research.devices.sharding import Rules
from research.errors import InputError
from research.models import blocks, kernels, virtual
from research.models.config import ModelConfig
from research.models.specs import Params, make_specs
from research.ops import quantized
from research.ops.attention import cached_attention
from research.ops.cpu import few_rows
from research.ops.rope import Angles

Entries = tuple[Float[Array, "B K h S"], Float[Array, "B K S h"]]  # keys and values of one layer
Cache = tuple[Entries, ...]  # of every layer

TIMES = (3, 2)  # the axis S of each
_AXES = (("batch", "kv_heads", "head_dim", None), ("batch", "kv_heads", None, "head_dim"))


def init_cache(c: ModelConfig, rules: Rules, batch_size: int, length: int) -> Cache:
    """An empty cache: zeros, in the compute dtype."""
    rows, h = (batch_size, c.num_kv_heads), c.dim_per_head

    def empty() -> Entries:
        shapes = (*rows, h, length), (*rows, length, h)
        return tuple(
            sharding.constrain(jnp.zeros(shape, c.dtype), axes, rules)
            for shape, axes in zip(shapes, _AXES, strict=True)
        )

    return tuple(empty() for _ in range(c.num_layers))


def unstack(c: ModelConfig, params: Params, rows: int = 1) -> Params:
    """See Model.unstack. Kernels are dequantised, merged with what an adapter puts beside them and cast to the compute
    dtype here, once, and those that read the same are joined. Those that steps of so many `rows` read turned
    (ops.cpu.few_rows) have the name `turned` in place of `kernel`; that of the head, `head_turned`, lies beside it."""
    specs, params = make_specs(c), virtual.realized(params)
    layers = (
        kernels.with_shared(params_lib.layer(params["layers"], i), params.get("vera")) for i in range(c.num_layers)
    )
    layers = (kernels.merge(quantized.read_all(layer, jnp.float32)) for layer in layers)
    rest = {name: values for name, values in params.items() if name not in ("layers", "vera")}
    unstacked = {
        **_in_compute_dtype(c, kernels.merge(rest), specs),
        "layers": tuple(_join(c, _in_compute_dtype(c, layer, specs["layers"])) for layer in layers),
    }
    turn = few_rows.apply(rows) and jnp.dtype(c.dtype) == jnp.float32 and c.precision == "dtype"
    return _turned(unstacked) if turn else unstacked


def _turned(params: Params) -> Params:
    """Of a model without stacks, the kernels of layers and head turned; a mixture's experts are read otherwise."""

    def visit(node: Params, contract: int) -> Params:
        if not isinstance(node, dict) or "router" in node:
            return node
        if "kernel" not in node:
            return {name: visit(part, 2 if name == "o" else 1) for name, part in node.items()}
        rest = {name: part for name, part in node.items() if name != "kernel"}
        return {**rest, "turned": few_rows.turned(node["kernel"], contract)}

    parts = ("attention", "mlp")
    layers = tuple({**layer, **{part: visit(layer[part], 1) for part in parts}} for layer in params["layers"])
    head = few_rows.turned(params["head"]) if "head" in params else params["embed"]
    return {**params, "layers": layers, "head_turned": head}


def _in_compute_dtype(c: ModelConfig, values: Params, specs: Params) -> Params:
    """The kernels in the compute dtype; what an adapter has added stays as it is."""
    if not isinstance(values, dict):
        return values.astype(c.dtype) if getattr(specs, "contracts", ()) else values
    return {name: _in_compute_dtype(c, part, specs.get(name, {})) for name, part in values.items()}


def _join(c: ModelConfig, p: Params) -> Params:
    """One layer with fewer, larger kernels, since with few tokens the time goes into reading kernels.

    qkv [D, K, G + 2, h] holds each key/value head after the G query heads that it serves; up_gate is [D, 2, F].
    """
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
    rules: Rules,
    params: Params,
    tokens: Int[Array, "B T"],
    positions: Int[Array, "B T"],
    mask: Bool[Array, "B T S"],
    cache: Cache,
    index: Int[Array, ""] | int,
) -> tuple[Float[Array, "B T D"], Cache]:
    """See Model.decode."""
    if not c.causal or c.num_labels:
        raise InputError(f"model: is {c.kind}, and can't generate. Use a causal language model.")
    rules = {**rules, "time": None}  # there is one token at a time
    positions = positions + virtual.prefix_size(params)
    angles = blocks.rotations(c, positions, jnp.max(positions, axis=1, keepdims=True) + 1)
    T, S = mask.shape[1:]
    age = index + jnp.arange(T)[:, None] - jnp.arange(S)[None, :]
    if c.prefix:  # a prompt's token may see a later one, in a window that reaches as far that way
        age = jnp.abs(age)
    step = _Step(c, rules, angles, mask, age, index)
    x, extended = blocks.embed(c, rules, params, tokens, positions), []
    for i, (p, entries) in enumerate(zip(params["layers"], cache, strict=True)):
        with jax.named_scope("layers"):
            p = blocks.with_divisors(c, p, i)
            x, entries = step.layer(x, p, entries, c.sliding_window[i % len(c.sliding_window)])
        extended.append(entries)
    return blocks.final(c, params, x), tuple(extended)


@dataclasses.dataclass(frozen=True, eq=False)
class _Step:
    """What all layers share in one pass of T tokens that reads and extends the cache.

    Attributes:
      angles: RoPE's, of layers without and with a window.
      mask: which cached entries each token may see, before windows.
      age: how many entries each cached one lies before the token's own; of a prefix LM, or after it.
      index: of the entry that the first token writes.
    """

    config: ModelConfig
    rules: Rules
    angles: tuple[Angles | None, Angles | None]
    mask: Bool[Array, "B T S"]
    age: Int[Array, "T S"]
    index: Int[Array, ""] | int

    def layer(
        self, x: Float[Array, "B T D"], p: Params, entries: Entries, window: int
    ) -> tuple[Float[Array, "B T D"], Entries]:
        """A layer's output, and its keys and values with those of the T tokens written."""
        c = self.config
        mask = self.mask & (self.age < window)[None] if window else self.mask
        angles = self.angles[1] if window else self.angles[0]

        def attend(y: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
            nonlocal entries
            q, k, v = blocks.project_qkv(c, p["attention"], y, angles)
            new = k.transpose(0, 2, 3, 1), v.swapaxes(1, 2)
            entries = tuple(map(self._write, entries, new, TIMES, _AXES))
            memory = virtual.memory(p["attention"], q.dtype, self.rules)
            y = cached_attention(q, *entries, mask, scale=c.scale, softcap=c.attention_softcap, memory=memory)
            return blocks.linear(p["attention"]["o"], y, contract=2, precision=c.precision)

        x, _ = blocks.block(c, self.rules, p, x, attend)
        return x, entries

    def _write(
        self, old: Float[Array, "B K *S"], new: Float[Array, "B K *T"], times: int, axes: tuple[str | None, ...]
    ) -> Float[Array, "B K *S"]:
        y = jax.lax.dynamic_update_slice_in_dim(old, new, self.index, axis=times)
        return sharding.constrain(y, axes, self.rules)
