"""A tokenizer, and what lies beside its tokenizer.json: the chat template, and what transformers reads there."""

import dataclasses
import functools
import json
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers

from research.errors import InputError
from research.files import write_bytes
from research.sources import special_tokens
from research.sources.cache import digest
from research.sources.chat import ChatTemplate, any_of, end_of_turn, make_template

BOS, EOS = "<|bos|>", "<|eos|>"
SPECIALS = (BOS, EOS, "<|system|>", "<|user|>", "<|assistant|>")
# Beside tokenizer.json, a model's folder may hold these; `save` gives them back.
CONFIG, GENERATION, TEMPLATE = "tokenizer_config.json", "generation_config.json", "chat_template.jinja"
SPECIAL, ADDED = "special_tokens_map.json", "added_tokens.json"
# How vocabularies write a space before a word, and what texts are put after to be encoded without one.
_SPACES, _ANCHORS = ("▁", "Ġ"), ("\n", "(", "a", "0")
_LONG = 2**22  # characters that are encoded at once
_OTHER_TOKENS = ("additional_special_tokens", "extra_special_tokens")  # of transformers 4 and 5
_NEW_TOKEN = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}


@dataclasses.dataclass(frozen=True, eq=False)
class Tokenizer:
    """A tokenizer under which no text yields special tokens: what reads like one is encoded as plain text.

    Attributes:
      backend: the `tokenizers` object.
      size: V, the number of ids.
      eos: id that ends every document.
      bos: id that begins every document, or None.
      raw_bytes: ids 0-255 are the bytes themselves, so that encoding needs no table.
      chat_template: the Jinja source of the model's own chat template, or None.
      stop: ids that end an answer: eos, those of generation_config.json, and what ends a turn in the chat template.
      variables: what a chat template may write by name: {"eos_token": "</s>"} and the like.
      named_templates: names of chat templates where there are several and none of them is the default.
      files: name -> content, what lay beside the tokenizer.json.
    """

    backend: tokenizers.Tokenizer
    size: int
    eos: int
    bos: int | None
    raw_bytes: bool
    chat_template: str | None
    stop: tuple[int, ...]
    variables: Mapping[str, str]
    files: Mapping[str, bytes]
    named_templates: tuple[str, ...] = ()

    def encode(self, text: str) -> list[int]:
        return self.encode_batch([text])[0]

    def encode_batch(self, texts: list[str]) -> list[list[int]]:
        if self.raw_bytes:
            return [list(text.encode()) for text in texts]
        return self._ids(texts)

    def encode_stretches(self, texts: list[str], *, special: bool, first: bool) -> list[list[int]]:
        """Encodes stretches of longer texts.

        Args:
          texts: the stretches.
          special: special tokens in them become those tokens. Only for what a chat template wrote.
          first: they begin their texts; else no space is put before them, as some tokenizers do with a text.
        """
        self.backend.encode_special_tokens = not special
        try:
            encode = self._ids if special else self.encode_batch
            if first or not self._adds_space:
                return encode(texts)
            return self._encode_after(texts, encode)
        finally:
            self.backend.encode_special_tokens = True

    def _ids(self, texts: list[str]) -> list[list[int]]:
        """The ids of texts. What is very long is encoded in parts: the package takes 100 times its size at once."""
        if sum(map(len, texts)) <= _LONG:
            return self._encoded(texts)
        result = []
        for text in texts:
            first, *rest = long_parts(text, _LONG)
            after = functools.partial(self._encode_after, encode=self._encoded)
            result.append(self._encoded([first])[0])
            for part in rest:
                result[-1] += (after if self._adds_space else self._encoded)([part])[0]
        return result

    def _encoded(self, texts: list[str]) -> list[list[int]]:
        try:
            return [encoding.ids for encoding in self.backend.encode_batch_fast(texts, add_special_tokens=False)]
        except BaseException as error:  # panics of the package aren't Exceptions
            if type(error).__name__ != "PanicException":
                raise
            raise InputError(
                f"tokenizer.json: the tokenizer can't encode {max(texts, key=len)!r:.60} ({error!s:.200}). A regular "
                "expression in it may go over its limit of steps. Use the files of another."
            ) from None

    @functools.cached_property
    def _adds_space(self) -> bool:
        """Whether a text gets a space before it, as SentencePiece's dummy prefix is."""
        alone = zip(_ANCHORS, self.encode_batch(list(_ANCHORS)), strict=True)
        firsts = [self.backend.id_to_token(ids[0]) for text, ids in alone if ids and not text.isspace()]
        return any(token.startswith(_SPACES) for token in firsts)

    def _encode_after(self, texts: list[str], encode: Callable[[list[str]], list[list[int]]]) -> list[list[int]]:
        """Encodes texts after something else, which is taken off: the first of `_ANCHORS` that merges with no text."""
        result: dict[int, list[int]] = {}
        for anchor in _ANCHORS:
            left = [i for i in range(len(texts)) if i not in result]
            before, *after = encode([anchor, *(anchor + texts[i] for i in left)])
            if before:
                whole = zip(left, after, strict=True)
                result |= {i: ids[len(before) :] for i, ids in whole if ids[: len(before)] == before}
        left = [i for i in range(len(texts)) if i not in result]
        result |= dict(zip(left, encode([texts[i] for i in left]), strict=True))
        return [result[i] for i in range(len(texts))]

    @functools.cached_property
    def chat(self) -> ChatTemplate | None:
        """The chat template with what it refers to, or None."""
        return _chat(self.backend, self.chat_template, self.variables)

    def decode(self, ids: list[int], skip_special: bool = True) -> str:
        """Returns the text of `ids`; bytes that aren't UTF-8 become replacement characters.

        `skip_special` leaves out special tokens, and those of `stop`, which some tokenizers don't call special.
        """
        hidden = self.stop if skip_special else ()
        return self.backend.decode([int(i) for i in ids if i not in hidden], skip_special_tokens=skip_special)

    def decode_after(self, ids: list[int]) -> str:
        """Returns the text of `ids` that go on with another text: the space that begins it, if one does, is kept."""
        if not self._adds_space:
            return self.decode(ids)
        before = self.encode_stretches(["a"], special=False, first=True)[0]
        return self.decode([*before, *ids]).removeprefix(self.decode(before))

    def special(self, name: str) -> int | None:
        """Returns the id of the special token `name`, or None."""
        return self._specials.get(name)

    @functools.cached_property
    def _specials(self) -> dict[str, int]:
        return {token.content: i for i, token in self.backend.get_added_tokens_decoder().items() if token.special}

    def with_tokens(self, names: Sequence[str]) -> "Tokenizer":
        """Returns a tokenizer that has a special token of each name.

        Those that this one lacks get the ids from `size` on, in the order of `names`; what it has as an ordinary token
        becomes special, so that no text yields it. This tokenizer stays as it is, and is returned where it has all.

        Raises:
          InputError: a name can't be a token's, or the vocabulary has unused ids, which new tokens would be given.
        """
        names = tuple(dict.fromkeys(names))
        if all(name in self._specials for name in names):
            return self
        for name in names:
            if not isinstance(name, str) or not name.strip():
                raise InputError(
                    f"tokenizer.added_tokens: {name!r} can't be a token's name. Use one such as '<|tool|>'."
                )
        content = json.loads(self.backend.to_str())
        added = {token["content"]: token for token in content["added_tokens"]}
        new = [name for name in names if self.backend.token_to_id(name) is None]
        ids = {name: self.backend.token_to_id(name) for name in names} | _numbered(new, self.size)
        added |= {
            name: {**added.get(name, _NEW_TOKEN), "id": ids[name], "content": name, "special": True} for name in names
        }
        content["added_tokens"] = sorted(added.values(), key=lambda token: token["id"])
        backend = tokenizers.Tokenizer.from_str(json.dumps(content))
        if any(backend.token_to_id(name) != ids[name] for name in names):
            raise InputError(
                f"tokenizer.added_tokens: {', '.join(new)} can't be added: the vocabulary of the tokenizer has unused "
                f"ids below {self.size}. Use a tokenizer that has these tokens."
            )
        config, files = _note_added(self.files, {ids[name]: added[name] for name in names})
        return assemble(backend, self.eos, self.bos, config, files, self.stop)

    def with_variables(self, values: Mapping[str, str]) -> "Tokenizer":
        """Returns a tokenizer whose tokenizer_config.json names tokens, such as {"mask_token": "<mask>"}."""
        if all(self.variables.get(name) == token for name, token in values.items()):
            return self
        config, files = {**json.loads(self.files[CONFIG]), **values}, dict(self.files)
        special = json.loads(files.get(SPECIAL, b"{}"))
        if values.keys() & special.keys():
            own = {name: token for name, token in values.items() if name in special}
            files[SPECIAL] = json.dumps({**special, **own}, indent=1, ensure_ascii=False).encode()
        return assemble(self.backend, self.eos, self.bos, config, files, self.stop)

    @property
    def special_ids(self) -> np.ndarray:
        """[n] int32: the ids of special tokens, which no text gives."""
        return np.array(sorted(self._specials.values()), np.int32)

    @property
    def infilling(self) -> Mapping[str, Any]:
        """What tokenizer_config.json notes of how a model learned to fill in; see infilling.make_note."""
        note = json.loads(self.files[CONFIG]).get(special_tokens.INFILLING)
        return note if isinstance(note, dict) else {}

    def with_infilling(self, note: Mapping[str, Any]) -> "Tokenizer":
        """Returns a tokenizer whose tokenizer_config.json has this note; an empty one leaves what is there."""
        if not note or note == self.infilling:
            return self
        config = {**json.loads(self.files[CONFIG]), special_tokens.INFILLING: dict(note)}
        return assemble(self.backend, self.eos, self.bos, config, self.files, self.stop)

    def spelled_special(self, text: str) -> str:
        """Returns the first special token that `text` spells, or ""."""
        spelled = self._special_pattern.search(text)
        return spelled[0] if spelled else ""

    @functools.cached_property
    def _special_pattern(self) -> re.Pattern[str]:
        return any_of(self._specials)

    def token_bytes(self) -> np.ndarray:
        """Returns [V] int32: how many UTF-8 bytes each id stands for, 0 for special tokens and unused ids.

        Exact for byte-level tokenizers; for the others a word-piece's marks ("▁", "##") are taken for a space
        or nothing.
        """
        sizes = np.zeros(self.size, np.int32)
        byte_level = '"ByteLevel"' in json.dumps(json.loads(self.backend.to_str())["decoder"])
        for token, i in self.backend.get_vocab().items():
            if byte_level:
                sizes[i] = len(token)  # one character stands for one byte
            elif len(token) == 6 and token.startswith("<0x"):
                sizes[i] = 1
            else:
                sizes[i] = len(token.removeprefix("##").replace("▁", " ").encode())
        for i, added in self.backend.get_added_tokens_decoder().items():
            sizes[i] = 0 if added.special else len(added.content.encode())
        return sizes

    def save(self, path: str | Path) -> None:
        """Writes tokenizer.json and what belongs to it into the folder `path`, for transformers too."""
        path = Path(path)
        path.mkdir(parents=True, exist_ok=True)
        contents = {"tokenizer.json": self.backend.to_str(pretty=True).encode(), **self.files}
        for name, content in contents.items():
            write_bytes(path / name, content)

    def fingerprint(self) -> str:
        """Returns a hash of all that decides what ids a text or a conversation gets."""
        return self._fingerprint

    @functools.cached_property
    def _fingerprint(self) -> str:
        beside = (self.eos, self.bos, self.chat_template, self.stop, sorted(self.variables.items()))
        return digest((self.backend.to_str(), *beside))


def long_parts(text: str, most: int) -> list[str]:
    """Cuts a text into parts of at most so many characters.

    It is cut where a line begins with a word, so that tokens are those of the whole under tokenizers that keep line
    breaks and words apart; else before a space, else anywhere.
    """
    parts, start = [], 0
    while len(text) - start > most:
        window = text[start + most // 2 : start + most + 1]
        ends = [m.end() for m in re.finditer(r"\S\n(?=\S)", window)] or [
            m.end() for m in re.finditer(r"\S(?=\s)", window)
        ]
        end = start + most // 2 + min(ends[-1], most - most // 2) if ends else start + most
        parts.append(text[start:end])
        start = end
    return [*parts, text[start:]]


def assemble(
    backend: tokenizers.Tokenizer,
    eos: int,
    bos: int | None,
    config: Mapping[str, Any] | None = None,
    files: Mapping[str, bytes] | None = None,
    ends: tuple[int, ...] = (),
) -> Tokenizer:
    """A Tokenizer of what files say; `config` is that of a tokenizer_config.json, and `ends` ids that end an answer."""
    backend.no_truncation()  # a tokenizer.json may carry settings that cut or pad every text
    backend.no_padding()
    backend.encode_special_tokens = True  # plain text must not be able to forge an end of text or a turn
    size = 1 + max(backend.get_vocab().values())
    is_bytes = _is_bytes(backend)
    files = dict(files or {})
    config = dict(
        config or {"bos_token": None if bos is None else backend.id_to_token(bos), "add_bos_token": bos is not None}
    )
    if content_of(config.get("eos_token")) != backend.id_to_token(eos):
        config["eos_token"] = backend.id_to_token(eos)
    if config.pop("auto_map", None) or "tokenizer_class" not in config:  # its code isn't kept; tokenizer.json says all
        config["tokenizer_class"] = "PreTrainedTokenizerFast"
    files[CONFIG] = json.dumps(config, indent=1, ensure_ascii=False).encode()
    settings = {**json.loads(files.get(SPECIAL, b"{}")), **config}
    variables = {
        name: content_of(token) for name, token in settings.items() if name.endswith("_token") and _is_token(token)
    }
    template, named = _find_template(files, config)
    chat = _chat(backend, template, variables)
    ends_turn = chat and end_of_turn(chat)
    stop = dict.fromkeys([eos, *ends, *([backend.token_to_id(ends_turn)] if ends_turn else [])])
    return Tokenizer(backend, size, eos, bos, is_bytes, template, tuple(stop), variables, files, named)


def _is_bytes(backend: tokenizers.Tokenizer) -> bool:
    """Whether it is the byte tokenizer, with the special tokens that it began with or more."""
    added = backend.get_added_tokens_decoder().values()
    if backend.get_vocab_size(with_added_tokens=False) != 256 or not all(token.special for token in added):
        return False
    named = [backend.token_to_id(name) for name in SPECIALS] == list(range(256, 256 + len(SPECIALS)))
    return named and all(backend.token_to_id(char) == byte for byte, char in enumerate(byte_chars()))


def _numbered(names: Sequence[str], first: int) -> dict[str, int]:
    return {name: first + i for i, name in enumerate(names)}


def _note_added(
    files: Mapping[str, bytes], added: Mapping[int, Mapping[str, Any]]
) -> tuple[dict[str, Any], dict[str, bytes]]:
    """The tokenizer_config.json, and all files, with what transformers reads there of special tokens.

    Args:
      files: what lies beside the tokenizer.json.
      added: id -> the token as a tokenizer.json has it.
    """
    files, names = dict(files), [token["content"] for token in added.values()]
    config = json.loads(files[CONFIG])
    for name, field in special_tokens.CONFIG_FIELDS.items():
        if name in names:
            config.setdefault(field, name)
    if "added_tokens_decoder" in config:
        fields = (*_NEW_TOKEN, "content", "special")
        entries = {str(i): {field: token[field] for field in fields} for i, token in added.items()}
        config["added_tokens_decoder"] = {**config["added_tokens_decoder"], **entries}
    if ADDED in files:
        known = json.loads(files[ADDED])
        files[ADDED] = json.dumps({**known, **{token["content"]: i for i, token in added.items()}}, indent=1).encode()
    special = json.loads(files.get(SPECIAL, b"{}"))
    for settings in (config, special) if SPECIAL in files else (config,):
        field = next((f for f in _OTHER_TOKENS if isinstance(settings.get(f), list)), _OTHER_TOKENS[0])
        known = settings.get(field, [])
        seen = {content_of(token) for token in (*known, *settings.values()) if _is_token(token)}
        settings[field] = [*known, *(name for name in names if name not in seen)]
    if SPECIAL in files:
        files[SPECIAL] = json.dumps(special, indent=1, ensure_ascii=False).encode()
    return config, files


def _chat(backend: tokenizers.Tokenizer, template: str | None, variables: Mapping[str, str]) -> ChatTemplate | None:
    if template is None:
        return None
    added = backend.get_added_tokens_decoder().values()
    special = [token.content for token in added if token.special]
    return make_template(template, variables, special, [token.content for token in added])


def _find_template(files: Mapping[str, bytes], config: Mapping[str, Any]) -> tuple[str | None, tuple[str, ...]]:
    """The chat template, or None and the names of those that there are if none of several is the default."""
    if TEMPLATE in files:
        return files[TEMPLATE].decode(), ()
    template = config.get("chat_template")
    if template is None or isinstance(template, str):
        return template or None, ()
    try:
        by_name = {named["name"]: named["template"] for named in template}
        well_formed = all(isinstance(text, str) for pair in by_name.items() for text in pair)
    except (TypeError, KeyError):
        well_formed = False
    if not well_formed:
        raise InputError(
            f"{CONFIG}: chat_template = {str(template)[:40]} is neither text nor a list of objects with the texts "
            "'name' and 'template'. Mend it."
        )
    return by_name.get("default"), () if "default" in by_name else tuple(by_name)


@functools.cache
def byte_chars() -> list[str]:
    """Returns what byte-level tokenizers write for each byte: its character if it prints, else one above 255."""
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    themselves = {ord(char) for char in alphabet if ord(char) < 256}
    others = iter(char for char in alphabet if ord(char) >= 256)
    return [chr(byte) if byte in themselves else next(others) for byte in range(256)]


def content_of(token: Any) -> str:
    """A config writes a token as text, as {"content": text}, or as null."""
    return (token.get("content") if isinstance(token, dict) else token) or ""


def _is_token(value: Any) -> bool:
    return isinstance(value, str) or (isinstance(value, dict) and "content" in value)
