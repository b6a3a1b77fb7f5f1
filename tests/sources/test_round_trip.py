"""Decoding a record's tokens gives the text that went in: kinds of tokenizers, templates, and odd texts."""

import re
import unicodedata

import numpy as np
import pytest
from text_cases import BACKENDS, CHATML, INST, PARTS, TEXTS, make_folder

from research.sources.chat import render_parts
from research.sources.formats import encode
from research.sources.tokenizers import TokenizerSpec, load_pretrained, make_tokenizer

KINDS = ("byte", "bpe", *BACKENDS)


@pytest.fixture(scope="module")
def load(tmp_path_factory):
    """(kind, chat template or "") -> tokenizer"""
    folders = {}

    def load(kind, template=""):
        if kind not in folders:
            folders[kind] = tmp_path_factory.mktemp(kind.replace(" ", "_"))
            if kind in BACKENDS:
                make_folder(folders[kind], kind)
            else:
                spec = TokenizerSpec(kind, 400)
                make_tokenizer(spec, lambda: iter(TEXTS), cache_dir=str(folders[kind] / "cache")).save(folders[kind])
        (folders[kind] / "chat_template.jinja").unlink(missing_ok=True)
        if template:
            (folders[kind] / "chat_template.jinja").write_text(template)
        return load_pretrained(folders[kind])

    return load


def known(kind, tokenizer, text):
    """What of a text the tokenizer keeps: Qwen's composes characters; BERT's normaliser drops accents, case and control
    characters, and its decoder doesn't know where white space was."""
    if kind == "qwen":
        return unicodedata.normalize("NFC", text)
    if kind == "word piece":
        return "".join(tokenizer.backend.normalizer.normalize_str(text).split())
    return text


def conversations():
    """Two turns, and four, of the fuzz."""
    pairs = [[("user", a), ("assistant", b)] for a, b in zip(TEXTS[::2], TEXTS[1::2], strict=True)]
    return [*pairs, *([*a, *b] for a, b in zip(pairs[::2], pairs[1::2], strict=True))]


def decoded(tokenizer, examples, template, **kw):
    tokens, _, lengths = encode(examples, tokenizer, template)
    return [tokenizer.decode(ids, **kw) for ids in np.split(tokens, np.cumsum(lengths)[:-1])]


@pytest.mark.parametrize("kind", KINDS)
def test_documents_and_plain_conversations(load, kind):
    tokenizer = load(kind)
    for examples in ([[("text", text)] for text in TEXTS], conversations()):
        texts = decoded(tokenizer, examples, "plain")
        for turns, text in zip(examples, texts, strict=True):
            said = "".join(known(kind, tokenizer, text) for _, text in turns)
            if kind == "with prefix at first":  # Metaspace takes a text's own first space for the prefix
                said = said.removeprefix(" ")
            assert known(kind, tokenizer, text) == known(kind, tokenizer, said), turns


@pytest.mark.parametrize("kind", KINDS)
def test_our_own_chat_template(load, kind):
    tokenizer = load(kind)
    spelled = tokenizer.special("<|user|>") is None
    for turns, text in zip(conversations(), decoded(tokenizer, conversations(), "chat"), strict=True):
        said = "".join(f"<|{role}|>{known(kind, tokenizer, t)}" if spelled else t for role, t in turns)
        assert known(kind, tokenizer, text) == known(kind, tokenizer, said), turns


@pytest.mark.parametrize("template", [CHATML, INST, PARTS], ids=["chatml", "inst", "parts"])
@pytest.mark.parametrize("kind", KINDS)
def test_templates_of_models(load, kind, template):
    tokenizer = load(kind, template)
    texts = decoded(tokenizer, conversations(), "model", skip_special=False)
    for turns, text in zip(conversations(), texts, strict=True):
        parts = render_parts(tokenizer.chat, [{"role": role, "content": said} for role, said in turns])
        assert all(said in "".join(part.text for part in parts) for _, said in turns)
        said = "".join(known(kind, tokenizer, part.text) for part in parts)
        if kind == "with prefix":  # such a tokenizer, in transformers too, puts a space after each special token
            text, said = (re.sub("(</s>|<.im_start.>) ", r"\1", each) for each in (text, said))
        assert known(kind, tokenizer, text) == said, turns
