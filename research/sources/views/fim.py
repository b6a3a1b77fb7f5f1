"""Documents with their middle moved to the end, so that a model learns to fill in (Bavarian et al. 2022,
arXiv:2207.14255).

A document is cut at two places drawn by chance, and seen as prefix, suffix and middle, with a special token before each
(see sources.infilling for the two orders). What ends the document then says that the middle is complete. One that is
longer than a row is cut into pieces first, each with its own middle and end, so that no row loses an end.

It is a view of plain text. Conversations are refused: a middle of theirs would tear turns apart.
"""

import dataclasses
import functools
from typing import Any, NamedTuple

import numpy as np

from research.errors import InputError, did_you_mean
from research.ranges import Share, Size
from research.sources import infilling
from research.sources.special_tokens import FimTokens, fim_names, fim_tokens
from research.sources.tokenizers import Tokenizer
from research.sources.views import Document, View

SPLITS = ("character", "token")
_LEAST_ROW = 16  # room for the special tokens and a few more
_CHARACTER = 4  # bytes of the longest one in UTF-8, and so the most tokens
_BROKEN = "\ufffd"  # what bytes that are no character decode to


def make(
    rate: Share = 0.5,
    spm_rate: Share = 0.5,
    split: str = "character",
    draws: Size = 1,
    seq_len: int = 1024,
    tokenizer: Tokenizer | None = None,
) -> View:
    """A share of the documents is seen with the middle last, the others as they are.

    Args:
      rate: the share of documents (of pieces, where a document is longer than a row) whose middle is moved.
      spm_rate: of these, the share in the order suffix, prefix, middle; the others are prefix, suffix, middle.
      split: "character" cuts anywhere in the text and tokenises the three parts anew, so that a model can go on from
        within a word. "token" cuts between tokens, and so is done where a document holds what can't be written again,
        such as an unknown sign.
      draws: a document is seen so many times, each with its own cuts: an epoch is as many passes.
      seq_len: T.
      tokenizer: of the run; it has the special tokens.

    Raises:
      InputError: an option can't be used, or the tokenizer can't be used with it.
    """
    if split not in SPLITS:
        raise InputError(f"split = {split!r}: is not known.{did_you_mean(str(split), SPLITS)}")
    if seq_len < _LEAST_ROW:
        raise InputError(f"data.seq_len = {seq_len} leaves no room for a middle. Set it to {_LEAST_ROW} at least.")
    if tokenizer is None:
        return View(lambda document, rng: [document])
    if split == "character" and not _keeps_spaces(tokenizer):
        raise InputError(
            "split = 'character': this tokenizer loses the space at a cut, so that a text can't be put together again. "
            "Use split='token'."
        )
    marks = fim_tokens(tokenizer)
    return View(_Fim(float(rate), float(spm_rate), split, draws, seq_len, tokenizer, marks).documents)


def special_tokens(tokenizer: Tokenizer) -> tuple[str, ...]:
    """Names of the special tokens that the view writes; a run adds those that the tokenizer lacks."""
    return fim_names(tokenizer)


def infilling_note(tokenizer: Tokenizer, rate: float = 0.5, spm_rate: float = 0.5, **options: Any) -> dict[str, Any]:
    """The shares of texts that are seen as psm and as spm."""
    return infilling.make_note({"psm": rate * (1 - spm_rate), "spm": rate * spm_rate})


_Parts = tuple[list[int], list[int], list[int]]  # prefix, middle, suffix


class _Draw(NamedTuple):
    """What chance decides of a piece: whether its middle is moved, in which order, and where it is cut (shares of its
    length, in [0, 1), the lesser first)."""

    moved: bool
    spm: bool
    cuts: tuple[float, float]


@dataclasses.dataclass(frozen=True, eq=False)
class _Fim:
    """The view with its options, see `make`; `marks` are the special tokens."""

    rate: float
    spm_rate: float
    split: str
    draws: int
    seq_len: int
    tokenizer: Tokenizer
    marks: FimTokens

    def documents(self, document: Document, rng: np.random.Generator) -> list[Document]:
        if not document.mask.all():
            raise InputError(
                "is a view of plain text, and this source has conversations or labels. Take the view out, or name a "
                "source of texts."
            )
        return [seen for _ in range(self.draws) for seen in self._draw(document, rng)]

    def _draw(self, document: Document, rng: np.random.Generator) -> list[Document]:
        """The document as it is, or in pieces that fit into a row."""
        pieces, at, moved = [], 0, False
        while at < len(document.tokens):
            draw = _Draw(rng.random() < self.rate, rng.random() < self.spm_rate, tuple(sorted(rng.random(2).tolist())))
            size, tokens = self._move(document.tokens, at, draw) if draw.moved else (0, [])
            if not size:
                size = self._whole(document.tokens[at : at + self.seq_len], at + self.seq_len < len(document.tokens))
                tokens = document.tokens[at : at + size]
            else:
                moved = True
            pieces.append(Document(np.array(tokens, np.int32), np.ones(len(tokens), bool)))
            at += size
        return pieces if moved else [document]

    def _move(self, tokens: np.ndarray, at: int, draw: _Draw) -> tuple[int, list[int]]:
        """Moves the middle of a piece.

        Args:
          tokens: [n] int32, of the document.
          at: where the piece begins.
          draw: what was drawn for it.

        Returns:
          how many of the document's tokens the piece takes, and its tokens, at most T; 0 and none where there is
          nothing to move, or no room for it.
        """
        ended = tokens[-1] == self.tokenizer.eos
        stop = len(tokens) - ended
        before = [self.tokenizer.bos] if at == 0 and tokens[0] == self.tokenizer.bos else []
        start = at + len(before)
        end = [self.tokenizer.eos if self.marks.end is None else self.marks.end]
        room = self.seq_len - len(before) - 3 - len(end) - (self.marks.end is not None)
        size = min(room, stop - start)
        while size > 0:
            last = start + size == stop
            size = size if last else self._whole(tokens[start : start + size], True)
            closing = [*end, self.tokenizer.eos] if last and ended and self.marks.end is not None else end
            prefix, middle, suffix = self._cut(tokens[start : start + size].tolist(), draw.cuts, first=at == 0)
            seen = [*before, *infilling.arrange(self.marks, prefix, middle, suffix, spm=draw.spm), *closing]
            if len(seen) <= self.seq_len:
                return len(before) + size + (last and ended), seen
            size -= len(seen) - self.seq_len  # the parts have more tokens than the whole had
        return 0, []

    def _whole(self, tokens: np.ndarray, more: bool) -> int:
        """How many of the tokens of a piece to keep, so that it doesn't end within a character, if there is `more`."""
        if more:
            for back in range(min(_CHARACTER, len(tokens))):
                kept = tokens[: len(tokens) - back]
                if not self.tokenizer.decode(kept.tolist()).endswith(_BROKEN):
                    return len(kept)
        return len(tokens)

    def _cut(self, tokens: list[int], cuts: tuple[float, float], *, first: bool) -> _Parts:
        """Prefix, middle and suffix of a piece without what begins and ends a document, the `first` one or another."""
        parts = self._cut_text(tokens, cuts, first=first) if self.split == "character" else None
        if parts is None:
            start, stop = (int(cut * (len(tokens) + 1)) for cut in cuts)
            parts = tokens[:start], tokens[start:stop], tokens[stop:]
        return parts

    def _cut_text(self, tokens: list[int], cuts: tuple[float, float], *, first: bool) -> _Parts | None:
        """The same, cut in the text; None where the parts wouldn't be the text of the whole."""
        text = self.tokenizer.decode_after(tokens)
        if _BROKEN in text or not self._unwritten.isdisjoint(tokens):
            return None
        # The space that the tokenizer put before a document belongs to its prefix: without one, there is none.
        space = len(text) - len(self.tokenizer.decode(tokens)) if first else 0
        start, stop = (space + int(cut * (len(text) - space + 1)) for cut in cuts)
        texts = [text[:start] if start > space else "", text[start:stop], text[stop:]]
        parts = self.tokenizer.encode_stretches(texts, special=False, first=False)
        if [self.tokenizer.decode_after(part) for part in parts] != texts:
            return None
        return tuple(parts)

    @functools.cached_property
    def _unwritten(self) -> frozenset[int]:
        """Ids of special tokens, which no text gives: in one there can be but that of an unknown sign."""
        return frozenset(self.tokenizer.special_ids.tolist())


def _keeps_spaces(tokenizer: Tokenizer) -> bool:
    """Whether stretches of a text have the spaces that they begin and end with."""
    texts = ["a", " b", "c ", " "]
    stretches = tokenizer.encode_stretches(texts, special=False, first=False)
    return [tokenizer.decode_after(stretch) for stretch in stretches] == texts
