"""understudy cache: what is there, what is pruned, and what is left alone."""

import os
import time

import pytest

from research import cli
from research.errors import InputError
from research.sources import cache, cache_entries, entries, store
from research.sources.tokenizers import making


@pytest.fixture
def root(tmp_path, monkeypatch):
    """A cache with tokens of one file, a tokenizer, a compiled program, and things that aren't ours."""
    root = tmp_path / "cache"
    monkeypatch.setenv("UNDERSTUDY_CACHE", str(root))
    tokenizer = making.make_tokenizer(making.TokenizerSpec("bpe", 300), lambda: iter(["hello world hello"]))
    (tmp_path / "a\x1b[2J.jsonl").write_text('{"text": "hello"}\n')
    open_tokens(tmp_path, tokenizer)
    (root / "xla").mkdir()
    for name in ("jit_step-0123abcd-cache", "jit_step-0123abcd-atime", "notes.txt"):
        (root / "xla" / name).write_bytes(b"x" * 1000)
    (root / "tokens/mine").mkdir()
    return root


def open_tokens(folder, tokenizer):
    origin = entries.locate(str(folder / "a\x1b[2J.jsonl"), count=0, seed=0)
    kinds = {"format": "auto", "fields": {}, "template": "auto", "on_bad_record": "error"}
    return store.open_store(origin, tokenizer, **kinds)


def age(root, days):
    for path in root.rglob("*"):
        os.utime(path, (time.time() - days * 86400,) * 2)


def test_a_cache_is_shown_and_what_nobody_used_is_pruned(root, tmp_path, capsys):
    assert cli.main(["cache"]) == 0
    out = capsys.readouterr().out
    assert "tokens: 1 entries" in out
    assert "tokenizers: 1 entries" in out
    assert "xla: 1 entries" in out
    assert "\x1b" not in out
    assert r"a\x1b[2J.jsonl" in out

    age(root, 10)
    assert cli.main(["cache", "--prune", "--days=11"]) == 0
    assert len(cache_entries.read_entries(root)) == 3
    tokenizer = making.make_tokenizer(making.TokenizerSpec("byte"), lambda: iter(()))
    assert not open_tokens(tmp_path, tokenizer).was_cached  # of another tokenizer: another entry
    assert open_tokens(tmp_path, tokenizer).was_cached
    assert cli.main(["cache", "--prune", "--days=5", "--kind=tokens"]) == 0
    assert "tokens: 2 entries, 1 removed" in capsys.readouterr().out
    assert open_tokens(tmp_path, tokenizer).was_cached
    assert cli.main(["cache", "--prune", "--days=5"]) == 0
    assert [entry.kind for entry in cache_entries.read_entries(root)] == ["tokens"]
    assert (root / "xla/notes.txt").exists()
    assert (root / "tokens/mine").exists()


def test_use_counts_not_age(root):
    (entry,) = cache_entries.read_entries(root, ["tokens"])
    age(root, 10)
    assert cache_entries.unused(cache_entries.read_entries(root, ["tokens"]), 5)
    assert cache.cached(entry.paths[0], lambda partial: None)
    assert not cache_entries.unused(cache_entries.read_entries(root, ["tokens"]), 5)


def test_an_empty_cache_and_wrong_flags(tmp_path, capsys):
    assert cli.main(["cache", f"--cache_dir={tmp_path}/none"]) == 0
    assert not (tmp_path / "none").exists()
    assert cli.main(["cache", "--days=3"]) == 2
    assert cli.main(["cache", "--prune", "--days=-1"]) == 2
    assert cli.main(["cache", "--kind=tokenz"]) == 2
    assert "Did you mean 'tokens'?" in capsys.readouterr().err


def test_what_is_damaged_is_named_removed_and_made_anew(root, tmp_path, capsys):
    tokenizer = making.make_tokenizer(making.TokenizerSpec("bpe", 300), lambda: iter(["hello world hello"]))
    made = open_tokens(tmp_path, tokenizer)
    expected = made.tokens[:].tolist()

    def flip(name):
        data = bytearray((made.folder / name).read_bytes())
        data[len(data) // 2] ^= 1
        (made.folder / name).write_bytes(data)

    for name in ("meta.json", "examples.npy", "manifest.json"):  # checked whole as a run begins
        flip(name)
        again = open_tokens(tmp_path, tokenizer)
        assert not again.was_cached, name
        assert again.tokens[:].tolist() == expected
    flip("tokens.bin")  # and this as it is read
    with pytest.raises(InputError, match=r"tokens.bin: has other bytes .* the same command makes it anew"):
        open_tokens(tmp_path, tokenizer).tokens[0]
    assert not open_tokens(tmp_path, tokenizer).was_cached
    assert cli.main(["cache", "--verify"]) == 0
    assert "tokens: 1 entries, 0 removed" in capsys.readouterr().out
    flip("tokens.bin")
    assert cli.main(["cache", "--verify"]) == 0
    out = capsys.readouterr().out
    assert "damaged: tokens.bin has other bytes" in out
    assert "tokens: 1 entries, 1 removed" in out
    assert not made.folder.exists()
    assert open_tokens(tmp_path, tokenizer).tokens[:].tolist() == expected
