"""Text to token ids and back: raw bytes, a BPE trained on the run's own text, or any tokenizer.json."""

import dataclasses
import functools
import json
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers

from research.errors import InputError, did_you_mean
from research.sources.cache import cache_root, cached, code_digest, digest

BOS, EOS = "<|bos|>", "<|eos|>"
SPECIALS = (BOS, EOS, "<|system|>", "<|user|>", "<|assistant|>")
# What known model families call the end of a text, for a tokenizer.json that has no config beside it.
_KNOWN_EOS = (
    EOS,
    "</s>",
    "<eos>",
    "<|endoftext|>",
    "<|end_of_text|>",
    "<|im_end|>",
    "<|eot_id|>",
    "[EOS]",
    "[SEP]",
)
# No merge crosses these: a word or a run of signs, each with the space before it; one digit, so that equal
# places of two numbers are equal tokens; white space, but for its last character before a word.
_WORDS = r" ?[\p{L}\p{M}]+|\p{N}| ?[^\s\p{L}\p{M}\p{N}]+|\s+(?!\S)|\s+"


@dataclasses.dataclass(frozen=True)
class TokenizerSpec:
    """Which tokenizer a run uses.

    Attributes:
      kind: "byte" (ids 0-255 are the bytes, then the special tokens), "bpe" (byte-level byte-pair encoding
        trained on the run's own training text), or a path: a tokenizer.json or the folder it lies in.
      vocab_size: of "bpe", special tokens included; less where the text has too few pairs to merge.
      eos_token: of a path, the token that ends a text; "" reads it from the tokenizer_config.json beside it.
    """

    kind: str = "byte"
    vocab_size: int = 4096
    eos_token: str = ""


@dataclasses.dataclass(frozen=True, eq=False)
class Tokenizer:
    """A tokenizer under which no text yields special tokens: what reads like one is encoded as plain text.

    Attributes:
      backend: the `tokenizers` object.
      size: V, the number of ids.
      eos: id that ends every document.
      bos: id that begins every document, or None.
      raw_bytes: ids 0-255 are the bytes themselves, so that encoding needs no table.
    """

    backend: tokenizers.Tokenizer
    size: int
    eos: int
    bos: int | None
    raw_bytes: bool

    def encode(self, text: str) -> list[int]:
        return self.encode_batch([text])[0]

    def encode_batch(self, texts: list[str]) -> list[list[int]]:
        if self.raw_bytes:
            return [list(text.encode()) for text in texts]
        return [encoding.ids for encoding in self.backend.encode_batch_fast(texts, add_special_tokens=False)]

    def decode(self, ids: list[int], skip_special: bool = True) -> str:
        """Returns the text of `ids`; bytes that aren't UTF-8 become replacement characters."""
        return self.backend.decode([int(i) for i in ids], skip_special_tokens=skip_special)

    def special(self, name: str) -> int | None:
        """Returns the id of the special token `name`, or None."""
        return self._specials.get(name)

    @functools.cached_property
    def _specials(self) -> dict[str, int]:
        return {token.content: i for i, token in self.backend.get_added_tokens_decoder().items() if token.special}

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
        """Writes tokenizer.json and tokenizer_config.json into the folder `path`, for `load_tokenizer`."""
        path = Path(path)
        path.mkdir(parents=True, exist_ok=True)
        config = {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "eos_token": self.backend.id_to_token(self.eos),
            "bos_token": None if self.bos is None else self.backend.id_to_token(self.bos),
            "add_bos_token": self.bos is not None,
        }
        for name, text in (
            ("tokenizer.json", self.backend.to_str(pretty=True)),
            ("tokenizer_config.json", json.dumps(config, indent=1)),
        ):
            part = path / f".{name}.{uuid.uuid4().hex}"  # renamed when whole: a killed process breaks no older file
            part.write_text(text, encoding="utf-8")
            part.replace(path / name)

    def fingerprint(self) -> str:
        """Returns a hash of all that decides what `encode` gives."""
        return digest((self.backend.to_str(), self.eos, self.bos))


def make_tokenizer(
    spec: TokenizerSpec, texts: Callable[[], Iterator[str]], *, texts_id: str = "", cache_dir: str = ""
) -> Tokenizer:
    """Returns the tokenizer that `spec` names, training it on `texts()` where it is "bpe".

    A trained tokenizer is kept in the cache under `texts_id`, a name for what `texts` gives (default: a hash
    of the texts).

    Raises:
      InputError: the kind is unknown, the path has no tokenizer, or its end-of-text token can't be known.
    """
    if spec.kind == "byte":
        return _byte_tokenizer()
    if spec.kind == "bpe":
        least = 256 + len(SPECIALS)
        if spec.vocab_size < least:
            raise InputError(
                f"tokenizer.vocab_size: {spec.vocab_size} is too small for 256 bytes and {len(SPECIALS)} "
                f"special tokens. Use at least {least}, or tokenizer.kind='byte'."
            )
        made_of = (
            code_digest(__file__),
            tokenizers.__version__,
            spec.vocab_size,
            texts_id or digest(texts()),
        )
        folder = cache_root(cache_dir) / "tokenizers" / digest(made_of)
        cached(folder, lambda made: _train_bpe(texts(), spec.vocab_size).save(made))
        return load_tokenizer(folder)
    return _read(Path(spec.kind).expanduser(), spec.eos_token)


def load_tokenizer(folder: str | Path) -> Tokenizer:
    """Returns the tokenizer that `Tokenizer.save(folder)` wrote. Raises InputError where there is none."""
    return _read(Path(folder), "")


def _wrap(backend: tokenizers.Tokenizer, eos: int, bos: int | None) -> Tokenizer:
    backend.no_truncation()  # a tokenizer.json may carry settings that cut or pad every text
    backend.no_padding()
    backend.encode_special_tokens = True  # plain text must not be able to forge an end of text or a turn
    size = 1 + max(backend.get_vocab().values())
    is_bytes = size == 256 + len(SPECIALS) and all(
        backend.token_to_id(char) == byte for byte, char in enumerate(_byte_chars())
    )
    return Tokenizer(backend, size, eos, bos, raw_bytes=is_bytes)


@functools.cache
def _byte_chars() -> list[str]:
    """What byte-level tokenizers write for each byte: its character if it prints, else one above 255."""
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    themselves = {ord(char) for char in alphabet if ord(char) < 256}
    others = iter(char for char in alphabet if ord(char) >= 256)
    return [chr(byte) if byte in themselves else next(others) for byte in range(256)]


def _byte_level(model: tokenizers.models.BPE) -> tokenizers.Tokenizer:
    pre = tokenizers.pre_tokenizers
    backend = tokenizers.Tokenizer(model)
    split = pre.Split(tokenizers.Regex(_WORDS), behavior="isolated")
    backend.pre_tokenizer = pre.Sequence([split, pre.ByteLevel(add_prefix_space=False, use_regex=False)])
    backend.decoder = tokenizers.decoders.ByteLevel()
    return backend


def _byte_tokenizer() -> Tokenizer:
    backend = _byte_level(tokenizers.models.BPE({char: byte for byte, char in enumerate(_byte_chars())}, []))
    backend.add_special_tokens(list(SPECIALS))
    return _wrap(backend, backend.token_to_id(EOS), backend.token_to_id(BOS))


def _train_bpe(texts: Iterator[str], vocab_size: int) -> Tokenizer:
    backend = _byte_level(tokenizers.models.BPE())
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(SPECIALS),
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(texts, trainer)
    return _wrap(backend, backend.token_to_id(EOS), backend.token_to_id(BOS))


def _read(path: Path, eos_token: str) -> Tokenizer:
    file = path / "tokenizer.json" if path.is_dir() else path
    if not file.is_file():
        raise InputError(
            f"tokenizer.kind: {str(path)!r} is no tokenizer.json and no folder with one."
            f"{did_you_mean(str(path), ('byte', 'bpe'))} Or give the path of a tokenizer.json."
        )
    try:
        backend = tokenizers.Tokenizer.from_file(str(file))
    except Exception as e:  # the package raises bare Exception
        raise InputError(f"tokenizer.kind: {str(file)!r} can't be read as a tokenizer.json: {e}") from e
    config_file = file.parent / "tokenizer_config.json"
    try:
        config = json.loads(config_file.read_text(encoding="utf-8")) if config_file.is_file() else {}
    except ValueError as e:
        raise InputError(f"tokenizer.kind: {str(config_file)!r} is not valid JSON: {e}") from e
    eos = _find_eos(backend, eos_token, config, file)
    return _wrap(backend, eos, _find_bos(backend, config, eos))


def _find_eos(backend: tokenizers.Tokenizer, eos_token: str, config: dict[str, Any], file: Path) -> int:
    name = eos_token or _content(config.get("eos_token"))
    known = [token for token in _KNOWN_EOS if backend.token_to_id(token) is not None]
    if not name:
        if len(known) != 1:
            found = f"several tokens that could be: {', '.join(known)}" if known else "no well-known one"
            raise InputError(
                f"tokenizer.eos_token: '' and no tokenizer_config.json beside {str(file)!r} says which "
                f"token ends a text; it has {found}. Set tokenizer.eos_token to the one that does."
            )
        name = known[0]
    eos = backend.token_to_id(name)
    if eos is None:
        hint = did_you_mean(name, known or [token.content for token in backend.get_added_tokens_decoder().values()])
        raise InputError(f"tokenizer.eos_token: {name!r} is not in the vocabulary of {str(file)!r}.{hint}")
    return eos


def _find_bos(backend: tokenizers.Tokenizer, config: dict[str, Any], eos: int) -> int | None:
    """The token that the tokenizer itself puts before a text: many name a bos_token that they never use."""
    name = _content(config.get("bos_token"))
    if config.get("add_bos_token") is True:
        return backend.token_to_id(name) if name else None
    if config.get("add_bos_token") is False:
        return None
    added = backend.encode("", add_special_tokens=True).ids
    return added[0] if added and added[0] != eos else None


def _content(token: Any) -> str:
    """A config writes a token as text, as {"content": text}, or as null."""
    return (token.get("content") if isinstance(token, dict) else token) or ""
