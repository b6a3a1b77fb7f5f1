"""How long the gradient of a record is."""

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from research.evals import gradients
from research.evals.scorers.inputs import Inputs, ModelScorer
from research.evals.scorers.types import Chunk, Scorer


def make(inputs: Inputs, model: str = "") -> Scorer:
    """Column `gradient_norm`: the length of the gradient of a record's mean loss by all parameters (GraNd,
    arXiv:2107.07075, definition 1).

    Args:
      inputs: of the command.
      model: in the place of --model.
    """
    gradients.check_on_long(inputs.on_long, "gradient_norm")
    return GradientNorm(inputs.scoring_model(inputs.name("model", model, "gradient_norm")))


def norm(gradient: jax.Array, extra: Any) -> jax.Array:
    del extra
    return jnp.linalg.norm(gradient)[None]


@dataclasses.dataclass(frozen=True, eq=False)
class GradientNorm(ModelScorer):
    """See `make`."""

    columns = ("gradient_norm",)

    def score(self, chunk: Chunk) -> Mapping[str, Sequence[Any]]:
        loaded = self.model.loaded
        with jax.set_mesh(loaded.mesh):
            out = self._gradients(loaded.params, loaded.params, (), self.model.examples(chunk))
        return {"gradient_norm": out[:, 0]}

    @functools.cached_property
    def _gradients(self) -> gradients.RecordGradients:
        return gradients.RecordGradients(self.model.loaded.model, norm, 1, self.model.batch_tokens)
