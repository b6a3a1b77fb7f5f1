import dataclasses
import json
import multiprocessing
import os
import signal
import time

import numpy as np
import pytest

from research.errors import InputError
from research.sources.cache import cached
from research.sources.encoding import SAMPLES
from research.sources.entries import locate
from research.sources.store import open_store
from research.sources.tokenizers import Tokenizer, TokenizerSpec, make_tokenizer

BYTES = make_tokenizer(TokenizerSpec(), lambda: iter(()))


def write(path, records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return str(path)


def pairs(n):
    return [{"prompt": f"p{i}", "response": f"r{i}"} for i in range(n)]


def store(path, cache, tokenizer=BYTES, **kw):
    options = {"format": "auto", "fields": {}, "template": "chat", "on_bad_record": "error"} | kw
    return open_store(locate(path, count=100, seed=0), tokenizer, cache_dir=str(cache), **options)


@pytest.fixture
def no_tokenising(monkeypatch):
    def forbidden(self, texts):
        raise AssertionError("tokenised again")

    return lambda: monkeypatch.setattr(Tokenizer, "encode_batch", forbidden)


def test_what_is_stored(tmp_path):
    made = store(write(tmp_path / "a.jsonl", pairs(3000)), tmp_path / "cache")
    assert made.tokens.dtype == np.uint16
    assert len(made.length) == 3000
    assert made.length.sum() == len(made.tokens) == len(made.mask)
    end = int(made.length[:2001].sum())
    third = made.tokens[end - made.length[2000] : end]
    assert BYTES.decode(third, skip_special=False) == "<|bos|><|user|>p2000<|assistant|>r2000<|eos|>"
    assert (made.supervised[2000], made.bytes[2000]) == (6, 10)
    assert made.supervised.sum() == made.mask.sum()
    keys = [sample["key"] for sample in made.samples]
    assert keys == sorted(made.key.tolist())[:SAMPLES]


def test_a_second_run_does_not_tokenise(tmp_path, no_tokenising):
    path = write(tmp_path / "a.jsonl", pairs(5))
    first = store(path, tmp_path / "cache")
    no_tokenising()
    second = store(path, tmp_path / "cache")
    assert (first.was_cached, second.was_cached) == (False, True)
    assert second.tokens.tolist() == first.tokens.tolist()
    assert (second.samples, second.counts) == (first.samples, first.counts)
    for change in ({"template": "plain"}, {"on_bad_record": "skip"}, {"fields": {"text": "x"}}):
        with pytest.raises(AssertionError, match="tokenised again"):
            store(path, tmp_path / "cache", **change)
    write(tmp_path / "a.jsonl", pairs(6))
    with pytest.raises(AssertionError, match="tokenised again"):
        store(path, tmp_path / "cache")


def test_a_file_of_the_same_size_and_time_is_another(tmp_path):
    path = write(tmp_path / "a.jsonl", pairs(5))
    first, stat = store(path, tmp_path / "cache"), (tmp_path / "a.jsonl").stat()
    (tmp_path / "a.jsonl").write_text((tmp_path / "a.jsonl").read_text().replace("r1", "r9"))
    os.utime(tmp_path / "a.jsonl", ns=(stat.st_atime_ns, stat.st_mtime_ns))
    second = store(path, tmp_path / "cache")
    assert not second.was_cached
    assert second.tokens.tolist() != first.tokens.tolist()


def test_another_tokenizer_has_other_tokens(tmp_path):
    path = write(tmp_path / "a.jsonl", pairs(5))
    bpe = make_tokenizer(TokenizerSpec("bpe", 270), lambda: iter(["p1 r1"] * 9), cache_dir=str(tmp_path))
    assert store(path, tmp_path).tokens.tolist() != store(path, tmp_path, bpe).tokens.tolist()


def test_a_large_vocabulary_is_kept_in_four_bytes(tmp_path):
    large = dataclasses.replace(BYTES, size=70_000, eos=69_999)
    made = store(write(tmp_path / "a.jsonl", pairs(2)), tmp_path, large)
    assert made.tokens.dtype == np.uint32
    assert made.tokens[-1] == 69_999


@pytest.mark.parametrize("name", ["tokens.bin", "mask.bin", "examples.npy", "meta.json", "manifest.json"])
@pytest.mark.parametrize("damage", ["cut", "gone"])
def test_a_broken_cache_is_made_again(tmp_path, name, damage):
    path = write(tmp_path / "a.jsonl", pairs(50))
    want = store(path, tmp_path / "cache").tokens.tolist()
    (file,) = (tmp_path / "cache").rglob(name)
    if damage == "cut":
        os.truncate(file, file.stat().st_size // 2)
    else:
        file.unlink()
    again = store(path, tmp_path / "cache")
    assert not again.was_cached
    assert again.tokens.tolist() == want
    assert store(path, tmp_path / "cache").was_cached


def test_bad_records_are_named_or_counted(tmp_path):
    lines = ['{"text": "a"}', "{", '{"text": ""}', '{"text": 1}', '{"text": "b"}', '{"text": " "}']
    (tmp_path / "a.jsonl").write_text("\n".join(lines))
    path = str(tmp_path / "a.jsonl")
    with pytest.raises(InputError, match=r"a\.jsonl:2: invalid JSON .*on_bad_record='skip'"):
        store(path, tmp_path / "cache")
    assert not list((tmp_path / "cache" / "tokens").iterdir()), "nothing half-made is left"
    made = store(path, tmp_path / "cache", on_bad_record="skip")
    assert made.counts == {
        "records": 6,
        "duplicates": 0,
        "bad": {"invalid JSON": 1, "empty text": 2, "wrong type": 1},
        "markers": 0,
        "weights": 0,
        "marker": "",
    }
    assert made.bytes.tolist() == [1, 1]
    (tmp_path / "b.jsonl").write_text("{\n{\n")
    with pytest.raises(InputError, match=r"holds no usable record \(2 bad: invalid JSON\)"):
        store(str(tmp_path / "b.jsonl"), tmp_path / "cache", on_bad_record="skip")
    (tmp_path / "b.jsonl").write_text("")
    with pytest.raises(InputError, match="it is empty"):
        store(str(tmp_path / "b.jsonl"), tmp_path / "cache")


def test_duplicates_are_dropped_from_generated_records_only(tmp_path, monkeypatch):
    from research.sources import tasks

    monkeypatch.setattr(tasks, "records", lambda name, count, seed: iter(pairs(3) * 2))
    made = store("tasks:any", tmp_path)
    assert (len(made.length), made.counts["duplicates"]) == (3, 3)
    assert len(store(write(tmp_path / "a.jsonl", pairs(3) * 2), tmp_path).length) == 6


def _build_slowly(folder, started):
    def build(made):
        (made / "half").write_text("half")
        started.set()
        time.sleep(60)

    cached(folder, build)


def test_killed_while_making(tmp_path):
    context = multiprocessing.get_context("fork")
    started = context.Event()
    process = context.Process(target=_build_slowly, args=(tmp_path / "it", started))
    process.start()
    assert started.wait(30)
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    assert not (tmp_path / "it").exists()
    assert not cached(tmp_path / "it", lambda made: (made / "whole").write_text("whole") and None)
    assert (tmp_path / "it" / "whole").read_text() == "whole"
    (left,) = tmp_path.glob(".making-*")
    os.utime(left, (0, 0))
    cached(tmp_path / "other", lambda made: None)
    assert not left.exists(), "what a killed process left goes after a day"


def test_of_two_that_race_one_wins(tmp_path):
    def build(made):
        (made / "who").write_text("slow")
        cached(tmp_path / "it", lambda made: (made / "who").write_text("fast") and None)

    cached(tmp_path / "it", build)
    assert (tmp_path / "it" / "who").read_text() == "fast"
    assert not list(tmp_path.glob(".making-*"))
    assert cached(tmp_path / "it", build)


def test_a_place_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match=r"data.cache_dir: .*can't be written to"):
        store(write(tmp_path / "a.jsonl", pairs(1)), tmp_path / "file")
