"""From a checked record to token ids and the mask of what is to be predicted, or to a generation's prompt.

Templates, with tokens in <| |>:
  model  the model's own chat template; see sources.chat.
  chat   <|bos|> <|user|>PROMPT <|assistant|>RESPONSE <|eos|>, further turns likewise; <|system|> before the
         first. A tokenizer without these markers spells them as plain text.
  plain  <|bos|> PROMPT RESPONSE <|eos|>, with nothing between.
  auto   model if the tokenizer has a chat template, else chat if it has the markers, else plain.
A plain document is <|bos|> TEXT <|eos|> under all. What has a label is rendered as a prompt, and supervised at its
last token, where a classifier reads. What is supervised is tokenised by itself, so that no token
straddles its border, and a prompt has the same ids in training and in generation.
"""

import hashlib
import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from research.errors import InputError
from research.sources.chat import Part, render_parts
from research.sources.records import Turn, check, detect_format
from research.sources.tokenizers import Tokenizer

TEMPLATES = ("auto", "model", "chat", "plain")

Piece = tuple[str | int, bool]  # text or a special token's id, and whether it is to be predicted


def split_key(turns: Sequence[Turn]) -> int:
    """Returns a 64-bit hash of a document, or of a conversation up to its first answer, in any format."""
    asked = itertools.takewhile(lambda turn: turn[0] != "assistant", turns)
    content = "\0".join(f"{role}\0{text.strip()}" for role, text in asked)
    return int.from_bytes(hashlib.blake2b(content.encode(), digest_size=8).digest(), "little")


def resolve_template(template: str, tokenizer: Tokenizer) -> str:
    """Returns which of "model", "chat" and "plain" `template` means for `tokenizer`.

    Raises:
      InputError: it is "model", and the tokenizer has no chat template.
    """
    if template == "auto":
        if tokenizer.chat_template is not None:
            return "model"
        return "chat" if tokenizer.special("<|user|>") is not None else "plain"
    if template == "model" and tokenizer.chat_template is None:
        raise InputError(
            "template: 'model', but the tokenizer has no chat template. Use 'chat' or 'plain', or put the model's "
            "chat_template.jinja beside its tokenizer.json."
        )
    return template


def encode(examples: Sequence[Sequence[Turn]], tokenizer: Tokenizer, template: str, where: Sequence[str] = ()):
    """Tokenises examples.

    Args:
      examples: the turns of each.
      tokenizer: gives the ids.
      template: one of TEMPLATES.
      where: where each example comes from, for messages.

    Returns:
      tokens: [N] int32, those of all examples one after the other.
      mask: [N] bool, True where a token is to be predicted.
      lengths: [len(examples)] int64, of each example, in tokens.

    Raises:
      InputError: the model's chat template refuses a conversation, or leaves nothing to learn, or no end of an answer.
    """
    template = resolve_template(template, tokenizer)
    if examples[0][-1][0] == "user":
        return _encode_labelled(examples, tokenizer, template, where)
    if template == "model" and examples[0][0][0] != "text":
        return _encode_with_model_template(examples, tokenizer, where)
    pieces = [_render(turns, tokenizer, template) for turns in examples]
    flat = list(itertools.chain.from_iterable(pieces))
    texts = iter(tokenizer.encode_batch([content for content, _ in flat if isinstance(content, str)]))
    ids = [next(texts) if isinstance(content, str) else [content] for content, _ in flat]
    return _join(ids, [supervised for _, supervised in flat], [len(piece) for piece in pieces])


def render_prompt(record: Mapping[str, Any] | str, tokenizer: Tokenizer, template: str) -> list[int]:
    """Returns the ids of everything up to where the model speaks.

    Args:
      record: with prompt, or messages (the last answer, if there is one, is left out), or text; or a text,
        which is what is to be continued under "plain", and what the user says under the others.
      tokenizer: gives the ids.
      template: one of TEMPLATES.

    Raises:
      InputError: the record has none of these, or they are faulty; or the model's chat template refuses them.
    """
    if isinstance(record, str):
        turns = [("user", record)]
    elif "messages" in record:
        messages = record["messages"]
        if messages and messages[-1].get("role") != "assistant":
            messages = [*messages, {"role": "assistant", "content": "?"}]
        turns = check({"messages": messages}, "messages", {})[:-1]
    elif "prompt" in record:
        turns = check({**record, "response": "?"}, "prompt_response", {})[:-1]
    else:
        turns = check(dict(record), detect_format(record, {}), {})
    template = resolve_template(template, tokenizer)
    if turns[0][0] == "text":
        pieces = _render(turns, tokenizer, template)[:-1]  # all but eos
    elif template == "model":
        parts = render_parts(tokenizer.chat, _messages(turns), add_generation_prompt=True)
        return list(itertools.chain.from_iterable(_encode_parts([parts], tokenizer)))
    else:
        pieces = _render([*turns, ("assistant", "")], tokenizer, template)[:-2]  # all but the answer and eos
    return [i for content, _ in pieces for i in ([content] if isinstance(content, int) else tokenizer.encode(content))]


def _encode_with_model_template(examples: Sequence[Sequence[Turn]], tokenizer: Tokenizer, where: Sequence[str]):
    parts = []
    for i, turns in enumerate(examples):
        try:
            parts.append(render_parts(tokenizer.chat, _messages(turns)))
        except InputError as e:
            raise InputError(f"{where[i]}: {e}" if where else str(e)) from e
    supervised = [part.supervised for example in parts for part in example]
    tokens, mask, lengths = _join(_encode_parts(parts, tokenizer), supervised, [len(example) for example in parts])
    at = f"{where[0]} and what follows" if where else f"{len(examples)} conversations"
    if not mask.any():
        raise InputError(
            f"{at}: the model's chat template leaves nothing to learn: it writes no answer, or none within its "
            "{% generation %}. Mend it, or use another template: 'chat' or 'plain'."
        )
    if not np.isin(tokens[mask], tokenizer.stop).any():
        ends = ", ".join(repr(tokenizer.backend.id_to_token(i)) for i in tokenizer.stop)
        raise InputError(
            f"{at}: under the model's chat template no answer ends with a token that stops generation ({ends}), so "
            "the model would never learn to stop. Have the template write one after an assistant's turn (within {% "
            "generation %}, if it has that), or set tokenizer.eos_token to the token that it does write."
        )
    return tokens, mask, lengths


def _encode_labelled(examples: Sequence[Sequence[Turn]], tokenizer: Tokenizer, template: str, where: Sequence[str]):
    if template == "model":
        parts = [render_parts(tokenizer.chat, _messages(turns), add_generation_prompt=True) for turns in examples]
        ids, counts = _encode_parts(parts, tokenizer), [len(example) for example in parts]
    else:
        pieces = [_render([*turns, ("assistant", "")], tokenizer, template)[:-2] for turns in examples]
        flat = list(itertools.chain.from_iterable(pieces))
        texts = iter(tokenizer.encode_batch([content for content, _ in flat if isinstance(content, str)]))
        ids = [next(texts) if isinstance(content, str) else [content] for content, _ in flat]
        counts = [len(example) for example in pieces]
    tokens, mask, lengths = _join(ids, [False] * len(ids), counts)
    if not lengths.all():
        at = f"{where[int(np.argmin(lengths))]}: " if where else ""
        raise InputError(f"{at}the text has no token under this tokenizer. Drop the record.")
    mask[np.cumsum(lengths) - 1] = True
    return tokens, mask, lengths


def _messages(turns: Sequence[Turn]) -> list[dict[str, str]]:
    return [{"role": role, "content": text} for role, text in turns]


def _encode_parts(examples: Sequence[Sequence[Part]], tokenizer: Tokenizer) -> list[list[int]]:
    """The ids of each part, of all examples one after the other."""
    kinds: dict[tuple[bool, bool], list[int]] = {}
    flat = list(itertools.chain.from_iterable(examples))
    firsts = (n == 0 for parts in examples for n in range(len(parts)))
    for i, (part, first) in enumerate(zip(flat, firsts, strict=True)):
        kinds.setdefault((not part.spelled, first), []).append(i)
    ids: list[list[int]] = [[]] * len(flat)
    for (special, first), indices in kinds.items():
        encoded = tokenizer.encode_stretches([flat[i].text for i in indices], special=special, first=first)
        for i, stretch in zip(indices, encoded, strict=True):
            ids[i] = stretch
    return ids


def _join(ids: list[list[int]], supervised: Sequence[bool], counts: Sequence[int]):
    """Lays pieces end to end; `counts` says how many pieces each example has."""
    sizes = np.fromiter(map(len, ids), np.int64, len(ids))
    tokens = np.fromiter(itertools.chain.from_iterable(ids), np.int32, sizes.sum())
    mask = np.repeat(np.fromiter(supervised, bool, len(ids)), sizes)
    ends = np.cumsum(sizes)[np.cumsum(counts) - 1]
    return tokens, mask, np.diff(ends, prepend=0)


def _render(turns: Sequence[Turn], tokenizer: Tokenizer, template: str) -> list[Piece]:
    document = turns[0][0] == "text"
    pieces: list[Piece] = [] if tokenizer.bos is None else [(tokenizer.bos, document)]
    for role, text in turns:
        supervised = role in ("text", "assistant")
        if template == "chat" and not document:
            name = f"<|{role}|>"
            marker = tokenizer.special(name)
            pieces.append((name if marker is None else marker, False))
        pieces.append((text, supervised))
        if supervised:
            pieces.append((tokenizer.eos, True))
    return pieces
