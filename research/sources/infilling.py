"""A middle from what stands around it: in which order models read a prefix and a suffix, and how the middle ends.

Forms, after <|bos|> where the tokenizer has it (Bavarian et al. 2022, arXiv:2207.14255), in our names for the tokens:
  psm       <|fim_prefix|> PREFIX <|fim_suffix|> SUFFIX <|fim_middle|> MIDDLE
  spm       <|fim_prefix|> <|fim_suffix|> SUFFIX <|fim_middle|> PREFIX MIDDLE, the paper's second variant
  sentinel  PREFIX <|mask:0|> SUFFIX <|mask:1|>, and then <|mask:0|> MIDDLE <|mask:1|>: of models that were trained to
            denoise. What they were shown ends with a hidden span, as T5's texts do, and so does this. The mode token
            that short spans had in training comes first; where that isn't noted and there are some, UL2's R
  left      PREFIX MIDDLE: of models that read from left to right, to compare with; they don't see the suffix
Each part is tokenised by itself, so that a cut within a word gives the same tokens in training and at use. A tokenizer
that puts a space before a text does so before a prefix alone.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from research.errors import InputError, did_you_mean
from research.sources import special_tokens
from research.sources.special_tokens import FimTokens
from research.sources.tokenizers import Tokenizer

FORMS = ("psm", "spm", "sentinel", "left")


def arrange(marks: FimTokens, prefix: list[int], middle: list[int], suffix: list[int], *, spm: bool) -> list[int]:
    """The tokens of three parts in the form psm or spm, without those that begin and end a document."""
    if spm:
        return [marks.prefix, marks.suffix, *suffix, marks.middle, *prefix, *middle]
    return [marks.prefix, *prefix, marks.suffix, *suffix, marks.middle, *middle]


@dataclasses.dataclass(frozen=True)
class Infilling:
    """How one model is asked for a middle.

    Attributes:
      form: one of FORMS.
      tokenizer: of the model.
      stop: ids that end a middle.
      marks: of psm and spm.
      holes: of sentinel, that of the middle and the next one.
      mode: of sentinel, what comes before the prefix.
      why: it is this form, in a few words.
    """

    form: str
    tokenizer: Tokenizer
    stop: tuple[int, ...]
    marks: FimTokens | None = None
    holes: tuple[int, ...] = ()
    mode: tuple[int, ...] = ()
    why: str = "it was asked for"

    @property
    def extra(self) -> int:
        """How many tokens an answer has beside those of the middle."""
        return 1 if self.holes else 0

    def prompt(self, prefix: str, suffix: str) -> list[int]:
        """The ids that the model goes on from with what belongs between two texts."""
        first = self.tokenizer.encode_stretches([prefix], special=False, first=True)[0]
        last = self.tokenizer.encode_stretches([suffix], special=False, first=False)[0]
        bos = [] if self.tokenizer.bos is None else [self.tokenizer.bos]
        if self.marks is not None:
            return [*bos, *arrange(self.marks, first, [], last, spm=self.form == "spm")]
        if not self.holes:
            return [*bos, *first]
        hole, after = self.holes
        return [*bos, *self.mode, *first, hole, *([*last, after] if last else [])]

    def text(self, ids: list[int]) -> str:
        """The text of an answer without what ends it: of one with a sentinel, what follows that."""
        if self.holes and self.holes[0] in ids:
            ids = ids[ids.index(self.holes[0]) + 1 :]
        return self.tokenizer.decode_after([i for i in ids if i not in self.stop])  # which some don't call special


def make_infilling(form: str, tokenizer: Tokenizer) -> Infilling:
    """The way to ask for a middle in one form.

    Args:
      form: one of FORMS; or "auto", that of which the tokenizer notes that the model saw most in training (spm before
        psm where it saw as many: a small model finds the place more easily), else the first of psm and sentinel that
        it has the tokens of.
      tokenizer: of the model.

    Raises:
      InputError: there is no such form, or the tokenizer lacks its tokens.
    """
    if form not in ("auto", *FORMS):
        raise InputError(f"form = {form}: is not known.{did_you_mean(form, ('auto', *FORMS))}")
    if form == "auto":
        form, why = _find_form(tokenizer)
        return dataclasses.replace(make_infilling(form, tokenizer), why=why)
    if form == "left":
        return Infilling(form, tokenizer, tokenizer.stop)
    sentinel = form == "sentinel"
    names = special_tokens.sentinel_names(tokenizer, 2) if sentinel else special_tokens.fim_names(tokenizer)
    missing = [name for name in names if not _has(tokenizer, (name,))]
    if missing:
        raise InputError(
            f"form = {form}: the tokenizer has no {' '.join(missing)}, so that the model hasn't learnt to fill in so. "
            "Leave the form out, or name a model that has."
        )
    if sentinel:
        holes = tuple(special_tokens.ordered_sentinels(tokenizer)[:2])
        return Infilling(form, tokenizer, (*tokenizer.stop, holes[1]), holes=holes, mode=_mode(tokenizer))
    marks = special_tokens.fim_tokens(tokenizer)
    # A model that begins another part has ended the middle.
    stop = dict.fromkeys([*tokenizer.stop, *(mark for mark in marks if mark is not None)])
    return Infilling(form, tokenizer, tuple(stop), marks=marks)


def _find_form(tokenizer: Tokenizer) -> tuple[str, str]:
    """The form that "auto" means, and why."""
    seen = _shares(tokenizer)
    if seen:
        shown = ", ".join(f"{form} {share:.0%}" for form, share in seen.items())
        return max(seen, key=seen.get), f"as in training (of the texts {shown})"
    why = "the first that the tokenizer has the tokens of; how the model was trained isn't noted"
    if _has(tokenizer, special_tokens.fim_names(tokenizer)):
        return "psm", why
    if _has(tokenizer, special_tokens.sentinel_names(tokenizer, 2)):
        return "sentinel", why
    raise InputError(
        "form = auto: the tokenizer has neither tokens around a prefix, a suffix and a middle, nor sentinels, so that "
        "the model hasn't learnt to fill in. Name a model that has; or, in the task infill, form=left, which shows the "
        "prefix alone."
    )


def make_note(forms: Mapping[str, float], **more: Any) -> dict[str, Any]:
    """What a tokenizer_config.json is to say of a view that teaches to fill in (the field special_tokens.INFILLING).

    Args:
      forms: of psm, spm and sentinel, the share of the texts that are seen so.
      more: "mode", of sentinel: the token before the inputs, "" for none.
    """
    seen = {form: round(share, 4) for form, share in forms.items() if share}
    return {"forms": seen, **more} if seen else {}


def merge_notes(notes: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The note of several sources; of two that say different things of one form the first counts."""
    merged: dict[str, Any] = {}
    for note in notes:
        merged = {**note, **merged, "forms": {**note["forms"], **merged.get("forms", {})}}
    return merged


def _shares(tokenizer: Tokenizer) -> dict[str, float]:
    """Form -> share of the texts, as the tokenizer notes; spm comes first."""
    forms = tokenizer.infilling.get("forms")
    forms = forms if isinstance(forms, dict) else {}
    return {form: forms[form] for form in ("spm", "psm", "sentinel") if isinstance(forms.get(form), int | float)}


def _mode(tokenizer: Tokenizer) -> tuple[int, ...]:
    """What comes before a prefix under sentinel: the mode token of the training, else that of short spans."""
    noted = tokenizer.infilling.get("mode")
    if isinstance(noted, str):
        token = tokenizer.backend.token_to_id(noted) if noted else None
        return () if token is None else (token,)
    names = special_tokens.mode_names(tokenizer)
    return (special_tokens.mode_tokens(tokenizer).regular,) if _has(tokenizer, names) else ()


def _has(tokenizer: Tokenizer, names: tuple[str, ...]) -> bool:
    return all(tokenizer.backend.token_to_id(name) is not None for name in names)
