"""Very long texts: cut before they are encoded, to the same tokens; lines that are longer still are refused by name."""

import json

import pytest

from research.errors import InputError
from research.sources import entries
from research.sources.tokenizers import making, tokenizer

WORDS = "the quick brown fox\njumps over 12 lazy dogs\n\n  and on: "


@pytest.fixture(scope="module")
def bpe():
    backend = making._train_bpe(iter([WORDS * 20]), 300)
    assert not backend.raw_bytes
    return backend


@pytest.mark.parametrize("text", [WORDS * 40, "ab " * 300, "é" * 500, "x\n" * 400, " \n" * 300, "a" + "\n" * 700 + "b"])
def test_parts_are_the_text_and_no_longer_than_they_may_be(text):
    parts = tokenizer.long_parts(text, 100)
    assert "".join(parts) == text
    assert all(0 < len(part) <= 100 for part in parts)


def test_a_text_in_parts_has_the_tokens_of_the_whole(bpe, monkeypatch):
    texts = [WORDS * 40, "short", "ab cd " * 100]
    whole = bpe.encode_batch(texts)
    monkeypatch.setattr(tokenizer, "_LONG", 100)
    assert bpe.encode_batch(texts) == whole


def test_a_space_before_a_text_comes_once(monkeypatch):
    import tokenizers

    backend = tokenizers.Tokenizer(tokenizers.models.BPE({"▁": 0, "a": 1, "b": 2, "<s>": 3}, []))
    backend.normalizer = tokenizers.normalizers.Sequence(
        [tokenizers.normalizers.Prepend("▁"), tokenizers.normalizers.Replace(" ", "▁")]
    )
    backend.add_special_tokens(["<s>"])
    own = tokenizer.assemble(backend, 3, None)
    whole = own.encode("ab ba" * 50)
    monkeypatch.setattr(tokenizer, "_LONG", 20)
    assert own.encode("ab ba" * 50) == whole
    assert whole[:3] == [0, 1, 2]


@pytest.mark.parametrize("name", ["x.jsonl", "x.txt"])
def test_a_line_that_is_too_long_is_named(tmp_path, monkeypatch, name):
    monkeypatch.setattr(entries, "LONGEST_LINE", 100)
    file = tmp_path / name
    file.write_text(json.dumps({"text": "a"}) + "\n" + json.dumps({"text": "a" * 100}) + "\n")
    with pytest.raises(InputError, match=rf"{name}:2: is longer than"):
        list(entries.locate(str(file), count=0, seed=0).read())


@pytest.mark.parametrize("name", ["x.json", "x.py"])
def test_a_file_that_is_too_large_to_be_read_as_a_whole_is_named(tmp_path, monkeypatch, name):
    monkeypatch.setattr(entries, "LARGEST_JSON", 100)
    file = tmp_path / name
    file.write_text(json.dumps([{"text": "a" * 100}]))
    with pytest.raises(InputError, match=rf"{name}: has 0 MiB"):
        list(entries.locate(str(file), count=0, seed=0).read())
