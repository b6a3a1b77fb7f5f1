"""The data of an experiment as people see it before training."""

import dataclasses
import json

import numpy as np
import pytest

from research import cli, config
from research.commands import preview
from research.run import preview as run_preview
from research.sources import shown
from research.sources.tokenizers import TokenizerSpec, make_tokenizer
from research.studies import data_section

TOKENIZER = make_tokenizer(TokenizerSpec("byte"), lambda: iter(()))


def previewed(path, rows=1, **fields):
    data = {"path": str(path), "eval_fraction": 0.2, **fields.pop("data", {})}
    values = {"batch_size": 8, "seq_len": 64, "tokenizer": {"kind": "byte"}, "eval": {"every": 0}, "data": data}
    return run_preview.preview(config.parse(values | fields), rows=rows)


def write(path, records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def test_prompts_answers_and_ends_are_told_apart(tmp_path, capsys):
    pairs = [{"prompt": f"ask {i}", "response": f"say\n{i}"} for i in range(12)]
    path = write(tmp_path / "a.jsonl", [*pairs, {"prompt": "long " * 20, "response": "x"}])
    flags = [f"--config.data.path={path}", "--config.seq_len=64", "--config.batch_size=8", "--config.eval.generate=0"]
    assert cli.main(["preview", "--config=experiments/sft.py", *flags, "--rows=2"]) == 0
    out = capsys.readouterr().out
    assert out.startswith("── step 1: 2 of 8 rows of 64 tokens\n── row 1, document 1: ")
    assert "<|user|>ask " in out
    assert "<|assistant|>⟦say\n" in out
    assert "<|eos|>⟧\n" in out
    assert "· " in out
    assert "1 (7.7%, dropped)" in out
    assert "400 steps are " in out


def test_colours_are_of_a_terminal_alone(tmp_path):
    path = write(tmp_path / "a.jsonl", [{"prompt": f"ask {i}", "response": f"say {i}"} for i in range(12)])
    seen = previewed(path, objective={"terms": {"sft": 1.0}})
    assert any("\x1b[32msay" in line and "\x1b[2mask" in line for line in preview.lines(seen, color=True, whole=False))
    assert not any("\x1b" in line for line in preview.lines(seen, color=False, whole=False))


def test_of_texts_all_but_the_first_token_is_learned(tmp_path):
    path = write(tmp_path / "a.jsonl", [{"text": f"{i} words " * 20} for i in range(12)])
    seen = previewed(path)
    for document in seen.rows[0].documents:
        assert document.learned == document.tokens - 1
    assert seen.lengths[0]["fate"] == "cut into pieces"
    assert seen.lengths[0]["over"] == 12


def test_answers_that_are_compared_say_which_they_are(tmp_path):
    path = write(tmp_path / "a.jsonl", [{"prompt": f"p{i}", "chosen": "good", "rejected": "bad"} for i in range(12)])
    seen = previewed(path, objective={"terms": {"reward": 1.0}}, model={"num_labels": 1})
    page = data_section.section("Data", json.loads(json.dumps(dataclasses.asdict(seen))))
    assert '<span class="learned">good</span>' in page
    assert "pair 1: chosen" in page
    assert '<span class="read special">&lt;|bos|&gt;&lt;|user|&gt;</span>' in page
    chosen, rejected = seen.rows[0].documents[:2]
    assert (chosen.notes, rejected.notes) == (("pair 1: chosen",), ("pair 1: rejected",))
    assert "".join(span.text for span in chosen.spans if span.learned and not span.special) == "good"


def test_virtual_tokens_and_hidden_ones():
    text = list(b"abcd")
    tokens = np.array([[300, 301, *text, 0]], np.int32)
    batch = {
        "tokens": tokens,
        "segment_ids": np.array([[1, 1, 1, 1, 1, 1, 0]], np.int32),
        "positions": np.arange(7, dtype=np.int32)[None],
        "label_probs": np.zeros((1, 7, 3), np.float32),
    }
    batch["label_probs"][0, 5] = [0.5, 0.5, 0]
    learned = np.array([[0, 0, 0, 1, 1, 0, 0]], bool)
    read = np.where(tokens == ord("c"), ord("x"), tokens)
    (row,) = shown.rows(batch, learned, TOKENIZER, read=read)
    (document,) = row.documents
    assert [(span.text, span.hidden, span.special) for span in document.spans] == [
        ("<2 virtual>", "", True),
        ("a", "", False),
        ("b", "", False),
        ("x", "c", False),
        ("d", "", False),
    ]
    assert document.notes == ("classes 0.50 0.50 0.00",)
    assert row.padding == 1


@pytest.mark.slow
def test_masked_tokens_are_shown_with_what_they_are(tmp_path):
    path = write(tmp_path / "a.jsonl", [{"text": f"{i} words " * 20} for i in range(12)])
    terms = {"terms": {"masked": {"share": 0.5, "mask": 1.0, "random": 0.0}}}
    seen = previewed(path, objective=terms, model={"causal": False})
    hidden = [span for document in seen.rows[0].documents for span in document.spans if span.hidden]
    assert hidden
    assert all(set(span.text) <= set("<|mask|>") for span in hidden)


def test_what_cannot_be_a_run_is_said(capsys):
    assert cli.main(["preview", "--config=experiments/sft.py", "--config.data.path=no.jsonl"]) == 2
    assert "error: data.path: there is no 'no.jsonl'" in capsys.readouterr().err
