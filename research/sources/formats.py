"""From a checked record to token ids and the mask of what is to be predicted, or to a generation's prompt.

Templates, with tokens in <| |>:
  chat   <|bos|> <|user|>PROMPT <|assistant|>RESPONSE <|eos|>, further turns likewise; <|system|> before the
         first. A tokenizer without these markers spells them as plain text.
  plain  <|bos|> PROMPT RESPONSE <|eos|>, with nothing between.
A plain document is <|bos|> TEXT <|eos|> under both. Each turn is tokenised by itself, so that no token
straddles the border of what is supervised, and a prompt has the same ids in training and in generation.
"""

import hashlib
import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from research.sources.records import Turn, check, detect_format
from research.sources.tokenizers import Tokenizer

TEMPLATES = ("chat", "plain")

Piece = tuple[str | int, bool]  # text or a special token's id, and whether it is to be predicted


def split_key(turns: Sequence[Turn]) -> int:
    """Returns a 64-bit hash of a document, or of a conversation up to its first answer, in any format."""
    asked = itertools.takewhile(lambda turn: turn[0] != "assistant", turns)
    content = "\0".join(f"{role}\0{text.strip()}" for role, text in asked)
    return int.from_bytes(hashlib.blake2b(content.encode(), digest_size=8).digest(), "little")


def encode(examples: Sequence[Sequence[Turn]], tokenizer: Tokenizer, template: str):
    """Tokenises examples.

    Returns:
      tokens: [N] int32, those of all examples one after the other.
      mask: [N] bool, True where a token is to be predicted.
      lengths: [len(examples)] int64, of each example, in tokens.
    """
    pieces = [_render(turns, tokenizer, template) for turns in examples]
    flat = list(itertools.chain.from_iterable(pieces))
    texts = iter(tokenizer.encode_batch([content for content, _ in flat if isinstance(content, str)]))
    ids = [next(texts) if isinstance(content, str) else [content] for content, _ in flat]
    sizes = np.fromiter(map(len, ids), np.int64, len(ids))
    tokens = np.fromiter(itertools.chain.from_iterable(ids), np.int32, sizes.sum())
    mask = np.repeat(np.fromiter((supervised for _, supervised in flat), bool, len(flat)), sizes)
    ends = np.cumsum(sizes)[np.cumsum([len(piece) for piece in pieces]) - 1]
    return tokens, mask, np.diff(ends, prepend=0)


def render_prompt(record: Mapping[str, Any] | str, tokenizer: Tokenizer, template: str) -> list[int]:
    """Returns the ids of everything up to where the model speaks.

    Args:
      record: with prompt, or messages (the last answer, if there is one, is left out), or text; or a text,
        which is what the user says under "chat" and what is to be continued under "plain".
      tokenizer: gives the ids.
      template: one of TEMPLATES.

    Raises:
      InputError: the record has none of these, or they are faulty.
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
    if turns[0][0] == "text":
        pieces = _render(turns, tokenizer, template)[:-1]  # all but eos
    else:
        pieces = _render([*turns, ("assistant", "")], tokenizer, template)[:-2]  # all but the answer and eos
    return [i for content, _ in pieces for i in ([content] if isinstance(content, int) else tokenizer.encode(content))]


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
