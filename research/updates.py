"""Updates are added to parameters here, which may be held in fewer bits than updates have.

Numbers in bfloat16 have 8 significant bits. Rounded to the nearest, an update of less than half a unit in the last
place is lost, however often it comes. Rounded stochastically, up or down with probabilities by which the mean is the
exact sum, it isn't: it comes through as often as its size says (arXiv:1502.02551, section 3; arXiv:2010.06192).
"""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, BFloat16, Float, Float32

from research.params import keys_by_name, widened

Tree = Any  # a pytree

ROUNDINGS = ("nearest", "stochastic")
_LOST = 16  # the bits of float32 that bfloat16 hasn't


def apply(params: Tree, updates: Tree, key: jax.Array | None = None) -> Tree:
    """Parameters plus updates: summed in float32, or float64, and rounded once to the dtype of each parameter.

    Args:
      params: floating.
      updates: in the same shapes.
      key: of this step. Parameters in bfloat16 are rounded stochastically with it, each by a key of its own name; None:
        to the nearest.
    """
    leaves, structure = jax.tree.flatten(params)
    keys = [None] * len(leaves) if key is None else keys_by_name(key, params)
    return structure.unflatten(map(added, leaves, structure.flatten_up_to(updates), keys))


def added(p: Float[Array, "*n"], update: Float[Array, "*n"], key: jax.Array | None = None) -> Float[Array, "*n"]:
    """The same of one array; the key is of no other."""
    total = widened(p) + widened(update)
    if total.dtype == p.dtype:
        return total
    if key is not None and p.dtype == jnp.bfloat16:
        return stochastic(total, key)
    # A cast alone, to and fro, is what XLA may leave out.
    kind = jnp.finfo(p.dtype)
    return jax.lax.reduce_precision(total, kind.nexp, kind.nmant).astype(p.dtype)


def stochastic(x: Float32[Array, "*n"], key: jax.Array) -> BFloat16[Array, "*n"]:
    """Each number rounded to one of the two in bfloat16 around it, so that the mean over keys is the number itself.

    16 random bits are added to those that are cut off. What bfloat16 can hold stays as it is; NaN and infinity too. The
    bits of an array depend on the key and on places in it alone, not on the devices that hold it.
    """
    random = jax.random.bits(key, x.shape, jnp.uint16).astype(jnp.uint32)
    bits = jax.lax.bitcast_convert_type(x, jnp.uint32) + random
    kept = jax.lax.bitcast_convert_type(bits >> _LOST << _LOST, jnp.float32)
    return jnp.where(jnp.isfinite(x), kept, x).astype(jnp.bfloat16)
