"""What the records of a run's training data ask, for a policy that answers them itself."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Bool, Int

from research.errors import InputError
from research.sources import formats, mixture
from research.sources.rows import Rows
from research.sources.store import Store
from research.sources.tokenizers import Tokenizer


class Prompt(NamedTuple):
    """What a record asks.

    Attributes:
      tokens: int32, up to where the policy speaks.
      text: the same as text, special tokens left out.
      record: what it was made of.
      decode: tokens of an answer -> its text, special tokens left out.
      source: the number of its source.
    """

    tokens: Int[np.ndarray, " P"]
    text: str
    record: Mapping[str, Any]
    decode: Callable[[list[int]], str]
    source: int


class _Part(NamedTuple):
    """The prompts of one part of a mixture that leave enough room. Arrays are [R].

    Attributes:
      stores: which they lie in.
      store: the number of each one's store.
      example: its number there.
      start: where it begins there.
      length: how many tokens it has.
    """

    stores: tuple[Store, ...]
    store: Int[np.ndarray, " R"]
    example: Int[np.ndarray, " R"]
    start: Int[np.ndarray, " R"]
    length: Int[np.ndarray, " R"]


@dataclasses.dataclass(frozen=True, eq=False)
class Prompts:
    """The prompts of a run's rows, in the endless order in which the rows are drawn.

    Attributes:
      order: place in the run -> (part, row).
      parts: of the mixture.
      tokenizer: of the run.
      sources: number of the source of each part's stores.
      left_out: how many rows leave too little room for an answer.
    """

    order: Callable[[int], tuple[int, int]]
    parts: tuple[_Part, ...]
    tokenizer: Tokenizer
    sources: tuple[tuple[int, ...], ...]
    left_out: int

    @property
    def longest(self) -> int:
        """The most tokens of a prompt."""
        return max(int(part.length.max()) for part in self.parts)

    def read(self, first: int, count: int) -> list[Prompt]:
        """The prompts at places first to first + count - 1 of the order."""
        return [self._at(*map(int, self.order(place))) for place in range(first, first + count)]

    def _at(self, part: int, row: int) -> Prompt:
        stores, *columns = self.parts[part]
        number, example, start, length = (int(column[row]) for column in columns)
        store = stores[number]
        tokens = np.asarray(store.tokens[start : start + length], np.int32)
        return Prompt(
            tokens,
            self.tokenizer.decode(tokens.tolist()),
            store.records[example],
            formats.answer_decoder(self.tokenizer, store.template),
            self.sources[part][number] if self.sources[part] else 0,
        )


def make_prompts(
    train: Sequence[tuple[Rows, float]], tokenizer: Tokenizer, *, room: int, seed: int, shuffle: bool
) -> Prompts:
    """The prompts of rows: what precedes the first token that is to be predicted.

    Args:
      train: (rows, weight) parts, as Data.train; each row begins with one document, whose records are kept.
      tokenizer: of the run.
      room: the most tokens of a prompt; rows whose prompt has more are left out.
      seed: of the order.
      shuffle: else each part keeps its own order.

    Raises:
      InputError: the data is plain text, or no prompt of a part is short enough.
    """
    parts, left_out = [], 0
    for rows, _ in train:
        part, fits = _part(rows, room)
        left_out += int(np.sum(~fits))
        if not fits.any():
            raise InputError(
                f"rollout.max_new_tokens: leaves {room} tokens for a prompt, and no prompt of the data is so short. "
                "Lower it, or raise seq_len."
            )
        parts.append(part)
    sizes, weights = [len(part.length) for part in parts], [weight for _, weight in train]
    order = mixture.row_order(sizes, weights, seed if shuffle else None)
    return Prompts(order, tuple(parts), tokenizer, tuple(rows.sources for rows, _ in train), left_out)


def _part(rows: Rows, room: int) -> tuple[_Part, Bool[np.ndarray, " R"]]:
    """The prompts of rows, and which rows they are of."""
    first = rows.start[rows.splits[:-1]]
    ends = np.cumsum([len(store.tokens) for store in rows.stores])
    store = np.searchsorted(ends, first, side="right")
    start = first - (ends - [len(each.tokens) for each in rows.stores])[store]
    example, length = np.zeros_like(start), np.zeros_like(start)
    for number, each in enumerate(rows.stores):
        if each.mask is None:
            raise InputError(
                "rewards: judge answers to prompts, and the data has plain texts, which have none. Give records of "
                "prompts, as docs/data.md describes them, or leave rewards out."
            )
        here, answers = store == number, np.flatnonzero(each.mask)
        example[here] = np.searchsorted(np.cumsum(each.length), start[here], side="right")
        length[here] = answers[np.searchsorted(answers, start[here])] - start[here]
    fits = (length > 0) & (length <= room)
    return _Part(rows.stores, store[fits], example[fits], start[fits], length[fits]), fits
