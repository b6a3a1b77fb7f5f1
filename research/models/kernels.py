"""How a kernel is read: a linear map of the model, with what an adapter puts beside it.

Beside a kernel W [*in, *out] may lie
  lora: a [*in, r], b [r, *out] and scale []: the map gives x W + scale (x a) b (LoRA, arXiv:2106.09685, equation 3).
    With magnitude [*out] that is magnitude (x W + scale (x a) b) / |W + scale a b|, the norm of each column (DoRA,
    arXiv:2402.09353, equation 5).
  vera: d [r] and out [*out]: it adds out (d (x A) B), A and B being the same in all maps, and not trained (VeRA,
    arXiv:2310.11454, equation 2).
  ia3: in [*in], which the input is multiplied by, or out [*out], which the output is (arXiv:2205.05638, section 3.3).
  probe: [6], which counts what products in 8 bits lose (ops/low_precision.py), while a train step makes its gradient.
These are in the kernel's dict, by these names, and stacked over layers as it is.

Axes: r rank, B batch, I and O all of *in and *out.
"""

import math
import zlib
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, Int

from research.models import virtual
from research.models.specs import Params
from research.ops import low_precision, quantized
from research.ops.cpu import few_rows, matmul

ADDED = ("lora", "vera", "ia3")  # what may lie beside a kernel, and isn't the model's


def linear(p: Params, x: Float[Array, "..."], contract: int = 1, precision: str = "dtype") -> Float[Array, "..."]:
    """x [*rows, *in] times kernel [*in, *out], with what an adapter puts beside it, plus the bias if there is one.

    Args:
      p: kernel, or for steps of few rows `turned` (decoding.unstack); bias [*out] if there is one, and what lies
        beside them.
      x: floating; the product has its dtype.
      contract: the number of axes of *in.
      precision: that of the product with the kernel; see ModelConfig. What lies beside it is in the dtype of x.
    """
    return linears([p], x, contract, precision)[0]


def linears(
    maps: Sequence[Params], x: Float[Array, "..."], contract: int = 1, precision: str = "dtype"
) -> list[Float[Array, "..."]]:
    """The same of several maps of one input. Their low-rank parts read it together, and leave out the same of it."""
    narrow = _narrow(maps, x, contract)
    outputs = []
    for p, low in zip(maps, narrow, strict=True):
        scales = p.get("ia3", {})
        y = x * _row(scales["in"], x) if "in" in scales else x
        if "turned" in p:
            y = few_rows.product(y, p["turned"], contract)
        elif precision == "dtype":
            y = quantized.product(y, p["kernel"], contract)
        else:
            y = low_precision.product(precision, contract, y, quantized.read(p["kernel"], y.dtype), p.get("probe"))
        if low is not None:
            y = y + _widened(p, low)
        if "magnitude" in p.get("lora", {}):
            norms = checkpoint_name(jax.lax.stop_gradient(column_norms(p)), "linear")
            y = y * _row(p["lora"]["magnitude"] / norms, y)
        y = checkpoint_name(y, "linear")
        if "bias" in p:
            y = y + _row(p["bias"], y)
        outputs.append(y * _row(scales["out"], y) if "out" in scales else y)
    return outputs


def _narrow(maps: Sequence[Params], x: Float[Array, "..."], contract: int) -> list[Float[Array, "..."] | None]:
    """x times the a of each map that has one, [*rows, r]: one product, so that x is read once."""
    lows = [p.get("lora", p.get("vera")) for p in maps]
    ones = [low for low in lows if low is not None]
    if not ones:
        return lows
    if "keys" in ones[0]:
        x = dropped(x, ones[0]["keys"], ones[0]["dropout"])
    shared = all("d" in low for low in ones)  # VeRA's maps of one input have the same a
    a = ones[0]["a"] if shared or len(ones) == 1 else jnp.concatenate([low["a"] for low in ones], axis=-1)
    y = matmul.matmul(x, a.astype(x.dtype), contract)
    parts = iter([y] * len(ones) if shared else jnp.split(y, _bounds([low["a"].shape[-1] for low in ones]), axis=-1))
    return [None if low is None else next(parts) for low in lows]


def _widened(p: Params, low: Float[Array, "..."]) -> Float[Array, "..."]:
    """What the low-rank part of a map gives, from its inner values [*rows, r]."""
    if "vera" in p:
        vera = p["vera"]
        y = matmul.product(low * _row(vera["d"], low), vera["b"].astype(low.dtype), 1)
        return y * _row(vera["out"], y)
    return matmul.product(low * p["lora"]["scale"].astype(low.dtype), p["lora"]["b"].astype(low.dtype), 1)


def _row(values: Float[Array, "*n"], y: Float[Array, "..."]) -> Float[Array, "..."]:
    """Values for the last axes of y, in its dtype, broadcast over the others."""
    return values.astype(y.dtype).reshape((1,) * (y.ndim - values.ndim) + values.shape)


def column_norms(p: Params) -> Float[Array, "*lead_out"]:
    """The norms, over what is summed over, of a kernel with its low-rank part: |W + s A B| (DoRA, arXiv:2402.09353,
    equation 5), in float32. Of W^2 + 2 s W A B + s^2 (A B)^2 no part is as large as the kernel but W^2.

    Args:
      p: kernel [*lead, *in, *out] and lora.
    """
    kernel = quantized.read(p["kernel"], jnp.float32)
    a, b, scale, lead, shape = flat(p["lora"], kernel.shape)
    w = kernel.reshape(*lead, a.shape[-2], -1)
    b = b * scale
    cross = jnp.sum(jnp.matmul(a.swapaxes(-1, -2), w, precision="highest") * b, axis=-2)
    square = jnp.sum(jnp.matmul(jnp.matmul(a.swapaxes(-1, -2), a, precision="highest"), b, precision="highest") * b, -2)
    return jnp.sqrt(jnp.sum(jnp.square(w), axis=-2) + 2 * cross + square).reshape(*lead, *shape)


def flat(lora: Params, shape: tuple[int, ...]) -> tuple[Array, Array, Array, tuple[int, ...], tuple[int, ...]]:
    """Of a low-rank part beside a kernel of a shape: a [*lead, I, r], b [*lead, r, O] and scale [*lead, 1, 1], in
    float32, the axes in front and those of outputs."""
    a, b, scale = (lora[name].astype(jnp.float32) for name in ("a", "b", "scale"))
    lead = a.shape[: a.ndim + b.ndim - len(shape) - 2]
    scale = scale.reshape(scale.shape + (1,) * (len(lead) + 2 - scale.ndim))
    out = b.shape[len(lead) + 1 :]
    return a.reshape(*lead, -1, a.shape[-1]), b.reshape(*lead, b.shape[len(lead)], -1), scale, lead, out


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


def merged(p: Params, lead: int = 0) -> Params:
    """A linear map with what lies beside its kernel [*lead, *in, *out] merged into it: in float32, rounded once to the
    kernel's dtype, if it isn't quantised. `lead` counts the axes of layers in front."""
    if not any(name in p for name in ADDED):
        return p
    dtype = jnp.float32 if quantized.kind_of(p["kernel"]) else p["kernel"].dtype
    kernel = quantized.read(p["kernel"], jnp.float32)
    result = {name: x for name, x in p.items() if name not in ADDED}
    if "lora" in p:
        total = kernel + low_rank(p["lora"], kernel.shape)
        if "magnitude" in p["lora"]:
            total = total * _of_outputs(p["lora"]["magnitude"] / column_norms(p), total, lead)
        kernel = total
    if "vera" in p:
        d, out, a, b = (p["vera"][name] for name in ("d", "out", "a", "b"))
        a, b = a.reshape(-1, a.shape[-1]), b.reshape(b.shape[0], -1)
        total = jnp.einsum("ir,...r,ro->...io", a, d, b, precision="highest").reshape(kernel.shape)
        kernel = kernel + total * _of_outputs(out, total, lead)
    if "in" in p.get("ia3", {}):
        scales = p["ia3"]["in"]
        kernel = kernel * scales.reshape(scales.shape + (1,) * (kernel.ndim - scales.ndim))
    if "out" in p.get("ia3", {}):
        kernel = kernel * _of_outputs(p["ia3"]["out"], kernel, lead)
        if "bias" in p:
            result["bias"] = p["bias"] * p["ia3"]["out"]
    return {**result, "kernel": kernel.astype(dtype)}


def _of_outputs(values: Float[Array, "*lead_out"], kernel: Float[Array, "..."], lead: int) -> Float[Array, "..."]:
    """Values of outputs, broadcast over the inputs of a kernel [*lead, *in, *out]."""
    return values.reshape(*values.shape[:lead], *(1,) * (kernel.ndim - values.ndim), *values.shape[lead:])


def low_rank(lora: Params, shape: tuple[int, ...]) -> Float[Array, "..."]:
    """scale a b, in float32 and the shape of the kernel [*lead, *in, *out] that it is added to."""
    a, b, scale, _, _ = flat(lora, shape)
    return jnp.matmul(a, scale * b, precision="highest").reshape(shape)


def merge(params: Params, lead: int = 0) -> Params:
    """A model's parameters, or those of a layer, with every linear map and the embedding merged.

    Args:
      params: nested dicts. What is under "layers" is stacked.
      lead: how many axes of layers are in front of all.
    """
    if not isinstance(params, dict):
        return params
    if "kernel" in params:
        return merged(params, lead)
    if "vera" in params:
        params = {name: with_shared(part, params["vera"]) for name, part in params.items() if name != "vera"}
    if "embed_lora" in params:
        lora, embed = params["embed_lora"], params["embed"]
        total = embed.astype(jnp.float32) + low_rank(lora, embed.shape)
        params = {**{name: x for name, x in params.items() if name != "embed_lora"}, "embed": total.astype(embed.dtype)}
    return {name: merge(part, 1 if name == "layers" else lead) for name, part in params.items()}


def _shape(kernel: Any) -> tuple[int, ...]:
    return quantized.shape(kernel) if quantized.kind_of(kernel) else kernel.shape


def with_shared(params: Params, shared: Params | None) -> Params:
    """Layers, or one, with the part of VeRA's shared matrices that each map reads beside its vectors.

    Args:
      params: nested dicts of maps.
      shared: a [I, r] and b [r, O] for the largest map; None where there are none.
    """
    if shared is None or not isinstance(params, dict):
        return params
    if "vera" not in params:
        return {name: with_shared(part, shared) for name, part in params.items()}
    kernel, vera = _shape(params["kernel"]), params["vera"]
    lead = vera["d"].ndim - 1
    outs = vera["out"].shape[lead:]
    ins = kernel[lead : len(kernel) - len(outs)]
    a, b = shared["a"][: math.prod(ins)], shared["b"][:, : math.prod(outs)]
    matrices = {"a": a.reshape(*ins, -1), "b": b.reshape(-1, *outs)}
    return {**params, "vera": {**vera, **matrices}}


def bare(params: Params) -> Params:
    """A model's parameters, or specs, without what adapters put beside its kernels, and before documents."""
    if not isinstance(params, dict):
        return params
    names = (*ADDED, *virtual.PARTS)
    parts = {name: bare(part) for name, part in params.items() if name.removeprefix("embed_") not in names}
    return {name: part for name, part in parts.items() if not isinstance(part, dict) or part}


def still_zero(params: Params) -> list[Array]:
    """Of each map whose adapter begins as 0 and trains away from it, whether all of that is 0 still; bool scalars.

    Args:
      params: of a model, or some of them.
    """
    names = {"lora": "b", "embed_lora": "a", "vera": "out"}
    flags = []
    for name, part in params.items() if isinstance(params, dict) else ():
        leaf = part.get(names[name]) if name in names and isinstance(part, dict) else None
        flags += [~jnp.any(leaf)] if leaf is not None else still_zero(part)
    return flags


def probes(params: Params, value: Float[Array, ""]) -> Params:
    """A probe for each linear map of a model's layers, to be joined with its parameters.

    Args:
      params: of a model; of one that has only a head of its own there are none.
      value: 1 to count, 0 not to.
    """

    def visit(node: Params) -> Params:
        if "kernel" in node:
            layers = jax.tree.leaves(node["kernel"])[0].shape[0]
            return {"probe": jnp.broadcast_to(value, (layers, low_precision.COUNTS))}
        return {name: visit(part) for name, part in node.items() if isinstance(part, dict)}

    return {"layers": visit(params["layers"])} if "layers" in params else {}


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
        if path and path[-1] in ("lora", "vera"):
            name = "/".join(_INPUTS.get(part, part) for part in path)
            fold = lambda key, i: jax.random.fold_in(jax.random.fold_in(key, i), zlib.crc32(name.encode()))  # noqa: E731
            rows = jax.vmap(fold, (0, None))
            own = rows(keys, number) if jnp.ndim(number) == 0 else jax.vmap(rows, (None, 0))(keys, number)
            return {**node, "keys": own} if "dropout" in node else node
        return {name: visit(part, (*path, name)) for name, part in node.items()}

    return visit(params, ())


_INPUTS = {"q": "qkv", "k": "qkv", "v": "qkv", "up": "up_gate", "gate": "up_gate"}  # maps that read one input
