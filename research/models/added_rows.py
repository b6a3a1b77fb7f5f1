"""Rows of embedding and head for tokens that were added to a model, held as parameters of their own.

`embed_added` and, where the head has some of its own, `head_added` and `head_bias_added` stand in the place of the rows
of config.added_rows tokens from config.added_from on. So they may be a group of the optimizer, or be trained alone. In
files there is one whole matrix: `join` makes it, and `grow` takes it apart.

Axes: D model, V vocabulary, n added tokens.
"""

import dataclasses
from collections.abc import Mapping

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from research.errors import InputError, did_you_mean
from research.models.config import ModelConfig
from research.models.specs import Params, Specs, make_specs
from research.params import ParamSpec

RULES = ("mean", "random")  # how new rows begin; see `grow`
_ADDED = {"embed": "embed_added", "head": "head_added", "head_bias": "head_bias_added"}
_UNIT = 128  # a vocabulary that grows has a multiple of so many rows: whole tiles, divisible by any mesh


def check(rule: str, field: str) -> None:
    """Raises InputError where `rule`, which the config has in `field`, isn't one of RULES."""
    if rule not in RULES:
        raise InputError(f"{field} = {rule!r}: no such choice.{did_you_mean(rule, RULES)}")


def grown_size(rows: int, tokens: int) -> int:
    """V of a model of so many rows that is to have so many tokens: it stays where there is room."""
    return rows if tokens <= rows else -(-tokens // _UNIT) * _UNIT


def whole(c: ModelConfig) -> ModelConfig:
    """The config of the same model with its rows in one matrix."""
    return dataclasses.replace(c, added_from=0, added_rows=0)


def apart(c: ModelConfig, specs: Specs) -> Specs:
    """The specs of a model whose added rows lie apart, from those of `whole(c)`, whose dtypes they have."""
    own = make_specs(c)
    parts = {b: dataclasses.replace(own[b], dtype=specs[a].dtype) for a, b in _ADDED.items() if b in own}
    return {**specs, **parts}


def join(c: ModelConfig, values: Params) -> Params:
    """The parameters of `grown_names` in `whole(c)`."""
    return {name: put(c, values[name], values[_ADDED[name]], _axis(name)) for name in grown_names(c)}


def put(c: ModelConfig, x: Float[Array, "..."], added: Float[Array, "..."], axis: int) -> Float[Array, "..."]:
    """`x` with `added` in the place of the added tokens along `axis`: a choice of each element, since it may be
    sharded."""
    around = [(0, 0)] * x.ndim
    around[axis] = (c.added_from, x.shape[axis] - c.added_from - c.added_rows)
    return jnp.where(_is_added(c, x, axis), jnp.pad(added.astype(x.dtype), around), x)


def look_up(c: ModelConfig, params: Params, tokens: Int[Array, "B T"]) -> Float[Array, "B T D"]:
    """The embeddings of tokens, in the compute dtype."""
    x = params["embed"].astype(c.dtype)[tokens]
    if not c.added_rows:
        return x
    number = tokens - c.added_from
    own = params["embed_added"].astype(c.dtype)[jnp.clip(number, 0, c.added_rows - 1)]
    return jnp.where(((number >= 0) & (number < c.added_rows))[:, :, None], own, x)


def grown_names(c: ModelConfig) -> list[str]:
    """The parameters of which added tokens have rows of their own."""
    specs = make_specs(c)
    return [name for name, own in _ADDED.items() if own in specs]


def noise_specs(c: ModelConfig) -> Specs:
    """Of the standard normal numbers that `grow` needs: {"embed_added": [n, D], ...}."""
    normal, specs = jax.nn.initializers.normal(1.0), make_specs(c)
    return {_ADDED[name]: dataclasses.replace(specs[_ADDED[name]], init=normal) for name in grown_names(c)}


def before(c: ModelConfig, specs: Specs, rows: int) -> Specs:
    """Specs of a model as it was before tokens were added, with so many rows; their dtypes stay."""
    result = {name: spec for name, spec in specs.items() if name not in _ADDED.values()}
    for name in grown_names(c):
        spec: ParamSpec = result[name]
        shape = tuple(rows if axis == "vocab" else size for axis, size in zip(spec.axes, spec.shape, strict=True))
        axes = tuple("added_tokens" if axis == "vocab" else axis for axis in spec.axes)  # they may not be divisible
        result[name] = dataclasses.replace(spec, shape=shape, axes=axes)
    return result


def grow(c: ModelConfig, values: Params, noise: Mapping[str, Array]) -> Params:
    """The parameters of `grown_names` once tokens were added to a model, and of the added rows.

    The tokens before config.added_from are the others. Each new row is their mean (Hewitt 2021, "Initializing New Word
    Embeddings for Pretrained Language Models", and the default of transformers); with `noise` it is drawn around it
    with the standard deviation of the others, each dimension by itself. A new token whose id is one of a padded
    vocabulary begins like the others: what lies there was never trained to mean anything. Rows that only pad V are
    means.

    Args:
      c: with added rows.
      values: the model's before, with as many rows or fewer.
      noise: drawn by `noise_specs`; {} for means.
    """
    result = {}
    for name in grown_names(c):
        x = values[name]
        axis, own = _axis(name), _ADDED[name]
        others = jax.lax.slice_in_dim(x, 0, c.added_from, axis=axis).astype(jnp.float32)
        mean = jnp.mean(others, axis=axis, keepdims=True)
        around = [(0, 0)] * x.ndim
        around[axis] = (0, c.vocab_size - x.shape[axis])
        beyond = jax.lax.broadcasted_iota(jnp.int32, _row(x, axis, c.vocab_size), axis) >= x.shape[axis]
        result[name] = jnp.where(beyond, mean.astype(x.dtype), jnp.pad(x, around))
        shape = [c.added_rows if i == axis else size for i, size in enumerate(x.shape)]
        added = jnp.broadcast_to(mean, shape)
        if noise:
            added += jnp.std(others, axis=axis, keepdims=True) * noise[own]
        result[own] = added.astype(x.dtype)
    return result


def _axis(name: str) -> int:
    """Along which an array has the vocabulary."""
    return 1 if name == "head" else 0


def _is_added(c: ModelConfig, x: Array, axis: int) -> Array:
    tokens = jax.lax.broadcasted_iota(jnp.int32, _row(x, axis, x.shape[axis]), axis)
    return (tokens >= c.added_from) & (tokens < c.added_from + c.added_rows)


def _row(x: Array, axis: int, size: int) -> tuple[int, ...]:
    """A shape that broadcasts against `x`, with `size` along `axis`."""
    return tuple(size if i == axis else 1 for i in range(x.ndim))
