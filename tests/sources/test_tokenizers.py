import json
import subprocess
import sys

import numpy as np
import pytest
import tokenizers as hf

from research.errors import InputError
from research.sources.tokenizers import TokenizerSpec, load_pretrained, load_tokenizer, make_tokenizer

TEXTS = [
    "the cat sat on the mat, the cat sat",
    "naïve café ☕ — 1234 + 5678",
    "tabs\tand\nnew lines\r\n\n  indented",
] * 5
TRICKY = ["", " ", "日本語 ünïcödé 🎉🏽", "<|eos|> and <|user|> are text here", "a\x00b", "  12 345\n\n\tx's"]


def make(kind, **kw):
    return make_tokenizer(TokenizerSpec(kind, **kw), lambda: iter(TEXTS))


@pytest.fixture(params=["byte", "bpe"])
def tokenizer(request):
    return make(request.param, vocab_size=300)


def test_round_trip_and_bytes(tokenizer):
    sizes = tokenizer.token_bytes()
    assert sizes.shape == (tokenizer.size,)
    assert sizes.dtype == np.int32
    for text, ids in zip(TRICKY, tokenizer.encode_batch(TRICKY), strict=True):
        assert tokenizer.decode(ids) == text
        assert tokenizer.encode(text) == ids
        assert sizes[ids].sum() == len(text.encode())


def test_special_tokens_come_from_no_text(tokenizer):
    specials = [tokenizer.special(f"<|{name}|>") for name in ("bos", "eos", "system", "user", "assistant")]
    assert len(set(specials)) == 5
    assert None not in specials
    assert (tokenizer.bos, tokenizer.eos) == tuple(specials[:2])
    assert not set(specials) & set(tokenizer.encode("<|bos|><|eos|><|user|>"))
    assert tokenizer.special("<|users|>") is None
    assert tokenizer.special("a") is None
    assert (tokenizer.token_bytes()[specials] == 0).all()
    assert tokenizer.decode([tokenizer.bos, *tokenizer.encode("hi"), tokenizer.eos]) == "hi"
    assert tokenizer.decode([tokenizer.eos], skip_special=False) == "<|eos|>"


def test_save_and_load_change_nothing(tokenizer, tmp_path):
    tokenizer.save(tmp_path)
    tokenizer.save(tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["tokenizer.json", "tokenizer_config.json"]
    loaded = load_tokenizer(tmp_path)
    assert loaded.fingerprint() == tokenizer.fingerprint()
    assert loaded.encode_batch(TRICKY) == tokenizer.encode_batch(TRICKY)
    assert (loaded.size, loaded.eos, loaded.bos, loaded.raw_bytes) == (
        tokenizer.size,
        tokenizer.eos,
        tokenizer.bos,
        tokenizer.raw_bytes,
    )


def test_byte_ids_are_the_bytes():
    tokenizer = make("byte")
    assert tokenizer.size == 261
    assert tokenizer.encode("é\n") == [0xC3, 0xA9, 0x0A]
    assert tokenizer.decode([0x41, 0xC3, 0x42, 0xFF]) == "A�B�"


def test_bpe_merges_words_and_keeps_digits_apart():
    tokenizer = make("bpe", vocab_size=300)
    assert tokenizer.size <= 300
    assert len(tokenizer.encode("the cat sat")) < 8
    assert len(tokenizer.encode("1234")) == 4


def test_bpe_is_the_same_in_every_process(tmp_path):
    code = (
        "import sys; from research.sources.tokenizers import TokenizerSpec, make_tokenizer\n"
        "texts = ['the cat sat on a mat ' * 9, 'dogs bark at cats']\n"
        "print(make_tokenizer(TokenizerSpec('bpe', 290), lambda: iter(texts), cache_dir=sys.argv[1]).fingerprint())"
    )
    prints = {
        subprocess.run([sys.executable, "-c", code, tmp_path / name], capture_output=True, check=True).stdout
        for name in ("a", "b")
    }
    assert len(prints) == 1


def test_bpe_is_trained_once(tmp_path):
    spec = TokenizerSpec("bpe", 290)
    first = make_tokenizer(spec, lambda: iter(TEXTS), texts_id="x", cache_dir=str(tmp_path))

    def gone():
        raise AssertionError("trained again")

    assert make_tokenizer(spec, gone, texts_id="x", cache_dir=str(tmp_path)).fingerprint() == first.fingerprint()


def word_level(tmp_path, tokens, post=None, config=None):
    backend = hf.Tokenizer(hf.models.WordLevel({t: i for i, t in enumerate(["[UNK]", "a", "b", *tokens])}, "[UNK]"))
    backend.pre_tokenizer = hf.pre_tokenizers.Whitespace()
    backend.add_special_tokens(list(tokens))
    if post:
        backend.post_processor = hf.processors.TemplateProcessing(
            single=post, special_tokens=[(t, backend.token_to_id(t)) for t in tokens]
        )
    backend.enable_truncation(2)
    backend.save(str(tmp_path / "tokenizer.json"))
    if config is not None:
        (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    return str(tmp_path)


def test_file_with_config_beside_it(tmp_path):
    config = {"eos_token": {"content": "<b>"}, "bos_token": "<a>", "add_bos_token": True}
    tokenizer = make(word_level(tmp_path, ["<a>", "<b>"], config=config))
    assert (tokenizer.bos, tokenizer.eos) == (3, 4)
    assert tokenizer.encode("a b a b") == [1, 2, 1, 2], "the file's own truncation must not apply"


def test_bos_is_what_the_tokenizer_itself_adds(tmp_path):
    config = {"eos_token": "</s>", "bos_token": "<s>"}
    (tmp_path / "x").mkdir()
    (tmp_path / "y").mkdir()
    assert make(word_level(tmp_path / "x", ["<s>", "</s>"], post="<s> $A", config=config)).bos == 3
    assert make(word_level(tmp_path / "y", ["<s>", "</s>"], post="$A </s>", config=config)).bos is None


def test_eos_by_option_or_well_known_name(tmp_path):
    path = word_level(tmp_path, ["</s>", "<x>"])
    assert make(path).eos == 3
    assert make(path, eos_token="<x>").eos == 4
    assert make(path + "/tokenizer.json").eos == 3


@pytest.mark.parametrize(
    ("tokens", "kw", "message"),
    [
        (["<x>"], {}, "no well-known one. Set tokenizer.eos_token"),
        (["</s>", "<|im_end|>"], {}, "several tokens that could be: </s>, <|im_end|>"),
        (["</s>"], {"eos_token": "<s>"}, "'<s>' is not in the vocabulary"),
    ],
)
def test_unknown_eos(tmp_path, tokens, kw, message):
    with pytest.raises(InputError) as e:
        make(word_level(tmp_path, tokens), **kw)
    assert message in str(e.value)


def test_bad_specs(tmp_path):
    with pytest.raises(InputError, match=r"tokenizer.kind: 'bite'.*Did you mean 'byte'\?"):
        make("bite")
    with pytest.raises(InputError, match=r"tokenizer.vocab_size: 100.*at least 261"):
        make("bpe", vocab_size=100)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(InputError, match=r"can't be read as a tokenizer\.json"):
        make(str(tmp_path))


def test_without_transformers_the_error_says_what_to_install(tmp_path, monkeypatch):
    (tmp_path / "vocab.json").write_text("{}")
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(InputError, match=r"has no tokenizer.json.*pip install -e '\.\[convert\]'"):
        load_pretrained(tmp_path)


def test_files_of_older_models(tmp_path):
    folder = tmp_path / "old"
    folder.mkdir()
    alphabet = sorted(hf.pre_tokenizers.ByteLevel.alphabet())
    vocab = {token: i for i, token in enumerate([*alphabet, "he", "Ġhe", "<|endoftext|>"])}
    (folder / "vocab.json").write_text(json.dumps(vocab))
    (folder / "merges.txt").write_text("#version: 0.2\nh e\nĠ he\n")
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "GPT2Tokenizer"}))
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": 258}))
    tokenizer = load_pretrained(folder)
    assert tokenizer.encode("he he") == [256, 257]
    assert (tokenizer.eos, tokenizer.bos, tokenizer.stop, tokenizer.size) == (258, None, (258,), 259)
    tokenizer.save(tmp_path / "new")
    assert load_pretrained(tmp_path / "new").fingerprint() == tokenizer.fingerprint()
    (folder / "merges.txt").unlink()
    (folder / "vocab.json").write_text("no JSON")
    with pytest.raises(InputError, match="transformers can't read the tokenizer in"):
        load_pretrained(folder)


def test_code_that_comes_with_a_tokenizer_is_neither_run_nor_kept(tmp_path):
    config = {"eos_token": "</s>", "tokenizer_class": "Evil", "auto_map": {"AutoTokenizer": [None, "evil.Evil"]}}
    path = word_level(tmp_path, ["</s>"], config=config)
    (tmp_path / "evil.py").write_text("raise SystemExit('ran')")
    make(path).save(tmp_path / "saved")
    assert sorted(p.name for p in (tmp_path / "saved").iterdir()) == ["tokenizer.json", "tokenizer_config.json"]
    saved = json.loads((tmp_path / "saved" / "tokenizer_config.json").read_text())
    assert saved == {"eos_token": "</s>", "tokenizer_class": "PreTrainedTokenizerFast"}


def test_ids_that_end_an_answer(tmp_path):
    path = word_level(tmp_path, ["</s>", "<end>"])
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [4, 3]}))
    assert make(path, eos_token="</s>").stop == (3, 4)
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": 99}))
    with pytest.raises(InputError, match=r"generation_config.json: eos_token_id = \[99\], but the tokenizer has no 99"):
        make(path, eos_token="</s>")
