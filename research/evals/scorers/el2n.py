"""How far a model's predictions are from what a record says."""

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from research.devices import distributed, sharding
from research.evals.scorers.inputs import Inputs, ModelScorer
from research.evals.scorers.types import Chunk, Scorer
from research.evals.scoring import compute_windows, constrain
from research.models import virtual
from research.models.transformer import Model
from research.ops.losses import target_log_probs
from research.ops.selection import error_norms


def make(inputs: Inputs, model: str = "") -> Scorer:
    """Column `el2n`: the mean over supervised tokens of the length of p - onehot(token) (arXiv:2107.07075, definition
    2), from 0 for what is known to sqrt(2) for what is taken for another token.

    Args:
      inputs: of the command.
      model: in the place of --model.
    """
    return El2n(inputs.scoring_model(inputs.name("model", model, "el2n")))


def row_norms(model: Model, params: Any, batch: Mapping[str, jax.Array]) -> jax.Array:
    """Of each row of a batch the sum of its error norms over the tokens of weight 1, [B] float32 on every device."""
    batch = constrain(batch, model.rules)
    hidden = virtual.hidden(model, params, batch)
    out = target_log_probs(hidden, model.unembed(params), batch["targets"], collision=True, frozen=True)
    return sharding.replicate((error_norms(out.target, out.collision) * batch["weights"]).sum(axis=1))


@dataclasses.dataclass(frozen=True, eq=False)
class El2n(ModelScorer):
    """See `make`."""

    columns = ("el2n",)

    def score(self, chunk: Chunk) -> Mapping[str, Sequence[Any]]:
        examples, loaded = self.model.examples(chunk), self.model.loaded
        sums = np.zeros(len(examples))
        with jax.set_mesh(loaded.mesh):
            for windows, out in compute_windows(
                self._compute, loaded.model, loaded.params, examples, self.model.batch_tokens, lambda tokens: None
            ):
                for window, value in zip(windows, out, strict=False):
                    sums[window.example] += value
        return {"el2n": sums / np.array([example.count for example in examples])}

    @functools.cached_property
    def _compute(self) -> Callable[..., jax.Array]:
        return distributed.one_at_a_time(jax.jit(functools.partial(row_norms, self.model.loaded.model)))
