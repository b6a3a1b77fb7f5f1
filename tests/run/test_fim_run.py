"""A run that learns to fill in the middle of one source's texts, and what is done with its model."""

import json

import pytest

from research import config
from research.commands import generate
from research.run.run import run
from research.sources.special_tokens import fim_tokens
from research.sources.tokenizers import load_tokenizer

GAPS = [{"prefix": "<<", "middle": "a" * i, "suffix": ">>"} for i in range(1, 4)]


def values(tmp_path, gaps):
    return {
        "steps": 12,
        "batch_size": 8,
        "seq_len": 64,
        "model": {"num_layers": 1, "d_model": 16, "num_heads": 2, "num_kv_heads": 1, "d_ff": 16, "max_length": 64},
        "data": {
            "path": "",
            "sources": {
                "holes": {"path": str(tmp_path / "a.jsonl"), "view": {"kind": "fim", "rate": 1.0, "split": "token"}},
                "whole": {"path": str(tmp_path / "b.jsonl")},
            },
            "cache_dir": str(tmp_path / "cache"),
        },
        "objective": {"terms": {"next_token": 1.0}},
        "checkpoint": {"every": 12},
        "eval": {"every": 12, "tasks": (f"infill,max_new_tokens=8,name=gaps:{gaps}",)},
        "log": {"tensorboard": False},
    }


@pytest.mark.slow
@pytest.mark.usefixtures("one_device")
def test_a_run_with_fim_is_measured_and_fills_in(tmp_path, capsys):
    for name in ("a", "b"):
        texts = [{"text": f"<<{name * (i % 9 + 1)}{i}>>"} for i in range(40)]
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(text) + "\n" for text in texts))
    gaps = tmp_path / "gaps.jsonl"
    gaps.write_text("".join(json.dumps(gap) + "\n" for gap in GAPS))
    workdir = tmp_path / "w"
    run(config.parse(values(tmp_path, gaps)), str(workdir))

    assert fim_tokens(load_tokenizer(workdir)) == (261, 262, 263, None)  # added by the view, saved with the run
    metrics = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    assert any("eval/gaps/exact_match" in line for line in metrics)
    assert "infill: form spm, as in training (of the texts spm 50%, psm 50%)" in capsys.readouterr().err

    assert json.loads((workdir / "config.json").read_text())["plain_texts"]
    assert generate.main([f"--model={workdir}", "--prompt=<<", "--max_new_tokens=2"]) == 0
    assert "template plain, as in training (--template names another)" in capsys.readouterr().err

    flags = ["--prefix=<<", "--suffix=>>", "--max_new_tokens=8"]
    assert generate.main([f"--model={workdir}", *flags]) == 0
    assert capsys.readouterr().out.endswith("\n")
    assert generate.main([f"--model={workdir}", *flags, "--form=sentinel"]) == 2
    assert "form = sentinel: the tokenizer has no <|mask:0|> <|mask:1|>" in capsys.readouterr().err
