"""How much a prompt helps to predict its answer: instruction-following difficulty."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from research.errors import InputError, did_you_mean
from research.evals.perplexity import exp
from research.evals.scorers.inputs import Inputs, ModelScorer, losses
from research.evals.scorers.types import Chunk, Scorer
from research.evals.scoring import Example

FORMS = ("perplexity", "loss")


def make(inputs: Inputs, model: str = "", form: str = "perplexity") -> Scorer:
    """Columns
      ifd: PPL(answer | prompt) / PPL(answer), as Superfiltering scores it (arXiv:2402.00530, equation 3): the higher,
        the less the prompt helps; null where the answer alone has no token to score;
      ifd_above_1: true where the prompt makes the answer less likely: it doesn't follow from it, and such records are
        dropped there;
      ifd_loss: nats per token of the answer, given its prompt;
      ifd_loss_alone: the same without the prompt.

    Of the answer alone the first token isn't scored, since nothing comes before it, but where the tokenizer begins a
    text with a token of its own. So an answer of one token has no score, unless it has such a beginning. The end of an
    answer is a token of it. Of a conversation with several answers each stands alone, and the means are over the tokens
    of all of them.

    Args:
      inputs: of the command.
      model: in the place of --model.
      form: "perplexity", or "loss" for the ratio of the mean losses (arXiv:2308.12032).
    """
    if form not in FORMS:
        raise InputError(f"form = {form!r}: no such form.{did_you_mean(form, FORMS)}")
    return Ifd(inputs.scoring_model(inputs.name("model", model, "ifd")), form)


def answers_alone(example: Example, bos: int | None) -> list[Example]:
    """The stretches of an example that are learned, each without what stands before it.

    Args:
      example: a prompt and its answer, or a conversation.
      bos: the token that begins a text, which is put before each; None for none.
    """
    edges = np.flatnonzero(np.diff(np.concatenate([[False], example.mask, [False]])))
    parts = [example.tokens[start:stop] for start, stop in edges.reshape(-1, 2)]
    if bos is not None:
        parts = [np.concatenate([np.array([bos], np.int32), part]) for part in parts]
    return [Example(part, np.ones(len(part), bool)) for part in parts]


@dataclasses.dataclass(frozen=True, eq=False)
class Ifd(ModelScorer):
    """See `make`."""

    form: str
    columns = ("ifd", "ifd_above_1", "ifd_loss", "ifd_loss_alone")

    def observe(self, chunk: Chunk) -> None:
        for item, example in zip(chunk.items, self.model.examples(chunk), strict=True):
            if example.mask.all() or "text" in item.record:
                raise InputError(
                    f"{item.where}: has no answer to a prompt, and ifd is of these. Leave ifd out, or give records of "
                    "prompt and response, or of messages."
                )

    def score(self, chunk: Chunk) -> Mapping[str, Sequence[Any]]:
        parts = [answers_alone(example, self.encoder.bos) for example in self.model.examples(chunk)]
        flat = [part for each in parts for part in each if part.count]
        log_probs = iter(self.model.log_probs_of(flat))
        alone = [[next(log_probs) for part in each if part.count] for each in parts]
        given = losses(self.model.log_probs(chunk))
        return self.ratios(given, [-np.mean(np.concatenate(x), dtype=np.float64) if x else None for x in alone])

    def ratios(self, given: Sequence[float], alone: Sequence[float | None]) -> dict[str, list[Any]]:
        """The columns, of the loss of each answer after its prompt, and of the answer alone."""
        ratio: list[float | None] = []
        for a, b in zip(given, alone, strict=True):
            if b is None:
                ratio.append(None)
            elif self.form == "perplexity":
                ratio.append(exp(a - b))
            else:
                ratio.append(a / b if b > 0 else None)
        above = [None if x is None else x > 1 for x in ratio]
        return {"ifd": ratio, "ifd_above_1": above, "ifd_loss": list(given), "ifd_loss_alone": list(alone)}
