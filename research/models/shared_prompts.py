"""Rows that begin with the same prompt: a trunk computes what the prompt's tokens become once for all of them.

In training by rewards a prompt has G answers, each a row of its own. A row ends its prompt at one place of all rows, so
that padding, if any, comes first. All that treats tokens one by one (norms, products with kernels, MLPs) runs over the
prompts and the answers of each group side by side; attention sees whole rows again.

Axes: B rows, G rows of a prompt, N = B / G prompts, T time, S time of the part that is shared, C = S + G (T - S).
"""

import dataclasses

import jax
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

    def joined(self, x: Shaped[Array, "B T *n"]) -> Shaped[Array, "N C *n"]:
        """The shared part of each prompt's first row, and then what is each row's own."""
        S, rest = self.length, x.shape[2:]
        own = x[:, S:]
        return jnp.concatenate([x[:: self.rows, :S], own.reshape(-1, self.rows * own.shape[1], *rest)], axis=1)

    def parted(self, x: Shaped[Array, "N C *n"]) -> Shaped[Array, "B T *n"]:
        """Whole rows of what was joined."""
        N, C, *rest = x.shape
        shared = jnp.broadcast_to(x[:, None, : self.length], (N, self.rows, self.length, *rest))
        own = x[:, self.length :].reshape(N, self.rows, (C - self.length) // self.rows, *rest)
        return jnp.concatenate([shared, own], axis=2).reshape(N * self.rows, -1, *rest)


def joined(shared: SharedPrompts | None, x: jax.Array) -> jax.Array:
    """The same where rows share prompts; else x."""
    return x if shared is None else shared.joined(x)


def parted(shared: SharedPrompts | None, x: jax.Array) -> jax.Array:
    """The same where rows share prompts; else x."""
    return x if shared is None else shared.parted(x)
