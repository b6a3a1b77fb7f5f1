"""Runs whose data is streamed."""

import json

import pytest
from runs import assert_same, load

from research.errors import InputError
from research.run import metrics, run


def config_of(path, **overrides):
    options = {
        "data.path": str(path),
        "data.streaming": True,
        "data.buffer": 16,
        "data.eval_records": 5,
        "data.max_records": 0,
        "tokenizer.kind": "byte",
        "batch_size": 8,
        "steps": 6,
        "checkpoint.every": 0,
        "log.every": 1,
        "optimizer.schedule": "constant",
        "optimizer.warmup_steps": 0,
        "eval.every": 50,
    }
    return load("pretrain", **options | overrides)


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    path = tmp_path_factory.mktemp("data") / "a.jsonl"
    path.write_text("".join(json.dumps({"text": f"text {i} " * (1 + i % 9)}) + "\n" for i in range(900)))
    return path


@pytest.mark.slow
@pytest.mark.usefixtures("one_device")
def test_a_resumed_run_has_the_same_bits_and_a_bad_record_loses_nothing(path, tmp_path):
    run.run(config_of(path), str(tmp_path / "whole"))
    run.run(config_of(path, steps=3), str(tmp_path / "w"))
    run.run(config_of(path), str(tmp_path / "w"))
    assert_same(str(tmp_path / "whole"), str(tmp_path / "w"))
    read = [
        record["train/records"] for record in metrics.read_metrics(str(tmp_path / "w")) if "train/records" in record
    ]
    assert read == sorted(read)
    assert read[-1] > 0
    log = (tmp_path / "w/log.txt").read_text()
    assert "streamed, of which the first" in log

    lines = path.read_text().splitlines()
    lines[at := 450] = '{"text": 5}'
    broken = tmp_path / "broken.jsonl"
    broken.write_text("\n".join(lines) + "\n")
    with pytest.raises(InputError, match=rf"broken\.jsonl:{at + 1}: "):
        run.run(config_of(broken, steps=30), str(tmp_path / "b"))
    final = run.run(config_of(broken, **{"steps": 30, "data.on_bad_record": "skip"}), str(tmp_path / "b"))
    assert final["train/records_skipped"] == 1
    assert "resumed  at step" in (tmp_path / "b/log.txt").read_text()


def test_epochs_and_nothing_held_out_are_refused(path, tmp_path):
    with pytest.raises(InputError, match=r"epochs = 2.*how many rows a stream has isn't known"):
        run.run(config_of(path, epochs=2.0), str(tmp_path / "w"))
    with pytest.raises(InputError, match=r"eval.every = \d+: nothing of a stream is held out .* data.eval_records"):
        run.run(config_of(path, **{"data.eval_records": 0}), str(tmp_path / "w"))
    assert not (tmp_path / "w").exists()
