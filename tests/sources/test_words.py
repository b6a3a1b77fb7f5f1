"""Words found in tokens are those of the decoded text, however a vocabulary cuts and writes them."""

import functools
import itertools
import re
import unicodedata

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import text_cases
from tokenizers import pre_tokenizers

from research.ops.words import word_starts
from research.sources.tokenizers import TokenizerSpec, make_tokenizer
from research.sources.words import ordinary_tokens, spellings, word_tables

TEXTS = [
    "Don't panic: the café's naïve über-menu costs 5€ (or 1,234.50 £)!",
    "日本語のテキスト、漢字かな。 한국어 текст — “quoted” …",
    "x = f(a_b)[0] != {'k': 1}\n\treturn  y\r\n",
    "\u00a0nbsp\u3000wide «guillemets» ×÷ µm Ω 🎉 party👩🏽x",
    *text_cases.fuzz(60),
]
CHINESE = re.compile(
    "[\u4e00-\u9fff\u3400-\u4dbf\U00020000-\U0002a6df\U0002a700-\U0002ceaf\uf900-\ufaff\U0002f800-\U0002fa1f]"
)


def make(kind, folder=None):
    if kind in ("byte", "bpe"):
        return make_tokenizer(TokenizerSpec(kind, 400), lambda: iter(TEXTS))
    return text_cases.make_folder(folder, kind)


def units(text):
    """(start, stop) of each word, and of each other character, as the pre-tokenizer of BERT cuts."""
    spans = [
        (start + begin, start + end)
        for piece, (start, _) in pre_tokenizers.BertPreTokenizer().pre_tokenize_str(text)
        for begin, end in parts(piece)
    ]
    inside = {i for start, stop in spans for i in range(start, stop)}
    return spans + [(i, i + 1) for i in range(len(text)) if i not in inside]


def parts(piece):
    """Those of a piece without white space and punctuation, between Chinese and control characters."""
    alone = [i for i, char in enumerate(piece) if CHINESE.match(char) or unicodedata.category(char)[0] == "C"]
    borders = sorted({0, len(piece), *alone, *(i + 1 for i in alone)})
    return itertools.pairwise(borders)


def joined_by_offsets(text, offsets):
    """Whether each token has a part of a unit that the one before has a part of."""
    of_unit = np.zeros(len(text), int)
    for number, (start, stop) in enumerate(units(text)):
        of_unit[start:stop] = number
    numbers = [set(of_unit[start:stop]) for start, stop in offsets]
    return [bool(one & two) for one, two in itertools.pairwise(numbers)]


@pytest.mark.parametrize("kind", ["byte", "bpe", *text_cases.BACKENDS])
def test_words_are_those_of_the_decoded_text(kind, tmp_path):
    tokenizer = make(kind, tmp_path)
    find, texts = jax.jit(functools.partial(word_starts, word_tables(tokenizer))), spellings(tokenizer)
    joins = pieces = 0
    unknown = tokenizer.special("<unk>")
    for text in TEXTS:
        decoded = tokenizer.decode(tokenizer.encode(text))
        encoding = tokenizer.backend.encode(decoded, add_special_tokens=False)
        if not encoding.ids or unknown in encoding.ids:
            continue
        tokens = np.zeros((1, 256), np.int32)
        tokens[0, : len(encoding.ids)] = encoding.ids
        starts = np.asarray(find(tokens, np.ones_like(tokens)))[0, : len(encoding.ids)]
        offsets = encoding.offsets
        if texts[encoding.ids[0]] == b" " != decoded[:1].encode():
            offsets[0] = (0, 0)  # the space that the tokenizer puts before a text
        expected = joined_by_offsets(decoded, offsets)
        assert starts[0]
        assert [decoded, (~starts[1:]).tolist()] == [decoded, expected], encoding.tokens
        joins += sum(expected)
        pieces += sum(is_part(texts[i]) for i in encoding.ids)
    assert joins > 40
    assert pieces > 10 or kind == "word piece"


def is_part(spelled):
    try:
        spelled.decode()
    except UnicodeDecodeError:
        return True
    return False


@pytest.mark.parametrize("kind", ["byte", *text_cases.BACKENDS])
def test_spellings_add_up_to_the_text(kind, tmp_path):
    tokenizer = make(kind, tmp_path)
    texts = spellings(tokenizer)
    for text in TEXTS[:10]:
        ids = tokenizer.encode(text)
        if tokenizer.special("<unk>") not in ids:
            assert b"".join(texts[i] for i in ids).decode().strip() == tokenizer.decode(ids).strip()


def test_a_word_ends_with_its_document():
    tokenizer = make("byte")
    tokens = jnp.asarray(tokenizer.encode("abcdef"))[None]
    documents = jnp.asarray([[1, 1, 1, 2, 2, 2]])
    assert np.asarray(word_starts(word_tables(tokenizer), tokens, documents)).tolist() == [[1, 0, 0, 1, 0, 0]]


def test_special_tokens_are_not_ordinary():
    tokenizer = make("byte").with_tokens(["<|mask|>"])
    ordinary = ordinary_tokens(tokenizer)
    assert ordinary[:256].all()
    assert not ordinary[256:].any()
    assert spellings(tokenizer)[256:] == [b""] * 6
