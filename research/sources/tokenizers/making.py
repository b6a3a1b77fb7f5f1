"""The tokenizer that a run asks for: raw bytes, a BPE trained on the run's own text, or that of a model."""

import dataclasses
from collections.abc import Callable, Iterator
from pathlib import Path

import tokenizers

from research.errors import InputError
from research.files import cache_root
from research.ranges import Size
from research.sources.cache import cached, code_digest, digest
from research.sources.tokenizers import tokenizer
from research.sources.tokenizers.reading import load_pretrained
from research.sources.tokenizers.tokenizer import BOS, EOS, SPECIALS, Tokenizer, assemble, byte_chars

# No merge crosses these: a word or a run of signs, each with the space before it; one digit, so that equal
# places of two numbers are equal tokens; white space, but for its last character before a word.
_WORDS = r" ?[\p{L}\p{M}]+|\p{N}| ?[^\s\p{L}\p{M}\p{N}]+|\s+(?!\S)|\s+"


@dataclasses.dataclass(frozen=True)
class TokenizerSpec:
    """Which tokenizer a run uses.

    Attributes:
      kind: "byte" (ids 0-255 are the bytes, then the special tokens), "bpe" (byte-level byte-pair encoding
        trained on the run's own training text), or a path: a tokenizer.json, a folder with the tokenizer of a model,
        or a .gguf file.
      vocab_size: of "bpe", special tokens included; less where the text has too few pairs to merge.
      eos_token: of a path, the token that ends a text; "" reads it from what lies beside it.
      added_tokens: names of further special tokens, such as the markers of a chat template; their ids come last.
    """

    kind: str = "byte"
    vocab_size: Size = 4096
    eos_token: str = ""
    added_tokens: tuple[str, ...] = ()


def make_tokenizer(
    spec: TokenizerSpec, texts: Callable[[], Iterator[str]], *, texts_id: str = "", cache_dir: str = ""
) -> Tokenizer:
    """Returns the tokenizer that `spec` names, without its added tokens, training it on `texts()` where it is "bpe".

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
        identity = (
            code_digest(__file__, tokenizer.__file__),
            tokenizers.__version__,
            spec.vocab_size,
            texts_id or digest(texts()),
        )
        folder = cache_root(cache_dir) / "tokenizers" / digest(identity)
        cached(folder, lambda partial: _train_bpe(texts(), spec.vocab_size).save(partial))
        return load_tokenizer(folder)
    return load_pretrained(spec.kind, eos_token=spec.eos_token)


def load_tokenizer(folder: str | Path) -> Tokenizer:
    """Returns the tokenizer that `Tokenizer.save(folder)` wrote. Raises InputError where there is none."""
    return load_pretrained(folder)


def _byte_level(model: tokenizers.models.BPE) -> tokenizers.Tokenizer:
    pre = tokenizers.pre_tokenizers
    backend = tokenizers.Tokenizer(model)
    split = pre.Split(tokenizers.Regex(_WORDS), behavior="isolated")
    backend.pre_tokenizer = pre.Sequence([split, pre.ByteLevel(add_prefix_space=False, use_regex=False)])
    backend.decoder = tokenizers.decoders.ByteLevel()
    return backend


def _byte_tokenizer() -> Tokenizer:
    backend = _byte_level(tokenizers.models.BPE({char: byte for byte, char in enumerate(byte_chars())}, []))
    backend.add_special_tokens(list(SPECIALS))
    return assemble(backend, backend.token_to_id(EOS), backend.token_to_id(BOS))


def _train_bpe(texts: Iterator[str], vocab_size: int) -> Tokenizer:
    backend = _byte_level(tokenizers.models.BPE())
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(SPECIALS),
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(texts, trainer)
    return assemble(backend, backend.token_to_id(EOS), backend.token_to_id(BOS))
