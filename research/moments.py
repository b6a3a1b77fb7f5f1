"""Adam's moments in 8 bits: a quarter of the room that they have in float32.

After arXiv:2110.02861 (Dettmers et al.): arrays are cut into blocks, each of which has a scale of its own, and codes
lie closer where numbers are small. Of a block with the largest magnitude s
  the first moment is    +-s (q / 127)^2,  q from 0 to 127 and a sign, int8;
  the second moment is   (s (q / 255)^2)^2,  q from 0 to 255, uint8, where s is the root of the largest.
The smallest are a 16 000th of the largest, and of the roots of second moments a 65 000th. A second moment that isn't 0
never gets the code 0: what is divided by its root would be far too large.

Codes are rounded stochastically, so that the mean of what is held is the moment itself. Rounded to the nearest, a
second moment with b2 = 0.999 could never fall: what a step takes off it is less than half the way to the next code.

Blocks lie along the last axis and are the same on every mesh, so that a checkpoint is read on any. Arrays of less than
4096 numbers, such as norms and biases, keep moments in float32, as in the paper.
"""

import math
import zlib
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int, UInt32

from research.errors import InputError
from research.params import is_spec, keys_by_name

Tree = Any  # a pytree

KINDS = ("float32", "int8")
BLOCK = 256  # the most numbers in a block (section 2.1 of the paper has 2048)
LEAST = 4096  # smaller arrays stay in float32 (section 2)
_SMALL = 48  # of smaller blocks scales would take too much room
_PARTS = (16, 8, 4, 2, 1)  # an axis is cut into a multiple of the first that can be, so that devices hold whole blocks
_TOPS = {"mu": 127, "nu": 255}
_DTYPES = {"mu": jnp.int8, "nu": jnp.uint8}


class State(NamedTuple):
    """Adam's state.

    Attributes:
      count: int32, updates made.
      mu, nu: codes of the first and of the second moment, in the shapes of the parameters; of small arrays the moments
        themselves, float32.
      mu_scale, nu_scale: float32 [*lead, blocks]; optax.MaskedNode for small arrays.
    """

    count: jax.Array
    mu: Tree
    nu: Tree
    mu_scale: Tree
    nu_scale: Tree


def check(specs: Tree) -> None:
    """Raises InputError where no array is large enough to be held in 8 bits.

    Args:
      specs: ParamSpecs of what is trained.
    """
    if not any(is_held(spec) for spec in jax.tree.leaves(specs, is_leaf=is_spec)):
        raise InputError(
            f"optimizer.moments = 'int8': has no effect, since nothing that is trained has {LEAST} numbers or more. "
            "Leave it out."
        )


def is_held(x: Any) -> bool:
    """Whether moments of an array, or of its spec, are held in 8 bits."""
    return math.prod(x.shape) >= LEAST


def block_size(n: int) -> int:
    """The numbers of a block along an axis of n: at most BLOCK where n can be cut, else all."""
    for parts in _PARTS:
        if n % parts == 0:
            size = next(b for b in range(min(BLOCK, n // parts), 0, -1) if n // parts % b == 0)
            if size >= _SMALL:
                return size
    return n


def adam(b1: float, b2: float, eps: float) -> optax.GradientTransformation:
    """optax.scale_by_adam with moments in 8 bits. The direction is made of the moments before they are rounded."""

    def init(params: Tree) -> State:
        return State(
            jnp.zeros((), jnp.int32),
            *(jax.tree.map(lambda p, kind=kind: _zeros(kind, p), params) for kind in _TOPS),
            *(jax.tree.map(_zero_scales, params) for _ in _TOPS),
        )

    def update(grads: Tree, state: State, params: Tree = None) -> tuple[Tree, State]:
        del params
        count = optax.safe_increment(state.count)
        leaves, structure = jax.tree.flatten(grads)
        trees = [structure.flatten_up_to(tree) for tree in state[1:]]
        steps = count.astype(jnp.float32)
        keys = keys_by_name(jax.random.fold_in(jax.random.PRNGKey(zlib.crc32(b"moments")), state.count), grads)
        directions, held = [], []
        for g, key, *old in zip(leaves, keys, *trees, strict=True):
            mu, nu = (decoded(kind, *old[i::2]) for i, kind in enumerate(_TOPS))
            mu = b1 * mu + (1 - b1) * g
            nu = b2 * nu + (1 - b2) * jnp.square(g)
            directions.append(mu / (1 - b1**steps) / (jnp.sqrt(nu / (1 - b2**steps)) + eps))
            held.append(_encoded(mu, nu, key))
        columns = zip(*held, strict=True)
        return structure.unflatten(directions), State(count, *(structure.unflatten(column) for column in columns))

    return optax.GradientTransformation(init, update)


def decoded(kind: str, codes: Int[Array, "*lead n"], scale: Float[Array, "*lead blocks"]) -> Float[Array, "*lead n"]:
    """A moment from what is held of it, float32.

    Args:
      kind: "mu" or "nu".
      codes, scale: of a State.
    """
    if isinstance(scale, optax.MaskedNode):
        return codes
    q = _blocks(codes.astype(jnp.float32), scale.shape[-1]) / _TOPS[kind]
    x = scale[..., None] * q * jnp.abs(q)
    return (jnp.square(x) if kind == "nu" else x).reshape(codes.shape)


def encoded(
    kind: str, moment: Float[Array, "*lead n"], random: UInt32[Array, "*lead n"]
) -> tuple[Int[Array, "*lead n"], Float[Array, "*lead blocks"]]:
    """Codes and scales of a moment; the mean of what they stand for is the moment.

    Args:
      kind: "mu" or "nu".
      moment: float32.
      random: numbers below 2^16.
    """
    top, blocks = _TOPS[kind], moment.shape[-1] // block_size(moment.shape[-1])
    x = _blocks(jnp.sqrt(moment) if kind == "nu" else moment, blocks)
    scale = jnp.max(jnp.abs(x), axis=-1)
    part = jnp.abs(x) / jnp.where(scale == 0, 1, scale)[..., None] * top**2  # from 0 to top^2
    low = jnp.clip(jnp.floor(jnp.sqrt(part)), 0, top - 1)
    below, above = jnp.square(low), jnp.square(low + 1)
    if kind == "nu":  # what is to be right in the mean is the moment, not its root
        part, below, above = jnp.square(part), jnp.square(below), jnp.square(above)
    share = (part - below) / (above - below)
    q = jnp.where(_blocks(random.astype(jnp.float32), blocks) / 2**16 < share, low + 1, low)
    q = jnp.where(x > 0, jnp.maximum(q, 1), q) if kind == "nu" else jnp.sign(x) * q
    return q.astype(_DTYPES[kind]).reshape(moment.shape), scale


def _encoded(mu: Float[Array, "*n"], nu: Float[Array, "*n"], key: jax.Array) -> tuple[Any, Any, Any, Any]:
    """What a State holds of two moments: codes of both, scales of both."""
    if not is_held(mu):
        return mu, nu, optax.MaskedNode(), optax.MaskedNode()
    random = jax.random.bits(key, mu.shape, jnp.uint32)
    (m, m_scale), (v, v_scale) = encoded("mu", mu, random & 0xFFFF), encoded("nu", nu, random >> 16)
    return m, v, m_scale, v_scale


def _zeros(kind: str, p: Any) -> jax.Array:
    return jnp.zeros(p.shape, _DTYPES[kind] if is_held(p) else jnp.float32)


def _zero_scales(p: Any) -> Any:
    if not is_held(p):
        return optax.MaskedNode()
    return jnp.zeros((*p.shape[:-1], p.shape[-1] // block_size(p.shape[-1])), jnp.float32)


def _blocks(x: Float[Array, "*lead n"], blocks: int) -> Float[Array, "*lead blocks b"]:
    return x.reshape(*x.shape[:-1], blocks, x.shape[-1] // blocks)
