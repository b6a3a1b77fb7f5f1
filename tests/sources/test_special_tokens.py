import json

import numpy as np
import pytest
import tokenizers as hf

from research.errors import InputError
from research.sources import special_tokens
from research.sources.tokenizers import TokenizerSpec, load_pretrained, load_tokenizer, make_tokenizer

TEXTS = ["the cat sat on the mat, the cat sat", "naïve café — 1234"] * 5


def make(kind="byte"):
    return make_tokenizer(TokenizerSpec(kind, 280), lambda: iter(TEXTS))


def folder(path, vocabulary, added=(), config=None, files=None):
    """A tokenizer of a model: `vocabulary` maps words to ids, `added` are (name, whether it is special)."""
    backend = hf.Tokenizer(hf.models.WordLevel(vocabulary, "[UNK]"))
    backend.pre_tokenizer = hf.pre_tokenizers.WhitespaceSplit()
    for name, special in added:
        (backend.add_special_tokens if special else backend.add_tokens)([hf.AddedToken(name, special=special)])
    backend.save(str(path / "tokenizer.json"))
    (path / "tokenizer_config.json").write_text(json.dumps({"eos_token": "</s>", **(config or {})}))
    for name, content in (files or {}).items():
        (path / name).write_text(json.dumps(content))
    return load_pretrained(path)


WORDS = {"[UNK]": 0, "a": 1, "b": 2, "</s>": 3}


@pytest.mark.parametrize("kind", ["byte", "bpe"])
def test_added_tokens_come_last_and_from_no_text(kind, tmp_path):
    before = make(kind)
    as_it_was, ids = before.backend.to_str(), before.encode_batch(TEXTS)
    after = before.with_tokens(["<|mask|>", "<|tool|>", "<|mask|>"])
    assert [after.special(name) for name in ("<|mask|>", "<|tool|>")] == [before.size, before.size + 1]
    assert (after.size, after.eos, after.bos, after.stop) == (before.size + 2, before.eos, before.bos, before.stop)
    assert after.raw_bytes == before.raw_bytes == (kind == "byte")
    assert after.encode_batch(TEXTS) == ids
    assert not set(after.encode("<|mask|> <|tool|>")) & {before.size, before.size + 1}
    assert after.decode([*after.encode("hi"), after.special("<|tool|>")]) == "hi"
    assert (after.token_bytes()[-2:] == 0).all()
    assert np.array_equal(after.token_bytes()[:-2], before.token_bytes())
    assert (before.backend.to_str(), before.special("<|mask|>")) == (as_it_was, None)
    assert after.fingerprint() != before.fingerprint()
    assert after.with_tokens(["<|tool|>"]) is after
    after.save(tmp_path)
    loaded = load_tokenizer(tmp_path)
    assert (loaded.fingerprint(), loaded.size, loaded.raw_bytes) == (after.fingerprint(), after.size, after.raw_bytes)


def test_a_stretch_of_a_template_may_hold_an_added_token():
    tokenizer = make().with_tokens(["<|tool|>"])
    assert tokenizer.encode_stretches(["x<|tool|>"], special=True, first=True) == [[120, tokenizer.size - 1]]


def test_an_ordinary_token_becomes_special(tmp_path):
    """Qwen's <|fim_prefix|> is an added token that isn't special, so that text which speaks of it would become it."""
    added = [("<|fim_prefix|>", False), ("<|fim_suffix|>", False), ("<|fim_middle|>", False)]
    decoder = {str(4 + i): {"content": name, "special": False} for i, (name, _) in enumerate(added)}
    tokenizer = folder(tmp_path, WORDS, added, {"added_tokens_decoder": decoder, "add_bos_token": False})
    assert tokenizer.encode("a <|fim_prefix|>") == [1, 4]
    after = tokenizer.with_tokens(special_tokens.fim_names(tokenizer))
    assert special_tokens.fim_tokens(after) == special_tokens.fim_tokens(tokenizer) == (4, 5, 6, None)
    assert after.size == tokenizer.size
    assert after.encode("a <|fim_prefix|>") == [1, 0]
    told = json.loads(after.files["tokenizer_config.json"])["added_tokens_decoder"]
    assert {i: each["special"] for i, each in told.items()} == {"4": True, "5": True, "6": True}


def test_what_lies_beside_a_tokenizer_speaks_of_added_tokens(tmp_path):
    files = {"added_tokens.json": {"</s>": 3}, "special_tokens_map.json": {"eos_token": "</s>"}}
    after = folder(tmp_path, WORDS, [("</s>", True)], files=files).with_tokens(["</s>", "<|mask|>", "<|tool|>"])
    assert json.loads(after.files["added_tokens.json"]) == {"</s>": 3, "<|mask|>": 4, "<|tool|>": 5}
    assert json.loads(after.files["tokenizer_config.json"])["mask_token"] == "<|mask|>"
    assert json.loads(after.files["tokenizer_config.json"])["additional_special_tokens"] == ["<|tool|>"]
    assert after.variables["mask_token"] == "<|mask|>"
    more = folder(tmp_path, WORDS, config={"extra_special_tokens": ["a"]}).with_tokens(["<|tool|>"])
    assert json.loads(more.files["tokenizer_config.json"])["extra_special_tokens"] == ["a", "<|tool|>"]
    assert "additional_special_tokens" not in json.loads(more.files["tokenizer_config.json"])


def test_tokens_that_cannot_be_added(tmp_path):
    with pytest.raises(InputError, match=r"tokenizer.added_tokens: '  ' can't be a token's name"):
        make().with_tokens(["<|a|>", "  "])
    tokenizer = folder(tmp_path, {**WORDS, "far": 9})
    with pytest.raises(InputError, match=r"<\|a\|> can't be added: the vocabulary .* has unused ids below 10"):
        tokenizer.with_tokens(["<|a|>"])


@pytest.mark.parametrize(
    ("names", "ends"),
    [
        (("<|fim_prefix|>", "<|fim_suffix|>", "<|fim_middle|>"), None),
        (("<fim_prefix>", "<fim_suffix>", "<fim_middle>"), None),
        (("<fim-prefix>", "<fim-suffix>", "<fim-middle>"), None),
        (("▁<PRE>", "▁<SUF>", "▁<MID>", "▁<EOT>"), 7),
        (("<｜fim▁begin｜>", "<｜fim▁hole｜>", "<｜fim▁end｜>"), None),
    ],
)
def test_fim_tokens_of_families(names, ends, tmp_path):
    tokenizer = folder(tmp_path, WORDS, [(name, True) for name in names])
    assert special_tokens.fim_names(tokenizer) == names
    assert special_tokens.fim_tokens(tokenizer) == (4, 5, 6, ends)


@pytest.mark.parametrize("name", ["[MASK]", "<mask>"])
def test_mask_token_of_families(name, tmp_path):
    assert special_tokens.mask_token(folder(tmp_path, WORDS, [(name, True)])) == 4


def test_a_config_names_the_mask_token(tmp_path):
    tokenizer = folder(tmp_path, WORDS, [("[MASK]", True), ("<hole>", True)], {"mask_token": {"content": "<hole>"}})
    assert special_tokens.mask_token(tokenizer) == 5


def test_sentinels_are_in_the_order_of_their_numbers(tmp_path):
    """T5 keeps <extra_id_0> at its greatest id."""
    tokenizer = folder(tmp_path, WORDS, [(f"<extra_id_{i}>", True) for i in (3, 2, 1, 0)])
    assert special_tokens.sentinels(tokenizer, 4) == [7, 6, 5, 4]
    with pytest.raises(InputError, match=r"has 4 of the 6 sentinels .*: no <extra_id_4> to <extra_id_5>"):
        special_tokens.sentinels(tokenizer, 6)
    more = tokenizer.with_tokens(special_tokens.sentinel_names(tokenizer, 6))
    assert special_tokens.sentinels(more, 6) == [7, 6, 5, 4, 8, 9]


def test_names_to_add_where_a_tokenizer_has_none():
    tokenizer = make()
    with pytest.raises(InputError, match=r"has 0 of the 1 mask tokens .*<\|mask\|>.*added_tokens"):
        special_tokens.mask_token(tokenizer)
    names = [
        *special_tokens.mask_names(tokenizer),
        *special_tokens.sentinel_names(tokenizer, 2),
        *special_tokens.fim_names(tokenizer),
        *special_tokens.mode_names(tokenizer),
    ]
    after = tokenizer.with_tokens(names)
    ids = [special_tokens.mask_token(after), *special_tokens.sentinels(after, 2)]
    ids += [*special_tokens.fim_tokens(after)[:3], *special_tokens.mode_tokens(after)]
    assert ids == list(range(261, 270))
