"""The tokenizer of a model: read from tokenizer.json, a .gguf file, or what transformers makes a tokenizer of."""

import codecs
import json
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import tokenizers

from research.errors import InputError, did_you_mean, located
from research.files import read_json
from research.sources import gguf_tokenizer
from research.sources.tokenizers.tokenizer import (
    ADDED,
    CONFIG,
    EOS,
    GENERATION,
    SPECIAL,
    TEMPLATE,
    Tokenizer,
    assemble,
    content_of,
)

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
_OTHER_TEMPLATES = "additional_chat_templates"
_OTHER_FILES = (SPECIAL, ADDED, "tokenizer.model", GENERATION, TEMPLATE)
_MOST_TOKENS, _MOST_BYTES = 2**24, 2**30
# What a tokenizer without a tokenizer.json is made of.
_SLOW_FILES = ("tokenizer.model", "vocab.json", "vocab.txt", "spiece.model", "sentencepiece.bpe.model")


def is_there(ref: str | Path) -> bool:
    """Whether `load_pretrained(ref)` would find files of a tokenizer."""
    path = Path(ref)
    return path.is_file() or any((path / file).is_file() for file in ("tokenizer.json", *_SLOW_FILES))


def load_pretrained(ref: str | Path, *, eos_token: str = "") -> Tokenizer:
    """Returns the tokenizer of a model, with its chat template if it has one. No code that comes with it is run.

    Args:
      ref: a folder with tokenizer.json, or with what transformers makes a tokenizer of; a tokenizer.json; or a .gguf
        file.
      eos_token: the token that ends a text; "" takes what the files say.

    Raises:
      InputError: there is no tokenizer, it can't be read, or its end-of-text token can't be known.
    """
    path = Path(ref).expanduser()
    try:
        return _load(path, eos_token)
    except (InputError, OSError):
        raise
    except Exception as e:  # what a file says is to be of the types and sizes that those who read it take for granted
        raise InputError(
            f"tokenizer.kind: the files of the tokenizer in {str(path)!r} don't fit together ({e!r:.200}). Copy them "
            "anew."
        ) from e


def _load(path: Path, eos_token: str) -> Tokenizer:
    if path.is_file() and path.suffix == ".gguf":
        return _read_gguf(path, eos_token)
    if path.is_dir() and not (path / "tokenizer.json").is_file() and any((path / f).is_file() for f in _SLOW_FILES):
        return _convert(path, eos_token)
    return _read(path, eos_token)


def _read(path: Path, eos_token: str) -> Tokenizer:
    file = path / "tokenizer.json" if path.is_dir() else path
    if not file.is_file():
        raise InputError(
            f"tokenizer.kind: {str(path)!r} is no tokenizer.json, no folder with one and no .gguf file."
            f"{did_you_mean(str(path), ('byte', 'bpe'))} Or give the path of one."
        )
    try:
        backend = tokenizers.Tokenizer.from_str(_read_file(file).decode())
    except BaseException as e:  # the package raises bare Exception, and its panics aren't even that
        if not (isinstance(e, Exception) or type(e).__name__ == "PanicException"):
            raise
        raise InputError(f"tokenizer.kind: {str(file)!r} can't be read as a tokenizer.json: {e!s:.400}") from e
    config, special, generation = (
        read_json(file.parent / name, {}, name="tokenizer.kind") for name in (CONFIG, SPECIAL, GENERATION)
    )
    _check_vocabulary(backend, file)
    for name, values in ((CONFIG, config), (SPECIAL, special)):
        _check_tokens(values, file.parent / name)
    others = sorted((file.parent / _OTHER_TEMPLATES).glob("*.jinja"))
    if others and "chat_template" not in config and not (file.parent / TEMPLATE).is_file():
        config["chat_template"] = [{"name": each.stem, "template": _read_file(each).decode()} for each in others]
    files = {name: _read_file(file.parent / name) for name in _OTHER_FILES if (file.parent / name).is_file()}
    eos = _find_eos(backend, eos_token, {**special, **config}, str(file))
    ends = generation.get("eos_token_id")
    ends = () if ends is None else tuple(ends) if isinstance(ends, list) else (ends,)
    unknown = [i for i in ends if type(i) is not int or not 0 <= i < 2**32 or backend.id_to_token(i) is None]
    if unknown:
        raise InputError(
            f"{file.parent / GENERATION}: eos_token_id = {list(ends)}, but the tokenizer has no {unknown[0]}. Mend it."
        )
    with located(str(file.parent)):
        return assemble(backend, eos, _find_bos(backend, {**special, **config}, eos), config or None, files, ends)


def _check_vocabulary(backend: tokenizers.Tokenizer, file: Path) -> None:
    """Raises InputError where there is no token, or the ids leave so many out that tables of them wouldn't fit."""
    ids = backend.get_vocab().values()
    if not ids or max(ids) >= _MOST_TOKENS:
        held = f"ids up to {max(ids):,}, and {_MOST_TOKENS:,} is the most" if ids else "no token"
        raise InputError(f"tokenizer.kind: {str(file)!r} has {held}. Copy it anew.")


def _check_tokens(values: Mapping[str, Any], file: Path) -> None:
    """Raises InputError where a file names a token by something that is no text, {"content": text} or null."""
    for name, value in values.items():
        if name.endswith("_token") and not name.startswith("add_"):
            text = value.get("content") if isinstance(value, dict) else value
            if not isinstance(text, str | None):
                raise InputError(f"{file}: {name} = {value!r:.80}: must be a token's text. Mend it.")


def _read_file(file: Path) -> bytes:
    """The content without a byte-order mark. Raises InputError where it is larger than any tokenizer's."""
    if (size := file.stat().st_size) > _MOST_BYTES:
        raise InputError(f"tokenizer.kind: {str(file)!r} has {size:,} bytes, and {_MOST_BYTES:,} is the most.")
    return file.read_bytes().removeprefix(codecs.BOM_UTF8)


def _read_gguf(path: Path, eos_token: str) -> Tokenizer:
    backend, config, template, ends = gguf_tokenizer.make(path)
    eos = _find_eos(backend, eos_token, config, str(path))
    files = {GENERATION: json.dumps({"eos_token_id": ends}).encode()} if ends else {}
    if template is not None:
        files[TEMPLATE] = template.encode()
    return assemble(backend, eos, _find_bos(backend, config, eos), config, files, tuple(ends))


def _convert(folder: Path, eos_token: str) -> Tokenizer:
    """Has transformers make a tokenizer.json of the vocabularies of older models."""
    try:  # here, since it is an extra, takes seconds to import, and is needed for nothing else
        from transformers import AutoTokenizer
    except ImportError as e:
        raise InputError(
            f"tokenizer.kind: {str(folder)!r} has no tokenizer.json, and making one needs the package transformers: "
            f"pip install -e '.[convert]' ({e})."
        ) from e

    with tempfile.TemporaryDirectory() as temporary:
        try:
            tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
            tokenizer.save_pretrained(temporary)
        except Exception as e:  # it fails in many ways
            raise InputError(f"tokenizer.kind: transformers can't read the tokenizer in {str(folder)!r}: {e}") from e
        if not Path(temporary, "tokenizer.json").is_file():
            raise InputError(
                f"tokenizer.kind: the tokenizer in {str(folder)!r} can't be written as a tokenizer.json, which is "
                "needed. Name another."
            )
        for name in (GENERATION, "tokenizer.model"):
            if (folder / name).is_file():
                shutil.copy(folder / name, temporary)
        return _read(Path(temporary), eos_token)


def _find_eos(backend: tokenizers.Tokenizer, eos_token: str, config: Mapping[str, Any], file: str) -> int:
    name = eos_token or content_of(config.get("eos_token"))
    known = [token for token in _KNOWN_EOS if backend.token_to_id(token) is not None]
    if not name:
        if len(known) != 1:
            candidates = f"several tokens that could be: {', '.join(known)}" if known else "no well-known one"
            raise InputError(
                f"tokenizer.eos_token: '' and no config beside {file!r} says which "
                f"token ends a text; it has {candidates}. Set tokenizer.eos_token to the one that does."
            )
        name = known[0]
    eos = backend.token_to_id(name)
    if eos is None:
        hint = did_you_mean(name, known or [token.content for token in backend.get_added_tokens_decoder().values()])
        raise InputError(f"tokenizer.eos_token: {name!r} is not in the vocabulary of {file!r}.{hint}")
    return eos


def _find_bos(backend: tokenizers.Tokenizer, config: Mapping[str, Any], eos: int) -> int | None:
    """The token that the tokenizer itself puts before a text: many name a bos_token that they never use."""
    name = content_of(config.get("bos_token"))
    if config.get("add_bos_token") is True:
        return backend.token_to_id(name) if name else None
    if config.get("add_bos_token") is False:
        return None
    added = backend.encode("", add_special_tokens=True).ids
    return added[0] if added and added[0] != eos else None
