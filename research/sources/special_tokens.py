"""The special tokens of self-supervision: what each vocabulary calls its mask, its sentinels, the borders of a middle.

This is the one place that knows spellings. The functions that end in `names` give those that a tokenizer has, or else
those to add to it (Tokenizer.with_tokens); the others give ids, and an error where there are none.
"""

import inspect
import itertools
from collections.abc import Mapping, Sequence
from types import ModuleType
from typing import TYPE_CHECKING, Any, NamedTuple

from research.errors import InputError

if TYPE_CHECKING:  # it imports this module
    from research.sources.tokenizers import Tokenizer

MASK, SENTINEL = "<|mask|>", "<|mask:{}|>"  # what we add
_MASKS = ("[MASK]", "<mask>", MASK, "<|mdm_mask|>")  # BERT and ModernBERT, RoBERTa, ours, LLaDA
_SENTINELS = ("<extra_id_{}>", "▁<extra_id_{}>", SENTINEL)  # T5, mT5, ours
_FIM = (  # prefix, suffix, middle, and what ends a middle where it isn't the end of a text
    ("<|fim_prefix|>", "<|fim_suffix|>", "<|fim_middle|>", ""),  # Qwen, CodeGemma; what we add
    ("<fim_prefix>", "<fim_suffix>", "<fim_middle>", ""),  # StarCoder
    ("<fim-prefix>", "<fim-suffix>", "<fim-middle>", ""),  # SantaCoder
    ("▁<PRE>", "▁<SUF>", "▁<MID>", "▁<EOT>"),  # CodeLlama
    ("<｜fim▁begin｜>", "<｜fim▁hole｜>", "<｜fim▁end｜>", ""),  # DeepSeek
    ("[PREFIX]", "[SUFFIX]", "[MIDDLE]", ""),  # Codestral
    ("<|code_prefix|>", "<|code_suffix|>", "<|code_middle|>", ""),  # GLM
    ("<[fim-prefix]>", "<[fim-suffix]>", "<[fim-middle]>", ""),  # Seed-Coder
)
_MODES = (  # UL2's modes R, X and S
    ("[NLU]", "[NLG]", "[S2S]"),  # its checkpoint
    ("[R]", "[X]", "[S]"),  # its paper
    ("<|nlu|>", "<|nlg|>", "<|s2s|>"),  # what we add
)
FIRST_SENTINEL = "first_sentinel_token"  # in a tokenizer_config.json, as the view denoise counts
INFILLING = "infilling"  # in a tokenizer_config.json: in which forms a model learned to fill in
CONFIG_FIELDS = {MASK: "mask_token"}  # what a tokenizer_config.json calls a token that we add


class FimTokens(NamedTuple):
    """The ids around the parts of a document whose middle is moved to its end (Bavarian et al. 2022, arXiv:2207.14255).

    Attributes:
      prefix, suffix, middle: what each part begins with.
      end: what a middle ends with, or None where that is the end of a text.
    """

    prefix: int
    suffix: int
    middle: int
    end: int | None


class ModeTokens(NamedTuple):
    """The ids that name UL2's kinds of denoising (Tay et al. 2022, arXiv:2205.05131).

    Attributes:
      regular: R, short spans.
      extreme: X, long spans or many.
      sequential: S, a prefix is gone on with.
    """

    regular: int
    extreme: int
    sequential: int


def mask_names(tokenizer: "Tokenizer") -> tuple[str]:
    """The name of the token that stands for a masked one: the tokenizer's, or what to add."""
    own = tokenizer.variables.get("mask_token", "")
    return _first_known(tokenizer, [(name,) for name in (own, *_MASKS) if name]) or (MASK,)


def mask_token(tokenizer: "Tokenizer") -> int:
    """The id that stands for a masked token. Raises InputError where there is none."""
    return _ids(tokenizer, mask_names(tokenizer), "mask tokens")[0]


def sentinel_names(tokenizer: "Tokenizer", count: int) -> tuple[str, ...]:
    """The names of `count` sentinels, in the order of their numbers from 0: in the tokenizer's spelling, or ours."""
    spelling = next((form for form in _SENTINELS if _is_known(tokenizer, form.format(0))), SENTINEL)
    return tuple(spelling.format(i) for i in range(count))


def sentinel_count(tokenizer: "Tokenizer") -> int:
    """How many sentinels the tokenizer has, in the order of their numbers from 0."""
    names = sentinel_names(tokenizer, tokenizer.size)
    return sum(1 for _ in itertools.takewhile(lambda name: _is_known(tokenizer, name), names))


def sentinels(tokenizer: "Tokenizer", count: int) -> list[int]:
    """The ids of `count` sentinels, which stand for spans, in the order of their numbers from 0 (Raffel et al. 2020,
    arXiv:1910.10683). Raises InputError, which says how many there are, where there are fewer."""
    return _ids(tokenizer, sentinel_names(tokenizer, count), "sentinels")


def ordered_sentinels(tokenizer: "Tokenizer", numbering: str = "") -> list[int]:
    """The ids of all sentinels, in the order of their use.

    Args:
      tokenizer: that has them.
      numbering: "named", by the numbers in their names; "down" or "up", by ids. "" is as the tokenizer says: it notes
        the first one where a model was trained (the variable FIRST_SENTINEL), and else by their names.
    """
    named = sentinels(tokenizer, sentinel_count(tokenizer))
    if not numbering:
        first = tokenizer.backend.token_to_id(tokenizer.variables.get(FIRST_SENTINEL, ""))
        numbering = "named" if first not in named[1:] else "up" if first == min(named) else "down"
    return named if numbering == "named" else sorted(named, reverse=numbering == "down")


def fim_names(tokenizer: "Tokenizer") -> tuple[str, ...]:
    """The names of the tokens around a prefix, suffix and middle, and of what ends a middle if that has its own: the
    tokenizer's, or what to add."""
    known = [names for names in _FIM if all(_is_known(tokenizer, name) for name in names[:3])]
    return tuple(name for name in (known or _FIM)[0] if name)


def fim_tokens(tokenizer: "Tokenizer") -> FimTokens:
    """The ids around a prefix, suffix and middle. Raises InputError where one is missing."""
    prefix, suffix, middle, *end = _ids(tokenizer, fim_names(tokenizer), "tokens of fill-in-the-middle")
    return FimTokens(prefix, suffix, middle, end[0] if end else None)


def mode_names(tokenizer: "Tokenizer") -> tuple[str, ...]:
    """The names of UL2's mode tokens, in the order of ModeTokens: the tokenizer's, or what to add."""
    return _first_known(tokenizer, _MODES) or _MODES[-1]


def mode_tokens(tokenizer: "Tokenizer") -> ModeTokens:
    """The ids of UL2's mode tokens. Raises InputError where one is missing."""
    return ModeTokens(*_ids(tokenizer, mode_names(tokenizer), "mode tokens"))


def needed_by(
    module: ModuleType, tokenizer: "Tokenizer", options: Mapping[str, Any], of_run: Mapping[str, Any]
) -> tuple[str, ...]:
    """The names of the special tokens that a view or an objective needs; () where its module doesn't say.

    Args:
      module: that of its `make`. A function special_tokens(tokenizer, **options) -> names says what it needs; it is
        given those of the options, or of their defaults in `make`, that it has parameters for.
      tokenizer: of the run.
      options: that the config sets.
      of_run: name -> value, of the parameters of `make` that the run sets.
    """
    function = getattr(module, "special_tokens", None)
    if function is None:
        return ()
    parameters = inspect.signature(module.make).parameters
    values = {name: p.default for name, p in parameters.items() if p.default is not p.empty}
    values |= {name: value for name, value in of_run.items() if name in parameters} | dict(options)
    accepted = inspect.signature(function).parameters
    if not any(p.kind is p.VAR_KEYWORD for p in accepted.values()):
        values = {name: value for name, value in values.items() if name in accepted}
    values.pop("tokenizer", None)
    return tuple(function(tokenizer, **values))


def _first_known(tokenizer: "Tokenizer", groups: Sequence[tuple[str, ...]]) -> tuple[str, ...]:
    """The first group of names that the tokenizer has all of; () where there is none."""
    return next((group for group in groups if all(_is_known(tokenizer, name) for name in group)), ())


def _is_known(tokenizer: "Tokenizer", name: str) -> bool:
    return tokenizer.backend.token_to_id(name) is not None


def _ids(tokenizer: "Tokenizer", names: tuple[str, ...], kind: str) -> list[int]:
    """The ids of all `names`. Raises InputError, which says of what `kind` they are, where there are fewer."""
    missing = [name for name in names if not _is_known(tokenizer, name)]
    if missing:
        some = missing[0] + (f" to {missing[-1]}" if len(missing) > 1 else "")
        raise InputError(
            f"tokenizer: has {len(names) - len(missing)} of the {len(names)} {kind} that are needed: no {some}. Name "
            "what it lacks in tokenizer.added_tokens, or use a tokenizer that has them."
        )
    return [tokenizer.backend.token_to_id(name) for name in names]
