"""Texts with parts hidden, followed by what was hidden: span corruption (T5), its relatives, and UL2's mixture.

A document is seen as its inputs, the text with spans replaced by sentinels, and its targets, the sentinels with the
spans that they stand for: `Thank you <X> me to your party <Y> week. <X> for inviting <Y> last`. The targets and the
token that ends them are to be predicted. The batch field `prefix` is 1 in the inputs, which a prefix LM reads whole.

Sources: T5 (Raffel et al., arXiv:1910.10683), UL2 (Tay et al., arXiv:2205.05131), UL2R (Tay et al., arXiv:2210.11399).
"""

import bisect
import dataclasses
import itertools
from collections.abc import Iterator, Mapping, Sequence
from typing import Annotated, Any

import numpy as np

from research import ranges
from research.errors import InputError, did_you_mean
from research.options import convert
from research.ranges import Positive, Range, Size
from research.sources import corruption
from research.sources.infilling import make_note
from research.sources.special_tokens import (
    FIRST_SENTINEL,
    mode_names,
    mode_tokens,
    ordered_sentinels,
    sentinel_count,
    sentinel_names,
)
from research.sources.tokenizers import Tokenizer
from research.sources.views import Document, View

# What inputs and targets of each form are; [x] are T5's names.
FORMS = {
    "spans": "a sentinel of its own for each span, and in the targets before it [noise_span_to_unique_sentinel]",
    "single": "the same sentinel for all spans [noise_span_to_sentinel]",
    "mask": "the same sentinel for each hidden token; the targets are the whole text [noise_token_to_sentinel]",
    "drop": "spans are left out, and the targets are what was left out, without a sign [drop_noise_tokens]",
    "deshuffle": "all tokens in a random order; the targets are the whole text [permute_noise_tokens]",
    "prefix": "a prefix of random length, and what follows it [random_prefix_noise_mask]",
}
MODES = {"R": "regular", "X": "extreme", "S": "sequential"}  # fields of special_tokens.ModeTokens
NUMBERINGS = ("named", "down", "up")
_SHORTEST = 3  # tokens of the longest text that must fit: then any longer one can be cut into pieces of at least two


Density = Annotated[float, Range(above=0, below=1)]  # something is hidden, and something shown
Span = Annotated[float, Range(1)]


@dataclasses.dataclass(frozen=True)
class Denoiser:
    """One way to hide parts of a text.

    Attributes:
      form: see FORMS.
      density: share of the tokens that is hidden. Of "prefix" it is the mean, and 0.5 makes any split equally likely;
        "deshuffle" hides none.
      mean_span: mean number of tokens in a span.
      mode: "R", "X" or "S" puts that mode token of UL2 before the inputs; "" none.
      weight: pieces are given to denoisers by chance, in proportion to it.
    """

    form: str = "spans"
    density: Density = 0.15
    mean_span: Span = 3.0
    mode: str = ""
    weight: Positive = 1.0

    def spans(self, length: int) -> int:
        """How many spans are hidden in a text of so many tokens."""
        return corruption.span_counts(length, self.density, self.mean_span)[1]

    def size(self, length: int) -> int:
        """How many tokens the inputs and targets of such a text have together."""
        added = {"spans": 2, "single": 2}.get(self.form, 0) * self.spans(length)
        return length * (2 if self.form in ("mask", "deshuffle") else 1) + added

    def sentinels(self, length: int) -> int:
        """How many different sentinels such a text needs."""
        return self.spans(length) if self.form == "spans" else int(self.form in ("single", "mask"))

    def example(
        self, text: np.ndarray, sentinels: np.ndarray, rng: np.random.Generator
    ) -> tuple[np.ndarray, np.ndarray]:
        """The inputs and targets of a text, [n] int32 with n >= 2. `sentinels`: ids in the order of use."""
        if self.form == "deshuffle":
            return rng.permutation(text), text
        if self.form == "prefix":
            mask = corruption.suffix_mask(len(text), self.density, rng)
        else:
            mask = corruption.span_mask(len(text), self.density, self.mean_span, rng)
        if self.form in ("prefix", "drop"):
            return text[~mask], text[mask]
        if self.form == "mask":
            return np.where(mask, sentinels[0], text), text
        marks = sentinels if self.form == "spans" else int(sentinels[0])
        return corruption.with_sentinels(text, mask, marks), corruption.with_sentinels(text, ~mask, marks)


# UL2: its table 1, in equal parts, as its ul2_objective mixes them where no rates are given. UL2R: its section 2.3,
# where extreme means "a mean length of 32 OR a corruption rate of up to 50%"; a half of X each is Levanter's reading.
MIXTURES = {
    "ul2": (
        Denoiser("spans", 0.15, 3.0, "R"),
        Denoiser("spans", 0.15, 8.0, "R"),
        Denoiser("spans", 0.5, 3.0, "X"),
        Denoiser("spans", 0.5, 8.0, "X"),
        Denoiser("spans", 0.15, 64.0, "X"),
        Denoiser("spans", 0.5, 64.0, "X"),
        Denoiser("prefix", 0.25, mode="S"),
    ),
    "ul2r": (
        Denoiser("spans", 0.15, 3.0, "R", 0.25),
        Denoiser("spans", 0.15, 32.0, "X", 0.125),
        Denoiser("spans", 0.5, 3.0, "X", 0.125),
        Denoiser("prefix", 0.5, mode="S", weight=0.5),
    ),
}


def make(
    *,
    form: str | None = None,
    density: Density | None = None,
    mean_span: Span | None = None,
    mixture: str | Sequence[Mapping[str, Any]] = "",
    modes: bool | None = None,
    numbering: str = "named",
    draws: Size = 1,
    seq_len: int,
    tokenizer: Tokenizer | None = None,
) -> View:
    """A text is seen as corrupted inputs and targets; a long one as several, each of which fits a row.

    A text of fewer than two tokens, which leaves nothing to hide or nothing to show, is left out.

    Args:
      form, density, mean_span: see Denoiser.
      mixture: in their place, "ul2", "ul2r", or denoisers such as {"form": "spans", "density": 0.5, "mean_span": 8.0,
        "mode": "X", "weight": 2.0}, whose fields are Denoiser's.
      modes: whether the inputs of "ul2" or "ul2r" begin with mode tokens; by default they do.
      numbering: the order of sentinels. "named": that of the numbers in their names, which falls in T5's ids and rises
        in those that we add. "down" and "up": from the greatest or the least id of all that the tokenizer has.
      draws: how often each text is seen, each time with other parts hidden.
      seq_len: T.
      tokenizer: of the run; None where options are only checked.

    Raises:
      InputError: an option can't be used, or the tokenizer has too few sentinels.
    """
    options = {"form": form, "density": density, "mean_span": mean_span, "mixture": mixture, "modes": modes}
    denoisers = _denoisers(options)
    if numbering not in NUMBERINGS:
        raise InputError(f"numbering = {numbering!r}: is not known.{did_you_mean(str(numbering), NUMBERINGS)}")
    if numbering != "named" and not any(each.sentinels(_SHORTEST) for each in denoisers):
        raise InputError(f"numbering = {numbering!r}: the form {denoisers[0].form!r} has no sentinels. Leave it out.")
    lengths = tuple(_longest(each, seq_len, tokenizer) for each in denoisers)
    if tokenizer is None:
        return View(lambda document, rng: [document], ("prefix",))
    denoising = _Denoising(
        denoisers,
        shares=tuple(itertools.accumulate(each.weight for each in denoisers)),
        lengths=lengths,
        starts=tuple(_start(each, tokenizer) for each in denoisers),
        sentinels=_sentinels(tokenizer, _needed(denoisers, seq_len, tokenizer), numbering),
        draws=draws,
        bos=tokenizer.bos,
        eos=tokenizer.eos,
    )
    return View(denoising.documents, ("prefix",))


def special_tokens(tokenizer: Tokenizer, seq_len: int, **options: Any) -> tuple[str, ...]:
    """The names of the sentinels and mode tokens that the view needs. Arguments: see `make`."""
    denoisers = _denoisers(options)
    modes = mode_names(tokenizer) if any(each.mode for each in denoisers) else ()
    return (*sentinel_names(tokenizer, _needed(denoisers, seq_len, tokenizer)), *modes)


def noted_tokens(tokenizer: Tokenizer, numbering: str = "named", **options: Any) -> dict[str, str]:
    """The first sentinel, so that whoever asks the model to fill in begins with it too."""
    if not any(each.sentinels(_SHORTEST) for each in _denoisers(options)):
        return {}
    return {FIRST_SENTINEL: tokenizer.backend.id_to_token(ordered_sentinels(tokenizer, numbering)[0])}


def infilling_note(tokenizer: Tokenizer, **options: Any) -> dict[str, Any]:
    """The share of texts with a sentinel for each span, and the mode token of those with the shortest spans."""
    denoisers = _denoisers(options)
    spans = [each for each in denoisers if each.form == "spans"]
    if not spans:
        return {}
    share = sum(each.weight for each in spans) / sum(each.weight for each in denoisers)
    first = min(spans, key=lambda each: (each.mean_span, each.density))
    mode = getattr(mode_tokens(tokenizer), MODES[first.mode]) if first.mode else None
    return make_note({"sentinel": share}, mode="" if mode is None else tokenizer.backend.id_to_token(mode))


def _start(denoiser: Denoiser, tokenizer: Tokenizer) -> np.ndarray:
    """The ids before the inputs: bos, if the tokenizer has one, and the mode token, if the denoiser has one."""
    first = [] if tokenizer.bos is None else [tokenizer.bos]
    mode = [getattr(mode_tokens(tokenizer), MODES[denoiser.mode])] if denoiser.mode else []
    return np.array([*first, *mode], np.int32)


def _denoisers(options: Mapping[str, Any]) -> tuple[Denoiser, ...]:
    """The denoisers that the options of `make` name. Raises InputError where they can't be used."""
    mixture, modes = options.get("mixture", ""), options.get("modes")
    alone = {name: options[name] for name in ("form", "density", "mean_span") if options.get(name) is not None}
    if mixture != "" and alone:
        raise InputError(f"{next(iter(alone))}: the denoisers of mixture have their own. Leave one of the two out.")
    if modes is not None and not isinstance(modes, bool):
        raise InputError(f"modes = {modes!r}: must be True or False.")
    if modes is not None and not (isinstance(mixture, str) and mixture):
        raise InputError("modes: is of mixture='ul2' and 'ul2r'. Of a list, each denoiser says its `mode`.")
    if mixture == "":
        return (_denoiser(alone, ""),)
    if isinstance(mixture, str):
        if mixture not in MIXTURES:
            raise InputError(f"mixture = {mixture!r}: is not known.{did_you_mean(mixture, MIXTURES)}")
        plain = tuple(dataclasses.replace(each, mode="") for each in MIXTURES[mixture])
        return plain if modes is False else MIXTURES[mixture]
    if not isinstance(mixture, Sequence) or not mixture or not all(isinstance(each, Mapping) for each in mixture):
        raise InputError(f"mixture = {mixture!r}: must be one of {', '.join(MIXTURES)}, or a list of denoisers.")
    return tuple(_denoiser(each, f"mixture: the denoiser {dict(each)}: ") for each in mixture)


def _denoiser(options: Mapping[str, Any], where: str) -> Denoiser:
    """A denoiser of its options. Raises InputError where they can't be used; `where` begins its message."""
    known = [field.name for field in dataclasses.fields(Denoiser)]
    for name in options:
        if name not in known:
            raise InputError(f"{where}{name}: no such option.{did_you_mean(name, known)}")
        convert(ranges.hints(Denoiser)[name], options[name], f"{where}{name}")
    form = options.get("form", "spans")
    if form not in [*FORMS]:
        raise InputError(f"{where}form = {form!r}: is not known.{did_you_mean(str(form), FORMS)}")
    for name in {"deshuffle": ("density", "mean_span"), "prefix": ("mean_span",)}.get(form, ()):
        if name in options:
            raise InputError(f"{where}{name} = {options[name]!r}: the form {form!r} has none. Leave it out.")
    result = Denoiser(**{"density": 0.5 if form == "prefix" else 0.15, **options})
    if result.mode not in ("", *MODES):
        raise InputError(f"{where}mode = {result.mode!r}: is not known.{did_you_mean(str(result.mode), MODES)}")
    return result


def _longest(denoiser: Denoiser, seq_len: int, tokenizer: Tokenizer | None) -> int:
    """The most tokens of a text whose inputs and targets fit a row. Raises InputError where too few do."""
    added = 1 + bool(denoiser.mode) + (tokenizer is not None and tokenizer.bos is not None)
    length = corruption.longest(denoiser.size, seq_len - added)
    if length < _SHORTEST:
        least = denoiser.size(_SHORTEST) + added
        raise InputError(f"a text of {_SHORTEST} tokens needs data.seq_len = {least}, and it is {seq_len}. Raise it.")
    return length


def _needed(denoisers: Sequence[Denoiser], seq_len: int, tokenizer: Tokenizer) -> int:
    """How many sentinels the longest texts need."""
    return max(each.sentinels(_longest(each, seq_len, tokenizer)) for each in denoisers)


def _sentinels(tokenizer: Tokenizer, needed: int, numbering: str) -> np.ndarray:
    """The ids of sentinels in the order of use, at least as many as are needed."""
    there = sentinel_count(tokenizer)
    if there < needed:
        raise InputError(
            f"a text that fills a row has up to {needed} spans, each with a sentinel of its own, and the tokenizer has "
            f"{there} sentinels. Name more in tokenizer.added_tokens, raise mean_span, lower density or data.seq_len, "
            "or set form='single'."
        )
    return np.array(ordered_sentinels(tokenizer, numbering), np.int32)


@dataclasses.dataclass(frozen=True, eq=False)
class _Denoising:
    """The view with its options.

    Attributes:
      denoisers: among which pieces of texts are shared out.
      shares: the sum of the weights up to each of them.
      lengths: the most tokens of a piece for each.
      starts: the ids before the inputs of each.
      sentinels: [n] int32, in the order of use.
      draws: how often each text is seen.
      bos, eos: of the tokenizer.
    """

    denoisers: tuple[Denoiser, ...]
    shares: tuple[float, ...]
    lengths: tuple[int, ...]
    starts: tuple[np.ndarray, ...]
    sentinels: np.ndarray
    draws: int
    bos: int | None
    eos: int

    def documents(self, document: Document, rng: np.random.Generator) -> list[Document]:
        if not document.mask.all():
            raise InputError(
                "is a view of plain text, and this source has conversations or labels. Take the view out, or name a "
                "source of texts."
            )
        tokens = document.tokens
        text = tokens[int(tokens[0] == self.bos) : len(tokens) - int(tokens[-1] == self.eos)]
        return [self._example(*piece, rng) for _ in range(self.draws) for piece in self._pieces(text, rng)]

    def _pieces(self, text: np.ndarray, rng: np.random.Generator) -> Iterator[tuple[int, np.ndarray]]:
        """Yields pieces of a text of at least two tokens each, with the number of the denoiser of each."""
        start = 0
        while len(text) - start > 1:
            number = bisect.bisect(self.shares, rng.random() * self.shares[-1]) if len(self.shares) > 1 else 0
            stop = min(start + self.lengths[number], len(text))
            stop -= stop == len(text) - 1  # a last piece of one token would be left out
            yield number, text[start:stop]
            start = stop

    def _example(self, number: int, text: np.ndarray, rng: np.random.Generator) -> Document:
        inputs, targets = self.denoisers[number].example(text, self.sentinels, rng)
        tokens = np.concatenate([self.starts[number], inputs, targets, [self.eos]], dtype=np.int32)
        mask = np.arange(len(tokens)) >= len(tokens) - len(targets) - 1
        return Document(tokens, mask, {"prefix": ~mask})
