"""Rows that begin with the same prompt: a trunk computes what the prompt's tokens become once for all of them.

In training by rewards a prompt has G answers, each a row of its own. A row ends its prompt at one place of all rows, so
that padding, if any, comes first. All that treats tokens one by one (norms, products with kernels, MLPs) runs over the
prompts and the answers of each group side by side; attention sees whole rows again.

Axes: B rows, G rows of a prompt, N = B / G prompts, T time, S time of the part that is shared, C = S + G (T - S).
"""

import dataclasses

import jax.numpy as jnp
from jaxtyping import Array, Shaped


@dataclasses.dataclass(frozen=True)
class SharedPrompts:
    """How rows share prompts.

    Attributes:
      rows: G; those of a prompt follow one another.
      length: S, how many of the first tokens of a row are those of its prompt's other rows too.
    """

    rows: int
    length: int


def joined(shared: SharedPrompts | None, x: Shaped[Array, "B T *n"]) -> Shaped[Array, "N C *n"]:
    """The shared part of each prompt's first row, and then what is each row's own; x where rows share nothing."""
    if shared is None:
        return x
    own = x[:, shared.length :]
    own = own.reshape(-1, shared.rows * own.shape[1], *x.shape[2:])
    return jnp.concatenate([x[:: shared.rows, : shared.length], own], axis=1)


def parted(shared: SharedPrompts | None, x: Shaped[Array, "N C *n"]) -> Shaped[Array, "B T *n"]:
    """Whole rows of what was joined."""
    if shared is None:
        return x
    N, C, *rest = x.shape
    prompts = jnp.broadcast_to(x[:, None, : shared.length], (N, shared.rows, shared.length, *rest))
    own = x[:, shared.length :].reshape(N, shared.rows, (C - shared.length) // shared.rows, *rest)
    return jnp.concatenate([prompts, own], axis=2).reshape(N * shared.rows, -1, *rest)
