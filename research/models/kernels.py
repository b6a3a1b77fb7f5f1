"""How a kernel is read: a linear map of the model, with what an adapter puts beside it.

Beside a kernel [*in, *out] may lie
  lora: a [*in, r], b [r, *out] and scale []: the map adds scale (x a) b (LoRA, arXiv:2106.09685, equation 3).

Axes: r rank, B batch.
"""

import zlib
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, Int

from research.models.specs import Params
from research.ops import quantized
from research.ops.cpu import matmul

ADDED = ("lora",)  # what may lie beside a kernel, and isn't the model's


def linear(p: Params, x: Float[Array, "..."], contract: int = 1) -> Float[Array, "..."]:
    """x [*rows, *in] times kernel [*in, *out], plus what an adapter adds, plus the bias if there is one.

    Args:
      p: kernel, and bias [*out] if there is one, and what lies beside them.
      x: floating; the product has its dtype.
      contract: the number of axes of *in.
    """
    return linears([p], x, contract)[0]


def linears(maps: Sequence[Params], x: Float[Array, "..."], contract: int = 1) -> list[Float[Array, "..."]]:
    """The same of several maps of one input. Their low-rank parts read it together, and leave out the same of it."""
    narrow = _narrow(maps, x, contract)
    outputs = []
    for p, low in zip(maps, narrow, strict=True):
        y = quantized.product(x, p["kernel"], contract)
        if low is not None:
            y = y + matmul.product(low * p["lora"]["scale"].astype(x.dtype), p["lora"]["b"].astype(x.dtype), 1)
        y = checkpoint_name(y, "linear")
        if "bias" in p:
            bias = p["bias"].astype(x.dtype)
            y = y + bias.reshape((1,) * (y.ndim - bias.ndim) + bias.shape)
        outputs.append(y)
    return outputs


def _narrow(maps: Sequence[Params], x: Float[Array, "..."], contract: int) -> list[Float[Array, "..."] | None]:
    """x times the a of each map that has one, [*rows, r]: one product, so that x is read once."""
    loras = [p["lora"] for p in maps if "lora" in p]
    if not loras:
        return [None] * len(maps)
    if "keys" in loras[0]:
        x = dropped(x, loras[0]["keys"], loras[0]["dropout"])
    a = jnp.concatenate([lora["a"] for lora in loras], axis=-1) if len(loras) > 1 else loras[0]["a"]
    low = matmul.matmul(x, a.astype(x.dtype), contract)
    parts = iter(jnp.split(low, _bounds([lora["a"].shape[-1] for lora in loras]), axis=-1))
    return [next(parts) if "lora" in p else None for p in maps]


def _bounds(sizes: Sequence[int]) -> list[int]:
    """Where to cut, so that the parts have these sizes."""
    return [sum(sizes[:i]) for i in range(1, len(sizes))]


def dropped(x: Float[Array, "B ..."], keys: jax.Array, rate: Float[Array, ""]) -> Float[Array, "B ..."]:
    """x with a share `rate` of its elements 0 and the others raised, so that the mean stays.

    Args:
      x: [B, ...].
      keys: uint32 [B, 2], a raw key for each row.
      rate: in steps of 2^-16.
    """
    least = jnp.round(rate * 2**16).astype(jnp.uint32)  # 16 random bits of each element are compared with it
    bits = jax.vmap(lambda key: jax.random.bits(key, x.shape[1:], jnp.uint16))(keys)
    kept = bits.astype(jnp.uint32) >= least
    raised = 1 / (1 - least.astype(jnp.float32) / 2**16)
    return jnp.where(kept, x * raised.astype(x.dtype), jnp.zeros_like(x))


def expert_linear(p: Params, dot: Callable[..., Array], x: Float[Array, "n I"]) -> Float[Array, "n O"]:
    """The map of each token's expert, with what an adapter adds.

    Args:
      p: kernel [E, I, O], and what lies beside it.
      dot: multiplies tokens, each by the matrix of its expert.
      x: the tokens.
    """
    y = dot(x, p["kernel"])
    if "lora" not in p:
        return y
    lora = p["lora"]
    return y + dot(dot(x, lora["a"]) * lora["scale"].astype(x.dtype), lora["b"])


def for_experts(p: Params) -> Params:
    """A map of experts, which may be cut over devices."""
    return {**p, "kernel": quantized.with_whole_scales(p["kernel"])}


def expert_axes(p: Params, into: str, out: str) -> Params:
    """The logical axes of a map of experts, in the shape of `p`."""
    lora = {"a": ("experts", into, "rank"), "b": ("experts", "rank", out), "scale": ()}
    axes = {"kernel": quantized.logical_axes(p["kernel"], ("experts", into, out)), "lora": lora}
    return {name: axes[name] for name in p}


def look_up(lora: Params, tokens: Int[Array, "B T"], dtype: Any) -> Float[Array, "B T D"]:
    """What a low-rank part adds to the embeddings of tokens; a is [V, r]."""
    low = lora["a"].astype(dtype)[tokens] * lora["scale"].astype(dtype)
    return matmul.matmul(low, lora["b"].astype(dtype), 1)


def merged(p: Params) -> Params:
    """A linear map with what lies beside its kernel [*lead, *in, *out] added to it: sums in float32, rounded once to
    the kernel's dtype, if it isn't quantised. The axes in front are those of layers and experts."""
    if not any(name in p for name in ADDED):
        return p
    dtype = jnp.float32 if quantized.kind_of(p["kernel"]) else p["kernel"].dtype
    kernel = quantized.read(p["kernel"], jnp.float32)
    kernel = (kernel + low_rank(p["lora"], kernel.shape)).astype(dtype)
    return {**{name: x for name, x in p.items() if name not in ADDED}, "kernel": kernel}


def low_rank(lora: Params, shape: tuple[int, ...]) -> Float[Array, "..."]:
    """scale a b, in float32 and the shape of the kernel [*lead, *in, *out] that it is added to."""
    a, b, scale = (lora[name].astype(jnp.float32) for name in ("a", "b", "scale"))
    lead = a.shape[: a.ndim + b.ndim - len(shape) - 2]
    scale = scale.reshape(scale.shape + (1,) * (len(lead) + 2 - scale.ndim))
    a, b = a.reshape(*lead, -1, a.shape[-1]), scale * b.reshape(*lead, a.shape[-1], -1)
    return jnp.matmul(a, b, precision="highest").reshape(shape)


def merge(params: Params) -> Params:
    """A model's parameters, or those of a layer, with every linear map and the embedding merged."""
    if not isinstance(params, dict):
        return params
    if "kernel" in params:
        return merged(params)
    if "embed_lora" in params:
        lora, embed = params["embed_lora"], params["embed"]
        total = embed.astype(jnp.float32) + low_rank(lora, embed.shape)
        params = {**{name: x for name, x in params.items() if name != "embed_lora"}, "embed": total.astype(embed.dtype)}
    return {name: merge(part) for name, part in params.items()}


def bare(params: Params) -> Params:
    """A model's parameters, or specs, without what adapters put beside its kernels."""
    if not isinstance(params, dict):
        return params
    parts = {name: bare(part) for name, part in params.items() if name.removeprefix("embed_") not in ADDED}
    return {name: part for name, part in parts.items() if not isinstance(part, dict) or part}


def with_dropout_keys(params: Params, keys: Array, number: Int[Array, "*n"] | int) -> Params:
    """The layers, or one of them, with a random key for each row of the batch in every map whose adapter leaves some of
    its input out. Maps of one input have the same keys.

    Args:
      params: params["layers"], or a layer's.
      keys: uint32 [B, 2].
      number: of the layer, or of each, counted from 0.
    """

    def visit(node: Params, path: tuple[str, ...]) -> Params:
        if not isinstance(node, dict):
            return node
        if path and path[-1] == "lora":
            name = "/".join(_INPUTS.get(part, part) for part in path)
            fold = lambda key, i: jax.random.fold_in(jax.random.fold_in(key, i), zlib.crc32(name.encode()))  # noqa: E731
            rows = jax.vmap(fold, (0, None))
            own = rows(keys, number) if jnp.ndim(number) == 0 else jax.vmap(rows, (None, 0))(keys, number)
            return {**node, "keys": own} if "dropout" in node else node
        return {name: visit(part, (*path, name)) for name, part in node.items()}

    return visit(params, ())


_INPUTS = {"q": "qkv", "k": "qkv", "v": "qkv", "up": "up_gate", "gate": "up_gate"}  # maps that read one input
