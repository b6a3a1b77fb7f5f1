"""How much a step on one example helps with others, by gradients: what LESS (arXiv:2402.04333) computes.

Axes: P parameters, D numbers of a sketch, n blocks of P, N examples, M others.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int


def adam_direction(
    gradient: Float[Array, " P"],
    first: Float[Array, " P"],
    second: Float[Array, " P"],
    b1: float,
    b2: float,
    eps: float = 1e-8,
) -> Float[Array, " P"]:
    """m' / sqrt(v' + eps), the direction of Adam's next step on an example, without the correction of bias and with eps
    in the root, as in LESS's obtain_gradients_with_adam.

    Args:
      gradient: of the example's loss.
      first, second: Adam's moments m and v before the step.
      b1, b2, eps: of Adam.
    """
    m = b1 * first + (1 - b1) * gradient
    v = b2 * second + (1 - b2) * jnp.square(gradient)
    return m / jnp.sqrt(v + eps)


class Sketch(NamedTuple):
    """A random projection of P numbers to D: a count sketch (Charikar et al. 2002; arXiv:0902.2206), which keeps inner
    products on average and costs one addition for each number. Each block of D numbers is shifted, and given signs.

    Attributes:
      signs: int8, 1 or -1.
      shifts: of each block, in 0 ... D - 1.
    """

    signs: Int[Array, "n D"]
    shifts: Int[Array, " n"]


def make_sketch(key: jax.Array, size: int, width: int) -> Sketch:
    """A random projection of `size` numbers to `width`; where these are fewer than `width` none is lost."""
    blocks = -(-size // width)
    signs = jax.random.rademacher(key, (blocks, width), jnp.int8)
    return Sketch(signs, jax.random.randint(jax.random.fold_in(key, 1), (blocks,), 0, width))


def sketched(sketch: Sketch, values: Float[Array, " P"]) -> Float[Array, " D"]:
    """The projection of numbers."""
    blocks, width = sketch.signs.shape
    padded = jnp.pad(values, (0, blocks * width - values.shape[0])).reshape(blocks, width)
    signed = padded * sketch.signs.astype(padded.dtype)
    place = (jnp.arange(width, dtype=jnp.int32)[None] - sketch.shifts[:, None]) % width
    return jnp.sum(jnp.take_along_axis(signed, place, axis=1), axis=0)


def normalized(values: Float[Array, "N D"]) -> Float[Array, "N D"]:
    """Rows of length 1; those that are 0 stay so."""
    length = jnp.linalg.norm(values, axis=1, keepdims=True)
    return values / jnp.where(length > 0, length, 1.0)


def influence(features: Float[Array, "N D"], targets: Float[Array, "M D"]) -> Float[Array, "N M"]:
    """The cosines of examples and targets, whose features are `normalized` (LESS's calculate_influence_score). Summed
    over checkpoints with their learning rates they are the influence of each on each."""
    return features @ targets.T
