"""Kernels that are held in 4 or 8 bits, and the products that read them.

A kernel [*lead, n] that isn't trained may be a dict in the place of the array. The last axis is cut into m blocks of b
numbers, and a block's numbers are multiples of the largest of them:
  {"nf4": uint8 [*lead, m, b / 2], "scale": uint8 [*lead, m], "top": float32}, two numbers a byte: the first half of a
    block in the low bits, the other in the high ones. They are codes of NF4 (QLoRA, arXiv:2305.14314, section 3). Its
    scales are in 8 bits too (double quantisation): multiples of the largest of a group of them along another axis,
    which `top` holds. In the shape of `top` that axis is as many times shorter as a group has scales.
  {"int8": int8 [*lead, m, b], "scale": float32 [*lead, m]}.
A block lies within a device, whatever the mesh, and no layer shares a number with another: a layer is cut from a stack
as of any other kernel. All that reads kernels takes them through `read`, `product` or `product_by_expert`, so that one
kernel is dequantised at a time, for the backward pass anew.

Axes: M tokens, I and O what goes into and out of a product, E experts.
"""

import dataclasses
import functools
import itertools
import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from research import params
from research.errors import InputError
from research.ops.cpu import matmul
from research.params import ParamSpec

Kernel = Any  # an array, or a dict as above
Tree = Any  # a pytree

KINDS = ("int8", "nf4")
BLOCK = 64  # the most numbers in a block (QLoRA, section 4)
_LEAST = 8  # of smaller blocks the scales would take as much room as the numbers
_GROUP = 256  # the most scales in a group (QLoRA, section 3)
# The quantiles of a normal distribution that QLoRA's appendix E derives, as bitsandbytes has them in float32.
NF4 = (
    -1.0,
    -0.6961928009986877,
    -0.5250730514526367,
    -0.39491748809814453,
    -0.28444138169288635,
    -0.18477343022823334,
    -0.09105003625154495,
    0.0,
    0.07958029955625534,
    0.16093020141124725,
    0.24611230194568634,
    0.33791524171829224,
    0.44070982933044434,
    0.5626170039176941,
    0.7229568362236023,
    1.0,
)


def kind_of(kernel: Kernel) -> str | None:
    """The kind of a quantised kernel, or of its specs; None of any other tree."""
    return next((kind for kind in KINDS if kind in kernel), None) if isinstance(kernel, Mapping) else None


@dataclasses.dataclass(frozen=True)
class _Undrawn:
    """Stands for the initial values of a quantised kernel, which are drawn before it is quantised."""

    kernel: ParamSpec

    def __call__(self, key: jax.Array, shape: tuple[int, ...], dtype: Any) -> jax.Array:
        raise TypeError("a quantised kernel has no initial values: draw those of `float_specs`, and `hold` them")


def specs(kernel: ParamSpec, kind: str, name: str) -> dict[str, ParamSpec]:
    """The specs of a kernel [*lead, n] that is held quantised, and cut into as many parts by the mesh as it was.

    Args:
      kernel: its last axis is cut into blocks.
      kind: of KINDS.
      name: of the kernel, for errors.

    Raises:
      InputError: its last axis can't be cut.
    """
    size, nf4 = kernel.shape[-1], kind == "nf4"
    block = next((b for b in range(BLOCK, _LEAST - 1, -2) if size % b == 0), 0)
    if not block:
        raise InputError(
            f"frozen_dtype = {kind!r}: the last axis of {name} has {size} numbers, which can't be cut into blocks of "
            f"an even number from {_LEAST} to {BLOCK}. Set it to 'bfloat16'."
        )
    shape, axes = (*kernel.shape[:-1], size // block), _axes(kernel.axes)
    undrawn = _Undrawn(dataclasses.replace(kernel, dtype=jnp.float32))
    each = 2 if nf4 else 1
    values = ParamSpec((*shape, block // each), (*axes, "block"), undrawn, (), jnp.uint8 if nf4 else jnp.int8, each)
    scale = ParamSpec(shape, axes, undrawn, (), jnp.uint8 if nf4 else jnp.float32, 0)
    if not nf4:
        return {kind: values, "scale": scale}
    group, i = max((_group(shape[i]), -i) for i in range(len(shape)) if axes[i] not in ("layers", "experts"))
    tops = tuple(n // group if j == -i else n for j, n in enumerate(shape))
    along = tuple("block" if j == -i else axis for j, axis in enumerate(axes))
    return {kind: values, "scale": scale, "top": ParamSpec(tops, along, undrawn, (), jnp.float32, 0)}


def _axes(axes: tuple[str, ...]) -> tuple[str, ...]:
    """Of a kernel's rows of blocks, from those of the kernel. What cuts "embed", the last axis of maps back to the
    residual stream, cuts the axis before it: D may not be so many whole blocks on each device."""
    return (*axes[:-2], f"{axes[-2]}+embed", "block") if axes[-1] == "embed" else axes


def _group(size: int) -> int:
    """The most scales of a group along an axis of so many."""
    return next(n for n in range(min(size, _GROUP), 0, -1) if size % n == 0)


def held_in(tree: Tree, kind: str) -> Tree:
    """The specs of a model, or of a part, with the kernels of its layers' linear maps quantised: of attention, MLPs and
    experts. Routers, norms, biases, embeddings and what follows the layers stay as they are.

    Raises:
      InputError: a kernel can't be cut into blocks.
    """

    def visit(node: Tree, path: tuple[str, ...]) -> Tree:
        if not isinstance(node, Mapping):
            linear = path[-1:] == ("kernel",) and node.axes[0] == "layers" and "router" not in path
            return specs(node, kind, "/".join(path)) if linear else node
        return {name: visit(part, (*path, name)) for name, part in node.items()}

    return visit(tree, ())


def _map(f: Callable[[Kernel], Any], tree: Tree) -> Tree:
    """Applies `f` to the quantised kernels of nested dicts; all else stays."""
    if not isinstance(tree, Mapping):
        return tree
    return f(tree) if kind_of(tree) else {name: _map(f, part) for name, part in tree.items()}


def any_in(tree: Tree) -> bool:
    """Whether a kernel of nested dicts is quantised."""
    return isinstance(tree, Mapping) and (bool(kind_of(tree)) or any(any_in(part) for part in tree.values()))


def float_specs(tree: Tree) -> Tree:
    """The specs of the same parameters, none of them quantised."""

    def one(node: Mapping[str, ParamSpec]) -> ParamSpec:
        return dataclasses.replace(node["scale"].init.kernel, shape=shape(node))

    return _map(one, tree)


def kernel_by_kernel(tree: Tree) -> list[Tree]:
    """Nested dicts that make up `tree`: all that isn't quantised in one, then one for each quantised kernel."""
    if not isinstance(tree, Mapping):
        return [tree]
    rest, kernels = {}, []
    for name, part in tree.items():
        if kind_of(part):
            kernels.append({name: part})
            continue
        first, *others = kernel_by_kernel(part)
        rest |= {name: first} if first or not isinstance(part, Mapping) else {}
        kernels += [{name: other} for other in others]
    return [rest, *kernels]


def shape(kernel: Mapping[str, Any]) -> tuple[int, ...]:
    """Of the kernel [*lead, n] that a quantised one, or its specs, stands for."""
    kind = kind_of(kernel)
    *lead, blocks, block = kernel[kind].shape
    return (*lead, blocks * block * (2 if kind == "nf4" else 1))


def hold(values: Tree, like: Tree) -> Tree:
    """Parameters as their specs say: quantised, or cast. What is quantised already stays.

    Args:
      values: nested dicts of arrays; kernels may lack the axes of stacks.
      like: the specs.
    """
    if not isinstance(like, Mapping):
        return jax.tree.map(lambda spec, x: x.astype(spec.dtype), like, values, is_leaf=params.is_spec)
    if kind_of(like):
        return values if kind_of(values) else quantize(values, like)
    return {name: hold(values[name], part) for name, part in like.items()}


def quantize(x: Float[Array, "*lead n"], like: Mapping[str, ParamSpec]) -> dict[str, Array]:
    """A kernel in the form of its specs; it may lack the axes of stacks that they begin with."""
    kind = kind_of(like)
    block = like[kind].shape[-1] * (2 if kind == "nf4" else 1)
    x = x.astype(jnp.float32).reshape(*x.shape[:-1], -1, block)
    largest = _largest(x, axis=-1)
    if kind == "int8":
        scale = largest / 127
        return {kind: jnp.round(_divided(x, scale)).astype(jnp.int8), "scale": scale}
    stack = len(like["scale"].shape) - largest.ndim
    factors = [a // b for a, b in zip(like["scale"].shape[stack:], like["top"].shape[stack:], strict=True)]
    grouped = largest.reshape([n for size, f in zip(largest.shape, factors, strict=True) for n in (size // f, f)])
    top = _largest(grouped, axis=tuple(range(1, grouped.ndim, 2)))
    scale = jnp.round(255 * _ratio(largest, _spread(top, largest.shape)))
    scale = jnp.maximum(scale, 1).astype(jnp.uint8)  # a block beside far larger ones isn't lost altogether
    x = _divided(x, _scales(scale, top))
    codes = jnp.zeros(x.shape, jnp.uint8)
    for low, high in itertools.pairwise(NF4):
        codes += (x > (low + high) / 2).astype(jnp.uint8)
    return {kind: codes[..., : block // 2] | codes[..., block // 2 :] << 4, "scale": scale, "top": top}


def _largest(x: Float[Array, "..."], axis: int | tuple[int, ...]) -> Float[Array, "..."]:
    """The largest magnitude; NaN where not all are finite, which XLA's maximum may pass over."""
    return jnp.where(jnp.all(jnp.isfinite(x), axis=axis), jnp.max(jnp.abs(x), axis=axis), jnp.nan)


def _divided(x: Float[Array, "*n b"], scale: Float[Array, "*n"]) -> Float[Array, "*n b"]:
    return _ratio(x, scale[..., None])


def _ratio(x: Float[Array, "..."], y: Float[Array, "..."]) -> Float[Array, "..."]:
    return x / jnp.where(y == 0, 1, y)


def _spread(top: Float[Array, "..."], shape: tuple[int, ...]) -> Float[Array, "..."]:
    """The largest scale of each scale's group."""
    for axis, size in enumerate(shape):
        if size != top.shape[axis]:
            top = jnp.repeat(top, size // top.shape[axis], axis=axis)
    return top


def _scales(scale: Array, top: Float[Array, "..."]) -> Float[Array, "..."]:
    return scale.astype(jnp.float32) * (_spread(top, scale.shape) / 255)


def dequantize(kernel: Mapping[str, Array]) -> Float[Array, "*lead n"]:
    """The kernel in float32."""
    kind = kind_of(kernel)
    values, scale = kernel[kind], kernel["scale"]
    if kind == "nf4":
        codes = jnp.concatenate([values & 15, values >> 4], axis=-1)
        values = jnp.asarray(np.array(NF4, np.float32)).at[codes].get(mode="promise_in_bounds")
    if "top" in kernel:
        scale = _scales(scale, kernel["top"])
    return (values.astype(jnp.float32) * scale[..., None]).reshape(shape(kernel))


def read(kernel: Kernel, dtype: Any) -> Float[Array, "..."]:
    """A kernel in `dtype`, in whichever way it is held."""
    return (dequantize(kernel) if kind_of(kernel) else kernel).astype(dtype)


def read_all(tree: Tree, dtype: Any) -> Tree:
    """Parameters of which no kernel is quantised; those that were are in `dtype`."""
    return _map(lambda kernel: read(kernel, dtype), tree)


def with_whole_scales(kernel: Kernel) -> Kernel:
    """A kernel that may be cut as its array would be: its scales, in 8 bits and groups, are in float32."""
    if "top" not in kernel if isinstance(kernel, Mapping) else True:
        return kernel
    kind = kind_of(kernel)
    return {kind: kernel[kind], "scale": _scales(kernel["scale"], kernel["top"])}


def logical_axes(kernel: Kernel, axes: tuple[str, ...]) -> Any:
    """The logical axes of a kernel without groups of scales, in its form; `axes` are those of the array."""
    kind = kind_of(kernel)
    return {kind: (*_axes(axes), "block"), "scale": _axes(axes)} if kind else axes


def product(x: Float[Array, "*rows_in"], kernel: Kernel, contract: int = 1) -> Float[Array, "*rows_out"]:
    """x [*rows, *in] times a kernel [*in, *out] -> [*rows, *out], in the dtype of x.

    A quantised kernel takes no gradient, and for that of x it is dequantised again.

    Args:
      x: floating.
      kernel: floating, or quantised.
      contract: the number of axes of *in.
    """
    if not kind_of(kernel):
        return matmul.product(x, kernel.astype(x.dtype), contract)
    return _product(contract, x, kernel)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _product(contract: int, x: Array, kernel: Kernel) -> Array:
    return jnp.tensordot(x, read(kernel, x.dtype), axes=contract)


def _product_forward(contract, x, kernel):
    return _product(contract, x, kernel), kernel


def _product_backward(contract, kernel, dy):
    w = read(kernel, dy.dtype)
    rows = dy.ndim - (w.ndim - contract)
    over = (range(rows, dy.ndim), range(contract, w.ndim))
    return jax.lax.dot_general(dy, w, (over, ((), ()))), None


_product.defvjp(_product_forward, _product_backward)


def product_by_expert(y: Float[Array, "M I"], kernel: Kernel, sizes: Int[Array, " E"]) -> Float[Array, "M O"]:
    """Tokens that are sorted by expert, each times the kernel of its expert, [E, I, O]; see `product`.

    Args:
      y: floating.
      kernel: floating, or quantised.
      sizes: how many tokens each expert has.
    """
    if not kind_of(kernel):
        return jax.lax.ragged_dot(y, kernel.astype(y.dtype), sizes)
    return _product_by_expert(y, kernel, sizes)


@functools.partial(jax.checkpoint, policy=jax.checkpoint_policies.nothing_saveable)
def _product_by_expert(y: Array, kernel: Kernel, sizes: Array) -> Array:
    """Not a custom_vjp, whose gradient would have to be added up over devices where this runs in a shard_map."""
    return jax.lax.ragged_dot(y, read(kernel, y.dtype), sizes)


def relative_error(values: Tree, original: Tree) -> Float[Array, ""]:
    """What holding kernels so has changed: |quantised - original| / |original|, over all that are quantised.

    Args:
      values: a quantised kernel, or nested dicts with some.
      original: the same with arrays in their place; what isn't quantised doesn't count.
    """
    sums = []

    def visit(kernel: Tree, whole: Tree) -> None:
        if kind_of(kernel):
            whole = whole.astype(jnp.float32)
            sums.append((jnp.sum(jnp.square(dequantize(kernel) - whole)), jnp.sum(jnp.square(whole))))
        elif isinstance(kernel, Mapping):
            for name, part in kernel.items():
                visit(part, whole[name])

    visit(values, original)
    changes, squares = zip(*sums, strict=True)
    return jnp.sqrt(sum(changes) / sum(squares))


def bytes_per_parameter(tree: Tree) -> float:
    """Bytes that quantised kernels take, scales included, by the parameters that they stand for.

    Args:
      tree: nested dicts of arrays or specs; what isn't quantised doesn't count.
    """
    nodes: list[Any] = []
    _map(nodes.append, tree)
    held = sum(math.prod(x.shape) * jnp.dtype(x.dtype).itemsize for node in nodes for x in node.values())
    return held / sum(math.prod(shape(node)) for node in nodes)
