"""How well a model predicts what training would learn of a record."""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from research.evals.perplexity import exp, scored_bytes
from research.evals.scorers.inputs import Inputs, ModelScorer, losses
from research.evals.scorers.types import Chunk, Scorer


def make(inputs: Inputs, model: str = "") -> Scorer:
    """Columns
      loss: nats per supervised token, the mean of -log p(token | those before it);
      perplexity: exp(loss);
      bits_per_byte: bits over the bytes of text that these tokens stand for; it compares models across tokenizers.

    Args:
      inputs: of the command.
      model: in the place of --model.
    """
    return Perplexity(inputs.scoring_model(inputs.name("model", model, "perplexity")))


@dataclasses.dataclass(frozen=True, eq=False)
class Perplexity(ModelScorer):
    """See `make`."""

    columns = ("loss", "perplexity", "bits_per_byte")

    def score(self, chunk: Chunk) -> Mapping[str, Sequence[Any]]:
        log_probs = self.model.log_probs(chunk)
        loss = losses(log_probs)
        if self.encoder.tokenizer is None:
            per_byte = [None] * len(chunk)
        else:
            size = scored_bytes(
                self.model.examples(chunk), self.encoder.tokenizer, self.model.loaded.model.config.vocab_size
            )
            bits = np.array([-np.sum(each, dtype=np.float64) for each in log_probs]) / math.log(2)
            per_byte = [bit / n if n else None for bit, n in zip(bits, size, strict=True)]
        return {"loss": loss, "perplexity": [exp(x) for x in loss], "bits_per_byte": per_byte}
