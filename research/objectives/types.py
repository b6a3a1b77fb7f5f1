"""What an objective is, and what it may ask of the models.

An objective is data: a pure loss and the names of what it reads. To add one, write a module in this package with a
function `make(**options) -> Objective` and name the module in a config's `objective.terms`.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax

Batch = Mapping[str, jax.Array]  # tokens, segment_ids, positions: [B, T] int32; loss_mask: [B, T] float32; ...


class LossOut(NamedTuple):
    """Sums, never means: they add up over microbatches, devices and hosts.

    Attributes:
      loss_sum: scalar float32, the loss summed over what is supervised. Its gradient is taken.
      weight: scalar float32, what to divide by: the number of supervised tokens, usually.
      metrics: name -> (sum, weight), scalars; reported as sum / weight.
    """

    loss_sum: jax.Array
    weight: jax.Array
    metrics: dict[str, tuple[jax.Array, jax.Array]]


class Forward:
    """The models of each role applied to one batch; each pass is made once, however many terms read it."""

    def __init__(self, models: Mapping[str, Any], params: Mapping[str, Any], batch: Batch):
        self.models, self.params, self.batch = models, params, batch
        self._hidden: dict[str, jax.Array] = {}

    def hidden(self, role: str = "policy") -> jax.Array:
        """Last hidden states [B, T, D] of `role` on the batch, in its compute dtype."""
        if role not in self._hidden:
            self._hidden[role] = self.models[role].hidden(self.params[role], self.batch)
        return self._hidden[role]

    def head(self, role: str = "policy") -> Any:
        """The unembedding of `role` (see ops.losses.Head)."""
        return self.models[role].unembed(self.params[role])


@dataclasses.dataclass(frozen=True)
class Objective:
    """A kind of supervision.

    Attributes:
      loss: (forward, batch, key, step) -> LossOut; pure. `key` differs per step and microbatch.
      fields: the batch fields it reads; checked against the source before anything compiles.
      trainable: roles whose parameters get gradients.
      frozen: roles that are read only.
      batch_coupled: the loss needs the whole batch, so that it can't be cut into microbatches.
    """

    loss: Callable[[Forward, Batch, jax.Array, jax.Array], LossOut]
    fields: tuple[str, ...] = ("tokens", "segment_ids", "positions")
    trainable: tuple[str, ...] = ("policy",)
    frozen: tuple[str, ...] = ()
    batch_coupled: bool = False
