"""What adapters put in front of every document: virtual tokens, and keys and values that every query sees.

Beside a model's parameters may lie
  prompt: rows [P, D], the inputs of the first layer at the P virtual tokens, whose ids are vocab_size, vocab_size + 1,
    ... (prompt tuning, arXiv:2104.08691);
  layers/attention/prefix: keys and values [L, P, K, h] of each layer, outside the cache (prefix tuning,
    arXiv:2101.00190). Positions of real tokens begin after them.
In training either may be computed by a small network from parameters of its own; `realized` gives what it computes.

Axes: P virtual tokens or entries of a prefix, D model, K key/value heads, h head dimension, L layers, E hidden units,
B batch, T time.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from research import params as params_lib
from research.devices import sharding
from research.devices.sharding import Rules
from research.models.specs import Params
from research.ops.scores import Memory

PARTS = ("prompt", "prefix", "prefix_encoder")  # what lies beside a model's own parameters, wherever it lies

_EXACT = jax.lax.Precision.HIGHEST


def realized(params: Params) -> Params:
    """A model's parameters, or those of a role, with the rows, keys and values that small networks compute."""
    if "prompt" in params and "rows" not in params["prompt"]:
        params = {**params, "prompt": {"rows": _prompt_rows(params["prompt"])}}
    if "prefix_encoder" not in params:
        return params
    hidden = _prefix_hidden(params["prefix_encoder"])
    layers, rest = params["layers"], {name: part for name, part in params.items() if name != "prefix_encoder"}
    if "attention" in layers:
        return {**rest, "layers": _with_entries(layers, hidden)}
    return {**rest, "layers": {name: _with_entries(piece, hidden) for name, piece in layers.items()}}


def _prompt_rows(p: Params) -> Float[Array, "P D"]:
    """PEFT's PromptEncoder with an MLP: two hidden layers with ReLU."""
    x = jax.nn.relu(_affine(p["inner"], p["embed"]))
    return _affine(p["outer"], jax.nn.relu(_affine(p["middle"], x)))


def _prefix_hidden(p: Params) -> Float[Array, "P E"]:
    """The first half of PEFT's PrefixEncoder with a projection; the second is of each layer."""
    return jnp.tanh(_affine(p["inner"], p["embed"]))


def _affine(p: Params, x: Float[Array, "P n"]) -> Float[Array, "P m"]:
    return jnp.matmul(x, p["kernel"], precision=_EXACT) + p["bias"][None]


def _with_entries(layers: Params, hidden: Float[Array, "P E"]) -> Params:
    """A stack of layers with the keys and values of its prefixes, from what computes them."""
    p = layers["attention"]["prefix"]
    keys, values = (
        jnp.einsum("pe,lekh->lpkh", hidden, p[f"{name}_kernel"], precision=_EXACT) + p[f"{name}_bias"][:, None]
        for name in ("keys", "values")
    )
    return {**layers, "attention": {**layers["attention"], "prefix": {"keys": keys, "values": values}}}


def prefix_size(params: Params) -> int:
    """How many entries a model's prefixes have, by its `realized` parameters; 0 without any. The layers may be stacked,
    in pieces, or a tuple."""
    layers = params["layers"]
    if isinstance(layers, Mapping):
        layers = [layers] if "attention" in layers else list(layers.values())
    prefix = layers[0]["attention"].get("prefix") if layers else None
    return 0 if prefix is None else prefix["keys"].shape[-3]


def memory(attention: Params, dtype: Any, rules: Rules) -> Memory | None:
    """The prefix of one layer as attention takes it; None without one.

    Args:
      attention: the parameters of its attention, `realized`.
      dtype: of its queries.
      rules: of the model.
    """
    if "prefix" not in attention:
        return None
    axes = ("virtual_tokens", "kv_heads", "head_dim")
    return Memory(*(sharding.constrain(attention["prefix"][n].astype(dtype), axes, rules) for n in ("keys", "values")))


def put_rows(params: Params, vocab_size: int, tokens: Int[Array, "B T"], x: Float[Array, "B T D"]) -> Array:
    """The inputs of the first layer with the rows of virtual tokens in their places, [B, T, D].

    Args:
      params: of the model, `realized`.
      vocab_size: ids from here on are virtual.
      tokens: ids.
      x: the embeddings of the others.
    """
    if "prompt" not in params:
        return x
    rows = params["prompt"]["rows"].astype(x.dtype)
    number = tokens - vocab_size
    own = rows[jnp.clip(number, 0, rows.shape[0] - 1)]
    return jnp.where((number >= 0)[:, :, None], own, x)


def ahead(model: Any, tokens: Int[Array, "B P"], lengths: Int[Array, " B"]) -> tuple[Array, Array]:
    """Prompts that are padded on the left, and their lengths, with the model's virtual tokens in front of each.

    A row of length 0, which only fills a batch, stays empty.
    """
    count = model.virtual_tokens
    if not count:
        return tokens, lengths
    longer = jnp.pad(tokens, ((0, 0), (count, 0)))
    number = jnp.arange(longer.shape[1], dtype=jnp.int32)[None] - (tokens.shape[1] - lengths)[:, None]
    is_virtual = (number >= 0) & (number < count) & (lengths > 0)[:, None]
    ids = model.config.vocab_size + jnp.clip(number, 0, count - 1)
    return jnp.where(is_virtual, ids.astype(tokens.dtype), longer), jnp.where(lengths > 0, lengths + count, 0)


def hidden(model: Any, params: Params, batch: Mapping[str, jax.Array]) -> Float[Array, "B T D"]:
    """model.hidden of rows that hold one document each, from the first place on, with the model's virtual tokens in
    front of each; those of the tokens of the batch alone.

    Args:
      model: with virtual tokens or without.
      params: of the model.
      batch: tokens, segment_ids, positions and others [B, T], without virtual tokens.
    """
    count = model.virtual_tokens
    if not count:
        return model.hidden(params, batch)
    B = batch["tokens"].shape[0]
    ids = jnp.broadcast_to(model.config.vocab_size + jnp.arange(count, dtype=jnp.int32), (B, count))
    first = {name: jnp.broadcast_to(x[:, :1], (B, count)) for name, x in batch.items()}
    first |= {"tokens": ids, "positions": jnp.broadcast_to(jnp.arange(count, dtype=jnp.int32), (B, count))}
    rest = {**batch, "positions": batch["positions"] + count}
    rows = {name: jnp.concatenate([first[name], rest[name]], axis=1) for name in batch}
    return model.hidden(params, rows)[:, count:]


def cyclic(ids: Sequence[int], count: int) -> list[int]:
    """`count` ids: the first of a text's, which begin anew where there are too few (PEFT's rule)."""
    return [ids[i % len(ids)] for i in range(count)]


def without(batch: Mapping[str, jax.Array], count: int) -> dict[str, jax.Array]:
    """A batch as a model sees it that lacks its `count` virtual tokens: these are padding, and positions begin after
    them at 0."""
    is_virtual = batch["virtual"] > 0
    rest = {name: x for name, x in batch.items() if name != "virtual"}
    masked = {name: jnp.where(is_virtual, 0, rest[name]) for name in ("tokens", "segment_ids")}
    return rest | masked | {"positions": jnp.maximum(rest["positions"] - count, 0)}


def entries(params: Params) -> Float[Array, "P N"]:
    """The prefixes of all layers as PEFT holds them: [P, L * 2 * K * h], keys before values in each layer.

    Args:
      params: of a model; its layers may be in pieces.
    """
    layers = params_lib.stacked(realized(params))["layers"]
    both = jnp.stack([layers["attention"]["prefix"][name] for name in ("keys", "values")], axis=1)  # [L, 2, P, K, h]
    return both.transpose(2, 0, 1, 3, 4).reshape(both.shape[2], -1)


def from_entries(
    table: Float[Array, "P N"], shape: tuple[int, int, int, int]
) -> tuple[Float[Array, "L P K h"], Float[Array, "L P K h"]]:
    """Keys and values of all layers, of this shape [L, P, K, h], from what `entries` gives."""
    L, P, K, h = shape
    both = table.reshape(P, L, 2, K, h).transpose(2, 1, 0, 3, 4)
    return both[0], both[1]
