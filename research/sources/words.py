"""What the tokens of a vocabulary spell, and the tables by which ops.words finds words in them."""

import functools
import json
import unicodedata

import numpy as np

from research.ops.words import ALONE, INSIDE, LETTER, PIECE, WordTables
from research.sources.tokenizers import Tokenizer, byte_chars

_ASCII_SIGNS = frozenset("!\"#$%&'()*+,-./:;<=>?@[\\]^_`{|}~")
# Of these each is a word (google-research/bert, tokenization.py, _is_chinese_char).
_CHINESE = (
    (0x4E00, 0x9FFF),
    (0x3400, 0x4DBF),
    (0x20000, 0x2A6DF),
    (0x2A700, 0x2B73F),
    (0x2B740, 0x2B81F),
    (0x2B820, 0x2CEAF),
    (0xF900, 0xFAFF),
    (0x2F800, 0x2FA1F),
)


def ordinary_tokens(tokenizer: Tokenizer) -> np.ndarray:
    """Returns [V] bool: the ids that stand for text. Special tokens, those that end an answer, and ids that no token
    has aren't among them."""
    ordinary = np.zeros(tokenizer.size, bool)
    ordinary[list(tokenizer.backend.get_vocab().values())] = True
    added = tokenizer.backend.get_added_tokens_decoder().items()
    special = {tokenizer.bos, tokenizer.eos, *tokenizer.stop, *(i for i, token in added if token.special)}
    ordinary[[i for i in special if i is not None]] = False
    return ordinary


def spellings(tokenizer: Tokenizer) -> list[bytes]:
    """Returns the UTF-8 bytes that each id adds to a decoded text, which may be parts of a character.

    A space before or after a word is there, however the vocabulary writes it ("▁", "##", "</w>"). An id that is no
    ordinary token has none.
    """
    content = json.loads(tokenizer.backend.to_str())
    model, decoder = content["model"], json.dumps(content["decoder"])
    if '"ByteLevel"' in decoder:
        numbers = {char: byte for byte, char in enumerate(byte_chars())}
        spell = functools.partial(_spell_bytes, numbers)
    else:
        spell = functools.partial(
            _spell,
            separate=model["type"] == "WordLevel",
            prefix=model.get("continuing_subword_prefix") or "",
            suffix=model.get("end_of_word_suffix") or "",
        )
    result = [b""] * tokenizer.size
    for token, i in tokenizer.backend.get_vocab(with_added_tokens=False).items():
        result[i] = spell(token)
    for i, added in tokenizer.backend.get_added_tokens_decoder().items():
        result[i] = added.content.encode()
    ordinary = ordinary_tokens(tokenizer)
    return [text if ordinary[i] else b"" for i, text in enumerate(result)]


def _spell_bytes(numbers: dict[str, int], token: str) -> bytes:
    """Of a byte-level vocabulary; a token of other characters is taken for text."""
    known = all(char in numbers for char in token)
    return bytes(numbers[char] for char in token) if known else token.encode()


def _spell(token: str, *, separate: bool, prefix: str, suffix: str) -> bytes:
    """Of any other.

    Args:
      token: as the vocabulary writes it.
      separate: each token is a word.
      prefix: of those that go on with a word, "##"; "" where that isn't marked.
      suffix: of those that end a word, "</w>"; "" where that isn't marked.
    """
    if len(token) == 6 and token.startswith("<0x") and token.endswith(">"):
        return bytes([int(token[3:5], 16)])
    before = " " if separate or (prefix and not token.startswith(prefix)) else ""
    text = token.removeprefix(prefix) if prefix else token
    if suffix and text.endswith(suffix):
        text = text.removesuffix(suffix) + " "
    return (before + text.replace("▁", " ")).encode()


def word_tables(tokenizer: Tokenizer) -> WordTables:
    """The tables of a tokenizer's vocabulary."""
    texts = spellings(tokenizer)
    count = len(texts)
    first, last = np.full(count, ALONE, np.uint8), np.full(count, ALONE, np.uint8)
    bits, missing = np.zeros(count, np.int32), np.zeros(count, np.int32)
    leading, size = np.zeros((count, 3), np.uint8), np.full(count, 3, np.int32)
    for i, text in enumerate(texts):
        if text:
            first[i], last[i], bits[i], missing[i] = _ends(text)
            leading[i, : len(text)] = list(text[:3])
            size[i] = min(len(text), 3)
    return WordTables(first, last, bits, missing, leading, size, _borders())


def _ends(text: bytes) -> tuple[int, int, int, int]:
    """`first`, `last`, `bits` and `missing` of WordTables."""
    began = [i for i, byte in enumerate(text) if byte >> 6 != 0b10]  # where characters begin
    if not began:
        return INSIDE, INSIDE, 0, 0
    final = text[began[-1] :]
    lost = _length(final[0]) - len(final)
    last = PIECE if lost > 0 else _kind(final)
    bits = 0
    if lost > 0:
        bits = final[0] & (0x7F >> _length(final[0]))
        for byte in final[1:]:
            bits = bits << 6 | byte & 0b111111
    if began[0]:
        first = INSIDE
    elif len(began) == 1:
        first = last
    else:
        first = _kind(text[: began[1]])
    return first, last, bits, max(lost, 0)


def _length(byte: int) -> int:
    """How many bytes the character has that begins with this one."""
    return 1 if byte < 0xC0 else 2 if byte < 0xE0 else 3 if byte < 0xF0 else 4


def _kind(character: bytes) -> int:
    """ALONE or LETTER."""
    text = character.decode(errors="replace")
    return LETTER if len(text) == 1 and is_of_word(text) else ALONE


def is_of_word(char: str) -> bool:
    """Whether a character makes a word with its neighbours: it is no white space, punctuation or control character, and
    not Chinese. Of the ASCII characters all but letters and digits are punctuation, as in BERT."""
    if char in _ASCII_SIGNS or unicodedata.category(char)[0] in "ZPC":
        return False
    return not any(low <= ord(char) <= high for low, high in _CHINESE)


@functools.cache
def _borders() -> np.ndarray:
    """See WordTables.borders."""
    of_word = np.array([not 0xD800 <= code < 0xE000 and is_of_word(chr(code)) for code in range(0x110000)])
    return np.flatnonzero(np.diff(of_word, prepend=False)).astype(np.int32)
