"""What a run's data is once it was read."""

import dataclasses
from typing import Any

from research.sources.rows import Rows
from research.sources.streaming import Stream
from research.sources.tokenizers import Tokenizer


@dataclasses.dataclass(frozen=True, eq=False)
class Data:
    """A run's data, ready to be batched.

    Attributes:
      tokenizer: the one that made the tokens.
      source_names: of the sources, in order; where data.sources names two or more, a batch's `source` counts them.
      train: (rows, weight) of each part of a weighted mixture; one part, of weight 1, where there are no
        weights.
      streams: of data.streaming the same parts, of which `train` then has the first rows alone; () of other data.
      held_out: rows for evaluation; none where eval_fraction is 0 and there is no eval_path.
      held_out_records: at most 256 held-out records with prompts (prompt, response or messages, and whatever
        else they held), one a prompt, in random order: for evaluations that generate.
      held_out_templates: how each of them is put to a model: the template of its source.
      report: counts of all that was read, dropped, cut and packed.
    """

    tokenizer: Tokenizer
    source_names: tuple[str, ...]
    train: list[tuple[Rows, float]]
    held_out: Rows
    held_out_records: list[dict[str, Any]]
    held_out_templates: list[str]
    report: dict[str, Any]
    streams: tuple[Stream, ...] = ()
