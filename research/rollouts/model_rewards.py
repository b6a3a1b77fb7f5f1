"""Rewards that models of the run give to answers: passes of reward models over them.

Axes: B rows of a pass, T tokens, M members of an ensemble, P prompts with n answers each, R rewards.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from research.models.transformer import Model
from research.objectives.classes import class_logits
from research.objectives.types import Batch, Forward
from research.rollouts import buffer
from research.rollouts.engines.types import Answers
from research.rollouts.rewards.reward_model import ModelReward
from research.sources.prompts import Prompt

FIELDS = ("tokens", "segment_ids", "positions")


@dataclasses.dataclass(frozen=True, eq=False)
class Members:
    """(frozen, batch) -> role -> the logits [B, M] at the last token of each row, float32; rows hold one
    document.

    Attributes:
      models: role -> Model.
      roles: reward models, of which nothing is trained.
    """

    models: Mapping[str, Model]
    roles: tuple[str, ...]

    def __call__(self, frozen: Any, batch: Batch) -> dict[str, Float[Array, "B M"]]:
        models, params = ({role: each[role] for role in self.roles} for each in (self.models, frozen))
        forward = Forward(models, params, batch)
        last = jnp.maximum(jnp.sum(batch["segment_ids"] > 0, axis=1) - 1, 0)
        return {
            role: jnp.take_along_axis(class_logits(forward, role=role), last[:, None, None], axis=1)[:, 0]
            for role in self.roles
        }


@dataclasses.dataclass(frozen=True, eq=False)
class ModelRewards:
    """The rewards that models give.

    Attributes:
      members: see Members, jitted, with results on every device.
      rewards: of each of the run's rewards; None of those that no model gives.
      like: ShapeDtypeStructs [B, T] with shardings, of FIELDS.
    """

    members: Callable[..., dict[str, jax.Array]]
    rewards: tuple[ModelReward | None, ...]
    like: Mapping[str, jax.ShapeDtypeStruct]

    def __call__(self, frozen: Any, prompts: Sequence[Prompt], answers: Answers, n: int) -> Float[np.ndarray, "P n R"]:
        """Of n answers to each prompt, float32; NaN for the rewards that no model gives."""
        (B, T), rows = self.like["tokens"].shape, len(prompts) * n
        batch = {name: np.zeros((-(-rows // B) * B, T), np.int32) for name in FIELDS}
        for row in range(rows):
            ids = np.concatenate([prompts[row // n].tokens, answers.tokens[row, : answers.lengths[row]]])
            batch["tokens"][row, : len(ids)], batch["segment_ids"][row, : len(ids)] = ids, 1
            batch["positions"][row, : len(ids)] = np.arange(len(ids))
        parts = [jax.device_get(self.members(frozen, part)) for part in buffer.parts(batch, self.like)]
        out = np.full((rows, len(self.rewards)), np.nan, np.float32)
        for column, reward in enumerate(self.rewards):
            if reward is not None:
                logits = np.concatenate([part[reward.role] for part in parts])[:rows]
                out[:, column] = reward.combined(logits.astype(np.float64))
        return out.reshape(len(prompts), n, len(self.rewards))
