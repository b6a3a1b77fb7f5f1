"""What a scorer is: it gives each record of some data numbers, by which records are selected."""

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import Any

from research.errors import located
from research.evals.record_scores import Item
from research.evals.scoring import Example
from research.sources import records


def text_of(record: Mapping[str, Any]) -> str:
    """A record's text, or what is said in its conversation, a line for each turn.

    Raises:
      InputError: the record is at fault.
    """
    turns = records.check(dict(record), records.detect_format(record, {}), {})
    return "\n".join(turn.text for turn in turns if turn.role != records.TOOLS)


@dataclasses.dataclass(frozen=True, eq=False)
class Chunk:
    """Records that are scored together.

    Attributes:
      first: the number of the first of them in the data, from 0 on.
      items: the records.
      encoded: encoder -> their tokens, under each encoder that a scorer names.
      shared: what scorers have computed of them, so that others needn't compute it again.
    """

    first: int
    items: Sequence[Item]
    encoded: Mapping[Any, Sequence[Example]] = dataclasses.field(default_factory=dict)
    shared: dict[Any, Any] = dataclasses.field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.items)

    @property
    def numbers(self) -> range:
        """Of the records, in the data."""
        return range(self.first, self.first + len(self.items))

    @functools.cached_property
    def texts(self) -> list[str]:
        """The text of each record. Raises InputError where one is at fault."""
        texts = []
        for item in self.items:
            with located(item.where):
                texts.append(text_of(item.record))
        return texts


class Scorer:
    """Scores records. All of them are shown to it once, in order, before any is scored.

    What a scorer keeps of each record must be small, and what it gives a function of the data and of `identity`: a
    command that was killed makes the scorer anew, shows it all records again, and goes on where it was.

    Attributes:
      columns: the names of its scores.
      encoder: makes the tokens that it reads (inputs.Encoder); None where it reads texts.
    """

    columns: tuple[str, ...] = ()
    encoder: Any = None

    @property
    def identity(self) -> Any:
        """All that decides the scores beside the records and the options, of JSON types."""
        return None

    def observe(self, chunk: Chunk) -> None:
        """Looks at records before any is scored. Raises InputError where one of them can't be scored."""
        if self.encoder is None:
            chunk.texts  # noqa: B018

    def prepare(self) -> None:
        """Computes what it needs after all records were observed, and before the first is scored."""

    def score(self, chunk: Chunk) -> Mapping[str, Sequence[Any]]:
        """Column -> a value for each record: a number, True or False, or None where the score isn't defined.

        Raises:
          InputError: a score can't be computed.
        """
        raise NotImplementedError

    def summary(self) -> str:
        """A line that says what was seen, after the last record; "" for none."""
        return ""
