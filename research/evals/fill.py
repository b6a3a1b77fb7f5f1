"""Missing words: the likeliest tokens for each mask of a text, by a model that reads in both directions."""

import dataclasses
import functools
import hashlib
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from jaxtyping import Array, Float, Int

from research import files
from research.errors import InputError
from research.evals.prompts import Prompt
from research.evals.scoring import padded_length
from research.loading import LoadedModel
from research.models import virtual
from research.models.transformer import Model
from research.objectives.masked import take
from research.ops.head import Comparison, detached_values
from research.sources.special_tokens import mask_token
from research.sources.tokenizers import Tokenizer

MARK = "[MASK]"  # stands for the mask token, however the tokenizer spells it


class Candidate(NamedTuple):
    """A token for a mask.

    Attributes:
      token: id.
      text: of it; of a token that continues a word as the tokenizer decodes it alone.
      probability: that it stands there, given all of the text that isn't masked.
    """

    token: int
    text: str
    probability: float


@dataclasses.dataclass(frozen=True)
class Filler:
    """A model that fills in what is masked.

    Attributes:
      loaded: the model, its parameters and its tokenizer.
      count: how many tokens are wanted for each mask.
    """

    loaded: LoadedModel
    count: int

    def __post_init__(self) -> None:
        mask_token(self.tokenizer)
        most = self.tokenizer.size - len(self.tokenizer.special_ids)
        if not 1 <= self.count <= most:
            raise InputError(f"--top_k = {self.count}: must be from 1 to the {most} tokens that a text can have.")

    @property
    def tokenizer(self) -> Tokenizer:
        return self.loaded.tokenizer

    def encode(self, prompt: Prompt) -> list[int]:
        """Returns the ids of a text as in training, with what begins and ends it.

        The space before a mask belongs to the hidden token, where tokens of the vocabulary begin with one.

        Raises:
          InputError: the text has no mask, or is too long.
        """
        record = prompt.record
        text = record if isinstance(record, str) else record.get("prompt", record.get("text"))
        if not isinstance(text, str):
            raise InputError(f'{prompt.where}: is no text. Give one with {MARK} in it, as "text" in a .jsonl.')
        mask, longest = mask_token(self.tokenizer), self.loaded.model.max_length
        first, *others = re.split("|".join(map(re.escape, (MARK, self.tokenizer.backend.id_to_token(mask)))), text)
        if not others:
            raise InputError(f"{prompt.where}: has no {MARK}. Write it where a token is missing.")
        stretches = [stretch.removesuffix(" ") if self._space_belongs else stretch for stretch in (first, *others[:-1])]
        tokens = [] if self.tokenizer.bos is None else [self.tokenizer.bos]
        for number, stretch in enumerate((*stretches, others[-1])):
            tokens += [mask] * (number > 0)
            if stretch:
                tokens += self.tokenizer.encode_stretches([stretch], special=False, first=not number)[0]
        tokens.append(self.tokenizer.eos)
        if len(tokens) > longest:
            raise InputError(
                f"{prompt.where}: is {len(tokens)} tokens long, and the model reads {longest} (model.max_length). "
                "Shorten it."
            )
        return tokens

    @functools.cached_property
    def _space_belongs(self) -> bool:
        """Whether a word and the space before it are one token."""
        return len(self.tokenizer.encode_stretches([" a"], special=False, first=False)[0]) == 1

    def fill(
        self, prompts: Sequence[Prompt], batch_size: int, *, done: int = 0, ids: Sequence[list[int]] | None = None
    ) -> Iterator[list[tuple[Prompt, list[list[Candidate]]]]]:
        """Fills in texts; yields each with the candidates of its masks, the likeliest first, a batch at a time.

        Args:
          prompts: all of them; each is encoded before the first is filled in.
          batch_size: how many are computed at once.
          done: how many to leave out at the start.
          ids: the prompts' tokens, where they have been encoded.

        Raises:
          InputError: a prompt is at fault.
        """
        ids = [self.encode(prompt) for prompt in prompts] if ids is None else ids
        mask, size = mask_token(self.tokenizer), min(batch_size, len(prompts))
        length = padded_length(max(map(len, ids)), self.loaded.model.max_length)
        most = max(tokens.count(mask) for tokens in ids)
        size_and_specials = self.tokenizer.size, self.tokenizer.special_ids
        likeliest = jax.jit(functools.partial(likeliest_tokens, self.loaded.model, *size_and_specials, self.count))
        for start in range(done, len(ids), size):
            taken = ids[start : start + size]
            probabilities, tokens = jax.device_get(
                likeliest(self.loaded.params, _batch(taken, size, length, most, mask))
            )
            masks = [
                [self._candidates(*pair) for pair in zip(*row, strict=True)][: one.count(mask)]
                for one, *row in zip(taken, tokens, probabilities, strict=False)
            ]
            yield list(zip(prompts[start:], masks, strict=False))

    def _candidates(self, tokens: np.ndarray, probabilities: np.ndarray) -> list[Candidate]:
        return [Candidate(int(i), self._text(int(i)), float(p)) for i, p in zip(tokens, probabilities, strict=True)]

    def _text(self, token: int) -> str:
        """Of a token that follows others."""
        return self.tokenizer.decode_after([token]) or self.tokenizer.decode([token], skip_special=False)


def likeliest_tokens(
    model: Model, size: int, specials: np.ndarray, count: int, params: Any, batch: Mapping[str, jax.Array]
) -> tuple[Float[Array, "B M k"], Int[Array, "B M k"]]:
    """The probabilities of the likeliest tokens at the places `at` [B, M] of a batch, in falling order, and these.

    Args:
      model: reads in both directions.
      size: of the tokenizer's vocabulary; rows of the head beyond it are no tokens.
      specials: ids that are no text, and never an answer; a probability is among all tokens, these too.
      count: k.
      params: of the model.
      batch: tokens, segment_ids and positions, [B, T] int32; at, in which places beyond T stand for none.
    """

    def compare(logits: Float[Array, "B t V"], extras: Any) -> Comparison:
        return Comparison(jax.lax.top_k(jax.nn.softmax(logits).at[..., specials].set(-1.0), count))

    hidden = take(
        virtual.hidden(model, params, {name: batch[name] for name in ("tokens", "segment_ids", "positions")}),
        batch["at"],
    )
    probabilities, tokens = detached_values(compare, hidden, model.unembed(params).first(size))
    return probabilities, tokens


def _batch(ids: Sequence[list[int]], rows: int, length: int, most: int, mask: int) -> dict[str, np.ndarray]:
    """See `likeliest_tokens`; a row for each text, and padding."""
    batch = {name: np.zeros((rows, length), np.int32) for name in ("tokens", "segment_ids")}
    batch["positions"] = np.broadcast_to(np.arange(length, dtype=np.int32), (rows, length))
    batch["at"] = np.broadcast_to(length + np.arange(most, dtype=np.int32), (rows, most)).copy()
    for row, tokens in enumerate(ids):
        batch["tokens"][row, : len(tokens)] = tokens
        batch["segment_ids"][row, : len(tokens)] = 1
        places = np.flatnonzero(np.array(tokens) == mask)
        batch["at"][row, : len(places)] = places
    return batch


def table(prompt: Prompt, masks: Sequence[Sequence[Candidate]]) -> str:
    """The text, and lines with probability and text of each candidate of each mask."""
    record = prompt.record
    lines = [record if isinstance(record, str) else record.get("prompt", record.get("text"))]
    for number, candidates in enumerate(masks, start=1):
        name = f"mask {number}" if len(masks) > 1 else "mask"
        for candidate in candidates:
            lines.append(f"  {name:8} {candidate.probability:.4f}  {json.dumps(candidate.text, ensure_ascii=False)}")
            name = ""
    return "\n".join(lines)


def write_fills(
    filler: Filler, prompts: Sequence[Prompt], output: Path, batch_size: int, flags: Mapping[str, Any]
) -> None:
    """Fills in texts into a file of JSON lines: each record with `masks`, a list of candidates for each.

    A killed run leaves OUTPUT.partial, and the same call goes on from there.

    Args:
      filler: the model.
      prompts: all of them.
      output: the file; it is replaced.
      batch_size: how many are computed at once.
      flags: what else decides the candidates, by flag's name.

    Raises:
      InputError: a prompt is at fault, or OUTPUT.partial is the work of another command.
    """
    ids = [filler.encode(prompt) for prompt in prompts]
    content = json.dumps([[prompt.record for prompt in prompts], ids], sort_keys=True)
    decides = {**flags, "fill": True, "data": hashlib.sha256(content.encode()).hexdigest()}
    reasons = {name: f"--{name} was {{}}" for name in flags}
    reasons |= {"fill": "it was of prompts", "data": "--data holds other texts"}
    with files.ResumableLines(output, decides, reasons) as lines:
        for filled in filler.fill(prompts, batch_size, done=lines.done, ids=ids):
            lines.append(prompt.line(masks=_fields(masks)) for prompt, masks in filled)
        lines.finish()


def _fields(masks: Sequence[Sequence[Candidate]]) -> list[list[dict[str, Any]]]:
    return [[candidate._asdict() for candidate in each] for each in masks]
