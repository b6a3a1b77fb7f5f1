"""What can still be learned of a record: the loss under a model less the loss under a reference."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from research import loading
from research.errors import InputError
from research.evals.scorers import read_before
from research.evals.scorers.inputs import Inputs, ModelScorer, ScoringModel, losses
from research.evals.scorers.types import Chunk, Scorer


def make(inputs: Inputs, model: str = "", reference: str = "") -> Scorer:
    """Columns
      rho: nats per supervised token under the model less those under the reference (RHO-LOSS, arXiv:2206.07137,
        equation 3; Rho-1's excess loss, arXiv:2404.07965, as a mean over the record): low where it is known already,
        and where nobody knows it;
      rho_loss, rho_reference_loss: the two.

    The reference has learned from other data of the kind that is wanted: one that has read what it scores calls noise
    learnable, and is refused where its workdir says so.

    Args:
      inputs: of the command.
      model: the current model, in the place of --model.
      reference: in the place of --reference.
    """
    names = inputs.name("model", model, "rho"), inputs.name("reference", reference, "rho")
    if names[0] == names[1]:
        raise InputError(f"--reference = {names[1]}: is --model too, and all scores would be 0. Name another model.")
    read_before.check_unread(f"--reference = {names[1]}", names[1], inputs.origin)
    current, other = map(inputs.scoring_model, names)
    if current.encoder.tokenizer is not None:
        loading.check_reads("--reference", loading.find(names[1]), current.encoder.tokenizer)
    return Rho(current, dataclasses.replace(other, encoder=current.encoder))


@dataclasses.dataclass(frozen=True, eq=False)
class Rho(ModelScorer):
    """See `make`. Both models read the tokens of the current one."""

    reference: ScoringModel
    columns = ("rho", "rho_loss", "rho_reference_loss")

    @property
    def identity(self) -> Any:
        return [self.model.identity, self.reference.identity]

    def observe(self, chunk: Chunk) -> None:
        super().observe(chunk)
        self.reference.examples(chunk)

    def score(self, chunk: Chunk) -> Mapping[str, Sequence[Any]]:
        loss, below = losses(self.model.log_probs(chunk)), losses(self.reference.log_probs(chunk))
        return {"rho": loss - below, "rho_loss": loss, "rho_reference_loss": below}
