"""Whether a model fills in the middle of texts as it was.

A record has `prefix`, `middle` and `suffix`; or `text`, whose middle is a few words at a place drawn by chance, equal
for every model. Forms are those of sources.infilling and, of encoders, "mask": as many masks as the middle has tokens,
all filled at once, each with its likeliest token.
"""

import dataclasses
import functools
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int

from research.devices import distributed, sharding
from research.errors import InputError, did_you_mean, located
from research.evals.scoring import padded_length
from research.models import virtual
from research.models.generation import Generate, generate_batches, make_generate
from research.models.sampling import SamplingConfig, longest_prompt, next_logits
from research.models.transformer import Model, Params
from research.ops.cpu.argmax import argmax
from research.sources import infilling, records, special_tokens
from research.sources.formats import split_key
from research.sources.infilling import Infilling, make_infilling
from research.sources.tokenizers import Tokenizer

Metrics = dict[str, float]

FORMS = ("auto", *infilling.FORMS, "mask")
SPAN, CONTEXT = (1, 8), 64  # words of a middle, and of what is shown on either side, unless a task says otherwise
_SEED = 0x5EED
_WORD = re.compile(r"\s*\S+")
_SPARE = 8  # tokens that an answer may have more than the longest middle
_SHOWN = 30  # characters of a sample


class Gap(NamedTuple):
    """A text with a middle to fill in."""

    prefix: str
    middle: str
    suffix: str


class Sample(NamedTuple):
    """A gap and what came of it."""

    prefix: str
    suffix: str
    expected: str
    completion: str
    correct: bool

    def __str__(self) -> str:
        verdict = "right" if self.correct else f"wrong, expected {self.expected!r}"
        return f"{self.prefix[-_SHOWN:]!r} ? {self.suffix[:_SHOWN]!r} -> {self.completion!r} ({verdict})"


def is_text(record: Mapping[str, Any]) -> bool:
    """Whether the middle of a record is to be drawn."""
    return "text" in record and "middle" not in record


def read_gaps(
    items: Sequence[tuple[str, Mapping[str, Any]]], span: tuple[int, int], context: int
) -> tuple[list[Gap], int]:
    """The gaps of records, and how many texts are too short for one.

    Args:
      items: (where, record).
      span, context: see `draw_gap`.

    Raises:
      InputError: a record is at fault, or all are too short.
    """
    gaps = []
    for where, record in items:
        with located(where):
            gaps.append(draw_gap(_text(record), span, context) if is_text(record) else _read_gap(record))
    kept = [gap for gap in gaps if gap is not None]
    if not kept:
        raise InputError(f"none of {len(gaps)} texts has {span[0] + 2} words. Give longer ones, or lower span.")
    return kept, len(gaps) - len(kept)


def _text(record: Mapping[str, Any]) -> str:
    return records.check(dict(record), "text", {})[0][1]


def _read_gap(record: Mapping[str, Any]) -> Gap:
    for name in ("prefix", "middle", "suffix"):
        if not isinstance(record.get(name), str):
            raise InputError(f"has no text in {name!r}. Give prefix, middle and suffix, or text.")
    if not record["middle"].strip():
        raise InputError("has a blank middle, which can't be told from none. Drop the record.")
    return Gap(*(record[name] for name in Gap._fields))


def draw_gap(text: str, span: tuple[int, int] = SPAN, context: int = CONTEXT) -> Gap | None:
    """A gap at a place of a text that depends on the text alone.

    Args:
      text: words, parted by white space; a word has the space before it, so that a middle begins where tokens do.
      span: the fewest and the most words of the middle; each number is equally likely.
      context: the most words before it, and after.

    Returns:
      the gap, with a word at least on either side; None of a text that is too short.
    """
    rng = np.random.default_rng([_SEED, split_key([("text", text)])])
    words = [match.span() for match in _WORD.finditer(text)]
    most = min(span[1], len(words) - 2)
    if most < span[0]:
        return None
    size = int(rng.integers(span[0], most + 1))
    first = int(rng.integers(1, len(words) - size))
    start, stop = words[first][0], words[first + size - 1][1]
    begin = words[first - context][0] if first > context else 0
    end = words[min(first + size + context, len(words)) - 1][1]
    return Gap(text[begin:start].lstrip() if begin else text[:start], text[start:stop], text[stop:end])


def make_infill(
    model: Model,
    tokenizer: Tokenizer,
    gaps: Sequence[Gap],
    short: int = 0,
    *,
    form: str = "auto",
    max_new_tokens: int | None = None,
    batch_size: int = 64,
) -> Callable[[Params, jax.Array], tuple[Metrics, list[Sample]]]:
    """Returns evaluate(params, key) -> (metrics, a Sample for each gap that fits, in their order).

    The metrics are
      exact_match: the share of middles that are filled in as they were, white space around them aside. Of the form
        "left", whose models know no end of a middle, the share of answers that begin with it.
      skipped_too_long: how many gaps don't fit into the model's max_length, and are left out.
      skipped_too_short: how many texts are left out for having too few words; where there are any.

    Args:
      model: of `params`.
      tokenizer: of the model.
      gaps: at least one.
      short: how many texts were too short to have one.
      form: one of FORMS. "auto" is "mask" of an encoder, else see sources.infilling.
      max_new_tokens: of an answer; by default 8 more than the longest middle has.
      batch_size: gaps answered at once.

    Raises:
      InputError: the form isn't of this model or tokenizer, or no gap fits.
    """
    form = _resolve(form, model)
    if form == "mask":
        if max_new_tokens is not None:
            raise InputError("max_new_tokens: form=mask fills as many as the middle has. Leave it out.")
        filler, room = _Masking.make(model, tokenizer, batch_size), model.max_length
    else:
        if max_new_tokens is None:
            longest = max(len(_middle(gap, tokenizer)) for gap in gaps)
            max_new_tokens = min(longest + _SPARE, model.max_length // 2)
        filler = _Generating.make(model, tokenizer, form, max_new_tokens, batch_size)
        room = filler.longest
    prompts = [filler.prompt(gap) for gap in gaps]
    fitting = [(gap, prompt) for gap, prompt in zip(gaps, prompts, strict=True) if len(prompt) <= room]
    if not fitting:
        raise InputError(
            f"none of {len(gaps)} gaps fits into {room} tokens, which model.max_length = {model.max_length} "
            "leaves. Give shorter texts, or lower context or max_new_tokens."
        )

    def evaluate(params: Params, key: jax.Array) -> tuple[Metrics, list[Sample]]:
        answers = filler.answers(params, key, [prompt for _, prompt in fitting])
        samples = [
            Sample(gap.prefix, gap.suffix, gap.middle, answer, is_right(gap, answer, whole=form != "left"))
            for (gap, _), answer in zip(fitting, answers, strict=True)
        ]
        share = sum(sample.correct for sample in samples) / len(samples)
        skipped = {"skipped_too_long": float(len(gaps) - len(fitting))}
        return {"exact_match": share, **skipped, **({"skipped_too_short": float(short)} if short else {})}, samples

    return evaluate


def is_right(gap: Gap, answer: str, *, whole: bool) -> bool:
    """Whether an answer is the middle of a gap, or if it needn't be the `whole` answer, begins with it.

    What begins with it may go on within a word only where the text does.
    """
    middle, answer = gap.middle.strip(), answer.strip()
    if whole:
        return answer == middle
    within = not middle[-1].isalnum() or (gap.middle[-1:] + gap.suffix[:1]).isalnum()
    return answer.startswith(middle) and (within or not answer[len(middle) :][:1].isalnum())


def _resolve(form: str, model: Model) -> str:
    """The form, where it isn't "auto" of a language model. Raises InputError where the model can't have it."""
    if form not in FORMS:
        raise InputError(f"form={form}: is not known.{did_you_mean(form, FORMS)}")
    if model.config.num_labels:
        raise InputError(f"the model is a classifier of {model.config.num_labels} classes. Name a language model.")
    if model.config.causal == (form == "mask"):
        kind, remedy = ("a language model", "Name an encoder") if form == "mask" else ("an encoder", "Use form=mask")
        if model.config.causal or form != "auto":
            raise InputError(f"form={form}: the model is {kind}. {remedy}, or leave the form out.")
    return "mask" if not model.config.causal else form


def _middle(gap: Gap, tokenizer: Tokenizer) -> list[int]:
    """The tokens of a middle: one that begins its text may get a space before it."""
    return tokenizer.encode_stretches([gap.middle], special=False, first=not gap.prefix)[0]


@dataclasses.dataclass(frozen=True, eq=False)
class _Generating:
    """A model that writes middles.

    Attributes:
      infilling: how it is asked.
      generate: its likeliest tokens, see make_generate.
      longest: the most tokens of a prompt.
      batch_size: gaps answered at once.
    """

    infilling: Infilling
    generate: Generate
    longest: int
    batch_size: int

    @staticmethod
    def make(model: Model, tokenizer: Tokenizer, form: str, max_new_tokens: int, batch_size: int) -> "_Generating":
        asked = make_infilling(form, tokenizer)
        if form == "auto" and distributed.main():
            print(f"infill: form {asked.form}, {asked.why}", file=sys.stderr)
        config = SamplingConfig(max_new_tokens=max_new_tokens + asked.extra, stop_tokens=asked.stop)
        generate = make_generate(model, config, tokenizer.size)
        return _Generating(asked, generate, longest_prompt(model, config), batch_size)

    def prompt(self, gap: Gap) -> list[int]:
        return self.infilling.prompt(gap.prefix, gap.suffix)

    def answers(self, params: Params, key: jax.Array, prompts: Sequence[list[int]]) -> list[str]:
        size = min(len(prompts), self.batch_size)
        completions = generate_batches(self.generate, params, prompts, key, batch_size=size, longest=self.longest)
        return [self.infilling.text(completion.tokens) for completion in completions]


@dataclasses.dataclass(frozen=True, eq=False)
class _Masking:
    """An encoder that fills masks, all of a middle at once.

    Attributes:
      tokenizer: of the model.
      mask: the id of a masked token.
      likeliest: (params, tokens [B, T] int32, lengths [B] int32) -> the likeliest token of each place, [B, T] int32.
      batch_size: gaps answered at once.
      max_length: the most tokens of a text.
    """

    tokenizer: Tokenizer
    mask: int
    likeliest: Callable[..., jax.Array]
    batch_size: int
    max_length: int

    @staticmethod
    def make(model: Model, tokenizer: Tokenizer, batch_size: int) -> "_Masking":
        likeliest = jax.jit(functools.partial(_likeliest, model, tokenizer.size, tokenizer.special_ids))
        mask = special_tokens.mask_token(tokenizer)
        return _Masking(tokenizer, mask, distributed.one_at_a_time(likeliest), batch_size, model.max_length)

    def prompt(self, gap: Gap) -> list[int]:
        first = self.tokenizer.encode_stretches([gap.prefix], special=False, first=True)[0]
        last = self.tokenizer.encode_stretches([gap.suffix], special=False, first=False)[0]
        bos = [] if self.tokenizer.bos is None else [self.tokenizer.bos]
        return [*bos, *first, *[self.mask] * len(_middle(gap, self.tokenizer)), *last, self.tokenizer.eos]

    def answers(self, params: Params, key: jax.Array, prompts: Sequence[list[int]]) -> list[str]:
        size, length = min(len(prompts), self.batch_size), padded_length(max(map(len, prompts)), self.max_length)
        answers = []
        for start in range(0, len(prompts), size):
            rows = prompts[start : start + size]
            tokens = np.zeros((size, length), np.int32)
            for row, prompt in zip(tokens, rows, strict=False):
                row[: len(prompt)] = prompt
            lengths = np.array([len(prompt) for prompt in rows] + [0] * (size - len(rows)), np.int32)
            filled = jax.device_get(self.likeliest(params, tokens, lengths))
            masked = tokens == self.mask
            answers += [self.tokenizer.decode_after(filled[i, masked[i]].tolist()) for i in range(len(rows))]
        return answers


def _likeliest(
    model: Model,
    vocab_size: int,
    specials: np.ndarray,
    params: Params,
    tokens: Int[Array, "B T"],
    lengths: Int[Array, " B"],
) -> Int[Array, "B T"]:
    """The likeliest token of each place under an encoder; `specials` are no text, and ids from `vocab_size` on none."""
    places = jnp.broadcast_to(jnp.arange(tokens.shape[1], dtype=jnp.int32), tokens.shape)
    batch = {"tokens": tokens, "positions": places, "segment_ids": (places < lengths[:, None]).astype(jnp.int32)}
    batch = {name: sharding.constrain(x, ("batch", "time"), model.rules) for name, x in batch.items()}
    hidden, head = virtual.hidden(model, params, batch), model.unembed(params)
    # A place after the other: the logits of all at once would be [B, T, V].
    ids = jax.lax.map(
        lambda x: argmax(next_logits(head, x, vocab_size).at[:, specials].set(-jnp.inf)), hidden.swapaxes(0, 1)
    )
    return sharding.replicate(ids.swapaxes(0, 1))
