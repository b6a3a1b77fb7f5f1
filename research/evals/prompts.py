"""Prompts as a user gives them: on a command line, or one a line of a file."""

import dataclasses
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from research import files
from research.errors import InputError
from research.sources.formats import answer_decoder, render_prompt
from research.sources.infilling import Infilling
from research.sources.tokenizers import Tokenizer

_WHOLE = {"prompt", "messages", "text"}  # fields of a record that is no gap


class Prompt(NamedTuple):
    """Where the user gave what: a text, {"prompt": text}, {"messages": [...]}, {"text": text}, which is to be gone on
    with, or {"prefix": text, "suffix": text}."""

    where: str
    record: str | Mapping[str, Any]

    def line(self, **fields: Any) -> bytes:
        """A line of JSON: the record, with fields added to it."""
        record = {"prompt": self.record} if isinstance(self.record, str) else self.record
        return files.json_line({**record, **fields})


@dataclasses.dataclass(frozen=True)
class PromptEncoder:
    """Turns prompts into tokens.

    Attributes:
      tokenizer: of the model.
      template: how prompts are put to the model; see sources.formats.
      system: the message that a prompt begins with where it has no system message of its own; None for none.
      longest: how many tokens a prompt may have.
      room: what an error says of where that number comes from.
    """

    tokenizer: Tokenizer
    template: str
    system: str | None
    longest: int
    room: str

    def __call__(self, prompt: Prompt) -> list[int]:
        """Returns token ids.

        Raises:
          InputError: the prompt can't be rendered, or is too long.
        """
        try:
            ids = render_prompt(_with_system(prompt.record, self.system), self.tokenizer, self.template)
        except InputError as error:
            raise InputError(f"{prompt.where}: {error}") from error
        _check_length(prompt, ids, self.longest, self.room)
        return ids

    @property
    def decode(self) -> Callable[[list[int]], str]:
        """Token ids of an answer -> its text."""
        return answer_decoder(self.tokenizer, self.template)


@dataclasses.dataclass(frozen=True)
class GapEncoder:
    """Turns what stands around a gap into tokens; `longest` and `room` are PromptEncoder's."""

    infilling: Infilling
    longest: int
    room: str

    def __call__(self, prompt: Prompt) -> list[int]:
        """Returns token ids. Raises InputError where there are too many."""
        ids = self.infilling.prompt(prompt.record["prefix"], prompt.record["suffix"])
        _check_length(prompt, ids, self.longest, self.room)
        return ids

    @property
    def decode(self) -> Callable[[list[int]], str]:
        """Token ids of an answer -> the text of the middle."""
        return self.infilling.text


def is_gap(prompt: Prompt) -> bool:
    """Whether the model is to fill in what belongs between two texts."""
    return not isinstance(prompt.record, str) and not _WHOLE & prompt.record.keys()


class TooLong(InputError):
    """A prompt has more tokens than there is room for."""


def _check_length(prompt: Prompt, ids: list[int], longest: int, room: str) -> None:
    if len(ids) > longest:
        raise TooLong(
            f"{prompt.where}: is {len(ids)} tokens long, and there is room for {longest} ({room}). Shorten the one, or "
            "lower the other."
        )


def read_prompts(path: str) -> list[Prompt]:
    """Reads a file of prompts, one a line.

    Raises:
      InputError: the file can't be read or holds no prompt, or a line is at fault.
    """
    suffix = Path(path).suffix
    if suffix not in (".txt", ".jsonl"):
        raise InputError(f"--data = {path}: ends in neither .txt nor .jsonl. Rename it to what it is.")
    try:
        with open(path, encoding="utf-8-sig") as file:
            lines = [line.rstrip("\n") for line in file]
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"--data = {path}: can't be read ({error}). Give a file of UTF-8 text.") from error
    if not lines:
        raise InputError(f"--data = {path}: is empty. Write one prompt a line.")
    prompts = []
    for number, line in enumerate(lines, start=1):
        where = f"{path}:{number}"
        if not line.strip():
            raise InputError(f"{where}: is an empty line. Remove it, or write a prompt.")
        prompts.append(Prompt(where, _record(line, where) if suffix == ".jsonl" else line))
    return prompts


def _record(line: str, where: str) -> dict[str, Any]:
    try:
        record = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise InputError(f"{where}: is no JSON ({error}). Write one object a line.") from error
    if not isinstance(record, dict) or not {*_WHOLE, "prefix", "suffix"} & record.keys():
        raise InputError(
            f'{where}: is no object with "prompt", "messages" or "text", or "prefix" and "suffix". Name what it has so.'
        )
    if not isinstance(record.get("text", ""), str):
        raise InputError(f'{where}: "text" is no text. Write it in quotes.')
    if not _WHOLE & record.keys():
        for name in ("prefix", "suffix"):
            if not isinstance(record.get(name), str):
                raise InputError(f'{where}: "{name}" must be text, beside "prefix" or "suffix". Write "" for none.')
    messages = record.get("messages", [])
    if not isinstance(messages, list) or not all(isinstance(message, dict) for message in messages):
        raise InputError(f'{where}: "messages" is no list of objects with "role" and "content". Write it as one.')
    return record


def _with_system(record: str | Mapping[str, Any], system: str | None) -> str | Mapping[str, Any]:
    """The record with a system message first, where it has none."""
    if system is None:
        return record
    record = {"prompt": record} if isinstance(record, str) else record
    if not {"prompt", "messages"} & record.keys():
        raise InputError("has a text, which is gone on with, and --system is of prompts. Leave it out.")
    messages = record.get("messages") or [{"role": "user", "content": record["prompt"]}]
    if messages[0].get("role") == "system":
        return record
    others = {name: value for name, value in record.items() if name != "prompt"}
    return {**others, "messages": [{"role": "system", "content": system}, *messages]}
