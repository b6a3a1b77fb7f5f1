"""Prompts of a run's rows, with the records that they were made of."""

import json

import numpy as np
import pytest

from research.errors import InputError
from research.sources import dataset
from research.sources.prompts import make_prompts
from research.sources.spec import DataSpec
from research.sources.tokenizers import TokenizerSpec


def write(path, records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return str(path)


def load(tmp_path, path, **options):
    spec = DataSpec(path=path, seq_len=64, pack=False, keep_records=True, cache_dir=str(tmp_path / "cache"), **options)
    return dataset.load(spec, TokenizerSpec())


@pytest.mark.parametrize("shuffle", [False, True])
def test_a_prompt_is_what_a_record_asks(tmp_path, shuffle):
    a = write(tmp_path / "a.jsonl", [{"prompt": f"ask {i}", "response": "r" * i, "own": i} for i in range(1, 9)])
    turns = [{"role": role, "content": f"{role} {i}"} for i in range(2) for role in ("user", "assistant")]
    b = write(tmp_path / "b.jsonl", [{"messages": turns}])
    data = load(tmp_path, f"{a},{b}", shuffle=shuffle, eval_fraction=0.0)
    prompts = make_prompts(data.train, data.tokenizer, room=40, seed=3, shuffle=shuffle)
    source = dataset.make_source(data.train, batch_size=9, seed=3, shuffle=shuffle)
    batch, _ = source.next(source.init())
    read = prompts.read(0, 9)
    for row, prompt in enumerate(read):
        first = int(np.argmax(batch["loss_mask"][row]))
        np.testing.assert_array_equal(prompt.tokens, batch["tokens"][row, :first])
        assert prompt.text == prompt.record.get("prompt", "user 0")
        answer = "r" * prompt.record["own"] if "own" in prompt.record else "assistant 0"
        assert prompt.decode(batch["tokens"][row, first : first + len(answer) + 1].tolist()) == answer
    assert sorted(prompt.record.get("own", 0) for prompt in read) == list(range(9))
    assert prompts.longest == max(len(prompt.tokens) for prompt in read)
    assert [p.text for p in prompts.read(4, 3)] == [p.text for p in read[4:7]]


def test_prompts_that_leave_no_room_are_left_out(tmp_path):
    a = write(tmp_path / "a.jsonl", [{"prompt": "p" * n, "response": "r"} for n in (1, 20, 3)])
    data = load(tmp_path, a, shuffle=False, eval_fraction=0.0)
    prompts = make_prompts(data.train, data.tokenizer, room=10, seed=0, shuffle=False)
    assert prompts.left_out == 1
    assert [prompt.text for prompt in prompts.read(0, 3)] == ["p", "ppp", "p"]
    with pytest.raises(InputError, match=r"rollout\.max_new_tokens: leaves 2 tokens for a prompt, and no prompt"):
        make_prompts(data.train, data.tokenizer, room=2, seed=0, shuffle=False)


def test_what_has_no_prompts_or_no_records_is_refused(tmp_path):
    text = tmp_path / "a.txt"
    text.write_text("some text " * 30)
    data = load(tmp_path, str(text), eval_fraction=0.0)
    with pytest.raises(InputError, match="rewards: judge answers to prompts, and the data has plain texts"):
        make_prompts(data.train, data.tokenizer, room=10, seed=0, shuffle=False)
    a = write(tmp_path / "a.jsonl", [{"prompt": "p", "response": "r"}])
    with pytest.raises(InputError, match=r"data\.sources\.x\.view: shows other documents than the records"):
        load(tmp_path, "", sources={"x": {"path": a, "view": {"kind": "prompt"}}})
