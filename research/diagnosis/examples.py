"""Examples of a run's data as people read them: prompt and response, before anything was cut or packed."""

import dataclasses

import numpy as np

from research.sources.rows import Rows
from research.sources.store import Store
from research.sources.tokenizers import Tokenizer

SHOWN = 160  # letters of a text in a report


@dataclasses.dataclass(frozen=True, eq=False)
class Example:
    """One document.

    Attributes:
      tokens: [N] int64, whole.
      mask: [N] bool, which of them are to be predicted.
      kept: how many of them the rows hold.
      prompt: the text before the first token that is to be predicted.
      response: the text of the tokens that are to be predicted.
      unit: number of the comparison that it belongs to; -1 where nothing is compared.
      side: its rank there, 0 the best; -1 where nothing is compared.
      label: the probability of each class; None where there are no labels.
      plain: whether its source is plain text, of which all is learned.
    """

    tokens: np.ndarray
    mask: np.ndarray
    kept: int
    prompt: str
    response: str
    unit: int = -1
    side: int = -1
    label: np.ndarray | None = None
    plain: bool = False

    @property
    def prompt_tokens(self) -> np.ndarray:
        """Those before the first that is to be predicted."""
        return self.tokens[: int(np.argmax(self.mask))] if self.mask.any() else self.tokens

    @property
    def response_tokens(self) -> np.ndarray:
        """Those that are to be predicted."""
        return self.tokens[self.mask]

    def shown(self) -> str:
        """The example on a line."""
        if self.plain or not self.prompt:
            return short(self.response)
        return f"{short(self.prompt, SHOWN // 2)} -> {short(self.response, SHOWN // 2)}"


def short(text: str, most: int = SHOWN) -> str:
    """A text on a line, with its escapes, cut in the middle where it is long."""
    line = text.encode("unicode_escape", errors="backslashreplace").decode() if not text.isprintable() else text
    return line if len(line) <= most else f"{line[: most // 2]} ... {line[-(most // 2) :]}"


def read(rows: Rows, tokenizer: Tokenizer, most: int) -> tuple[Example, ...]:
    """At most so many of the examples that lie in rows, evenly over all of them; comparisons come whole."""
    numbers, kept = _examples(rows)
    if not len(numbers):
        return ()
    chosen = numbers[np.unique(np.linspace(0, len(numbers) - 1, min(most, len(numbers))).astype(np.int64))]
    stores, first = rows.stores, np.cumsum([0, *(len(store.length) for store in rows.stores)])
    units = _units(stores)
    if units is not None:  # the neighbours that are compared with one
        chosen = numbers[np.isin(units[numbers], units[chosen])][:most]
    where = np.searchsorted(first, chosen, side="right") - 1
    amounts = dict(zip(numbers.tolist(), kept.tolist(), strict=True))
    return tuple(
        _example(stores[s], int(number - first[s]), amounts[int(number)], tokenizer)
        for number, s in zip(chosen, where, strict=True)
    )


def count(rows: Rows) -> int:
    """How many examples lie in rows."""
    return len(_examples(rows)[0])


def _examples(rows: Rows) -> tuple[np.ndarray, np.ndarray]:
    """The numbers of the examples that lie in rows, over all stores, and how many tokens of each do."""
    lengths = np.concatenate([store.length for store in rows.stores]) if rows.stores else np.zeros(0, np.int64)
    ends = np.cumsum(lengths)
    number = np.searchsorted(ends, rows.start, side="right")
    numbers, which = np.unique(number, return_inverse=True)
    return numbers, np.bincount(which, weights=rows.length, minlength=len(numbers)).astype(np.int64)


def _units(stores: tuple[Store, ...]) -> np.ndarray | None:
    """The comparison that each example of all stores belongs to, numbered over all; None where nothing is compared."""
    if all(store.answers is None for store in stores):
        return None
    units, base = [], 0
    for store in stores:
        own = np.arange(len(store.length)) if store.answers is None else store.answers["unit"]
        units.append(own + base)
        base += int(own.max(initial=-1)) + 1
    return np.concatenate(units)


def _example(store: Store, number: int, kept: int, tokenizer: Tokenizer) -> Example:
    stop = int(np.sum(store.length[: number + 1]))
    start = stop - int(store.length[number])
    tokens = np.asarray(store.tokens[start:stop]).astype(np.int64)
    mask = np.ones(len(tokens), bool) if store.mask is None else np.asarray(store.mask[start:stop]).astype(bool)
    said = None if store.answers is None else store.answers[number]
    before = tokens[: int(np.argmax(mask))] if mask.any() else tokens
    return Example(
        tokens=tokens,
        mask=mask,
        kept=kept,
        prompt=tokenizer.decode(before.tolist(), skip_special=False),
        response=tokenizer.decode(tokens[mask].tolist(), skip_special=False),
        unit=-1 if said is None else int(said["unit"]),
        side=-1 if said is None else int(said["side"]),
        label=None if store.labels is None else np.asarray(store.labels[number]),
        plain=store.mask is None and store.labels is None and store.answers is None,
    )
