"""What the policy, the reference and the critic say of a rollout's tokens before its first update."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from research import params as params_lib
from research.models.transformer import Model
from research.objectives.types import Batch, Forward, Sampler, next_token_targets
from research.objectives.value import critic_values
from research.ops.losses import target_log_probs

ROLES = {"old_log_prob": "policy", "reference_log_prob": "reference", "value": "critic"}  # batch field -> who says it


@dataclasses.dataclass(frozen=True, eq=False)
class Scores:
    """(train state, frozen, batch) -> batch field -> [B, T] float32, where an answer's token is predicted; 0 elsewhere.

    Attributes:
      models: role -> Model.
      fields: of ROLES, those that are wanted.
      sampler: log-probabilities are computed as its are.
    """

    __name__ = "scores"  # what jax.jit calls the program, and traces show

    models: Mapping[str, Model]
    fields: tuple[str, ...]
    sampler: Sampler

    def __call__(self, state: Any, frozen: Any, batch: Batch) -> dict[str, Float[Array, "B T"]]:
        forward = Forward(self.models, params_lib.join(state.params, {**frozen, **state.synced}), batch)
        return {field: self._score(forward, batch, field) for field in self.fields}

    def _score(self, forward: Forward, batch: Batch, field: str) -> Float[Array, "B T"]:
        targets, weights = next_token_targets(batch, batch["loss_mask"])
        if field == "value":
            values = critic_values(forward).astype(jnp.float32)
        else:
            role, sampler = ROLES[field], self.sampler
            values = target_log_probs(
                forward.hidden(role),
                forward.next_token_head(role),
                targets,
                frozen=True,
                temperature=sampler.temperature,
                vocab_size=sampler.vocab_size,
            ).target
        return jnp.where(weights > 0, jax.lax.stop_gradient(values), 0)
