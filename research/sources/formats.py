"""From a checked record to token ids and the mask of what is to be predicted, or to a generation's prompt.

Templates, with tokens in <| |>:
  model  the model's own chat template; see sources.chat.
  chat   <|bos|> <|user|>PROMPT <|assistant|>RESPONSE <|eos|>, further turns likewise; <|system|> before the
         first. A tokenizer without these markers spells them as plain text.
  plain  <|bos|> PROMPT RESPONSE <|eos|>, with nothing between.
  auto   model if the tokenizer has a chat template, else chat if it has the markers, else plain.
A plain document is <|bos|> TEXT <|eos|> under all. What has a label is rendered as a prompt, and supervised at its
last token, where a classifier reads. What is supervised is tokenised by itself, so that no token
straddles its border, and a prompt has the same ids in training and in generation. A tokenizer that puts a space before
a text does so before the first text of an example alone.
"""

import hashlib
import itertools
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from research.errors import InputError
from research.sources.chat import HEARD, Unheard, render_parts
from research.sources.records import SHOWN, TOOLS, BadRecord, Turn, check, detect_format, speaker
from research.sources.template_program import Exhausted
from research.sources.tokenizers import Tokenizer

TEMPLATES = ("auto", "model", "chat", "plain")


class Piece(NamedTuple):
    """What is tokenised by itself.

    Attributes:
      content: a text, or the id of a special token.
      supervised: it is to be predicted.
      special: special tokens in the text are those tokens, since a chat template wrote them.
    """

    content: str | int
    supervised: bool
    special: bool = False


def split_key(turns: Sequence[Turn]) -> int:
    """Returns a 64-bit hash of a document, or of a conversation up to its first answer, in any format."""
    asked = itertools.takewhile(lambda turn: speaker(turn[0]) != "assistant", turns)
    content = "\0".join(f"{turn[0]}\0{turn[1].strip()}" for turn in asked)
    return int.from_bytes(hashlib.blake2b(content.encode(), digest_size=8).digest(), "little")


def resolve_template(template: str, tokenizer: Tokenizer) -> str:
    """Returns which of "model", "chat" and "plain" `template` means for `tokenizer`.

    Raises:
      InputError: it is "model", and the tokenizer has no chat template; or it has several and none is the default.
    """
    if template in ("auto", "model") and tokenizer.named_templates:
        raise InputError(
            f"template: {template!r}, but the tokenizer has the chat templates "
            f"{', '.join(map(repr, tokenizer.named_templates))}, and none called 'default'. Call one so in "
            "tokenizer_config.json, or use 'chat' or 'plain'."
        )
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


def own_template(template: str, plain_texts: bool) -> str:
    """How prompts are put to a model.

    Args:
      template: data.template of its run.
      plain_texts: whether it learned from texts alone, where no prompt had the marks of a conversation around it.
    """
    return "plain" if template == "auto" and plain_texts else template


def encode(
    examples: Sequence[Sequence[Turn]],
    tokenizer: Tokenizer,
    template: str,
    where: Sequence[str] = (),
    refused: dict[int, BadRecord] | None = None,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Tokenises examples.

    Args:
      examples: the turns of each.
      tokenizer: gives the ids.
      template: one of TEMPLATES.
      where: where each example comes from, for messages.
      refused: takes up the examples that the template refuses or that have no token, by their number; they are left out
        of what is returned. Without it, such an example is an error.

    Returns:
      tokens: [N] int32, those of all examples one after the other.
      mask: [N] bool, True where a token is to be predicted.
      lengths: [E] int64, of each example, in tokens.

    Raises:
      BadRecord: an example is refused.
      InputError: the model's chat template leaves nothing to learn, or no end of an answer.
    """
    template = resolve_template(template, tokenizer)
    kept: list[int] = []
    pieces: list[list[Piece]] = []
    for i, turns in enumerate(examples):
        try:
            pieces.append(_pieces([Turn(*turn) for turn in turns], tokenizer, template))
            kept.append(i)
        except BadRecord as e:
            if refused is None:
                raise e.at(where[i] if where else "") from e
            refused[i] = e
    if not kept:
        return np.zeros(0, np.int32), np.zeros(0, bool), np.zeros(0, np.int64)
    tokens, mask, lengths = _join(_encode_pieces(pieces, tokenizer), pieces)
    empty = [kept[i] for i in np.flatnonzero(lengths == 0)]
    no_token = BadRecord("no token", "the text has no token under this tokenizer. Drop the record.")
    if empty and refused is None:
        raise no_token.at(where[empty[0]] if where else "")
    if refused is not None:
        refused |= dict.fromkeys(empty, no_token)
    lengths = lengths[lengths > 0]
    if examples[0][-1][0] == "user":
        mask[np.cumsum(lengths) - 1] = True  # where a label is read
    elif template == "model" and any(turn[0] == "assistant" for i in kept for turn in examples[i]):
        _check_learnable(tokens, mask, tokenizer, f"{where[0]} and what follows" if where else f"{len(kept)} examples")
    return tokens, mask, lengths


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
        turns = [Turn("user", record)]
    elif "messages" in record:
        messages = record["messages"]
        if messages and messages[-1].get("role") != "assistant":
            messages = [*messages, {"role": "assistant", "content": "?"}]
        turns = check({**record, "messages": messages}, "messages", {})[:-1]
    elif "prompt" in record:
        turns = check({**record, "response": "?"}, "prompt_response", {})[:-1]
    else:
        turns = check(dict(record), detect_format(record, {}), {})
    pieces = _pieces(turns, tokenizer, resolve_template(template, tokenizer))
    if turns[0][0] == "text":
        pieces = pieces[:-1]  # all but eos
    return list(itertools.chain.from_iterable(_encode_pieces([pieces], tokenizer)))


def _check_learnable(tokens: np.ndarray, mask: np.ndarray, tokenizer: Tokenizer, at: str) -> None:
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


def _pieces(turns: Sequence[Turn], tokenizer: Tokenizer, template: str) -> list[Piece]:
    """What an example is made of; one that ends with the user goes up to where the model speaks.

    Args:
      turns: of the example.
      tokenizer: has the special tokens.
      template: "model", "chat" or "plain".

    Raises:
      BadRecord: the template refuses the example, or leaves out something that it has.
    """
    prompting = turns[-1].role in ("user", "tool")
    if template == "model" and turns[0].role != "text":
        return _render_turns(turns, tokenizer, prompting)
    _refuse_more(turns, template)
    pieces = _write_turns(turns, tokenizer, template)
    if prompting and template == "chat":
        pieces.append(_marker("assistant", tokenizer))
    return pieces


def _render_turns(turns: Sequence[Turn], tokenizer: Tokenizer, prompting: bool) -> list[Piece]:
    """A conversation as the model's own chat template writes it."""
    tools = json.loads(turns[0].text) if turns[0].role == TOOLS else None
    turns = turns[1:] if tools else turns
    messages = [
        {"role": speaker(turn.role), **({"content": turn.text} if turn.text else {}), **turn.more} for turn in turns
    ]
    shown = [i for i, turn in enumerate(turns) if turn.role == SHOWN]
    try:
        parts = render_parts(tokenizer.chat, messages, prompting, unlearned=shown, tools=tools)
    except Unheard as e:
        raise BadRecord(f"has {e.name}", str(e)) from e
    except Exhausted:
        raise
    except InputError as e:
        raise BadRecord("refused by the chat template", str(e)) from e
    try:
        "".join(part.text for part in parts).encode()
    except UnicodeEncodeError as e:  # of tools and the like, which aren't looked at before
        raise BadRecord(
            "invalid UTF-8", f"has a message or tool that is not valid UTF-8 ({e.reason}). Repair it."
        ) from e
    return [Piece(part.text, part.supervised and not prompting, not part.spelled) for part in parts]


def _refuse_more(turns: Sequence[Turn], template: str) -> None:
    """Raises BadRecord where turns have something that the templates of our own don't write."""
    for turn in turns:
        names = [TOOLS] if turn.role == TOOLS else [name for name in HEARD if name in turn.more]
        name = "a message of the role 'tool'" if turn.role == "tool" else next(iter(names), "")
        if name:
            raise BadRecord(
                f"has {name}",
                f"has {name if ' ' in name else repr(name)}, which the template {template!r} doesn't write: the model "
                "would never see it. Use a model whose chat template writes it, or write what it says into the "
                "content, and drop it; or drop the record.",
            )


def _write_turns(turns: Sequence[Turn], tokenizer: Tokenizer, template: str) -> list[Piece]:
    document = turns[0][0] == "text"
    pieces = [] if tokenizer.bos is None else [Piece(tokenizer.bos, document)]
    for role, text, _ in turns:
        supervised = role in ("text", "assistant")
        if template == "chat" and not document:
            pieces.append(_marker(speaker(role), tokenizer))
        pieces.append(Piece(text, supervised))
        if supervised or role == SHOWN:
            pieces.append(Piece(tokenizer.eos, supervised))
    return pieces


def _marker(role: str, tokenizer: Tokenizer) -> Piece:
    name = f"<|{role}|>"
    marker = tokenizer.special(name)
    return Piece(name if marker is None else marker, False)


def _encode_pieces(examples: Sequence[Sequence[Piece]], tokenizer: Tokenizer) -> list[list[int]]:
    """The ids of each piece, of all examples one after the other."""
    kinds: dict[tuple[bool, bool], list[int]] = {}
    ids: list[list[int]] = []
    texts: list[str] = []
    for pieces in examples:
        first = True
        for piece in pieces:
            if isinstance(piece.content, str):
                kinds.setdefault((piece.special, first), []).append(len(ids))
                first = False
            ids.append([piece.content] if isinstance(piece.content, int) else [])
            texts.append(piece.content if isinstance(piece.content, str) else "")
    for (special, first), indices in kinds.items():
        encoded = tokenizer.encode_stretches([texts[i] for i in indices], special=special, first=first)
        for i, stretch in zip(indices, encoded, strict=True):
            ids[i] = stretch
    return ids


def _join(ids: list[list[int]], examples: Sequence[Sequence[Piece]]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Lays the pieces of examples end to end: tokens, mask, and the length of each example."""
    sizes = np.fromiter(map(len, ids), np.int64, len(ids))
    tokens = np.fromiter(itertools.chain.from_iterable(ids), np.int32, sizes.sum())
    supervised = (piece.supervised for pieces in examples for piece in pieces)
    mask = np.repeat(np.fromiter(supervised, bool, len(ids)), sizes)
    ends = np.cumsum(np.concatenate([[0], sizes]))[np.cumsum([len(pieces) for pieces in examples])]
    return tokens, mask, np.diff(ends, prepend=0)


def answer_decoder(tokenizer: Tokenizer, template: str) -> Callable[[list[int]], str]:
    """Returns what makes text of an answer's tokens: the inverse of how the answers of records are tokenised.

    Under the model's own chat template, as in transformers, a space that begins the answer may be dropped.
    """
    return tokenizer.decode if resolve_template(template, tokenizer) == "model" else tokenizer.decode_after


def count_markers(texts: Iterable[Iterable[str]], tokenizer: Tokenizer) -> tuple[int, str]:
    """How many records spell a special token of `tokenizer` in one of their texts, and the first that is spelled."""
    count, example = 0, ""
    for record in texts:
        spelled = next(filter(None, (tokenizer.spelled_special(text) for text in record)), "")
        count, example = count + bool(spelled), example or spelled
    return count, example


def describe_markers(count: int, total: int, example: str) -> str:
    """One line about records that seem to be rendered already."""
    return (
        f"{count:,} of {total:,} records spell special tokens of this tokenizer, such as {example!r}, and are read as "
        "plain text. Where conversations were rendered into them, give the messages instead."
    )
