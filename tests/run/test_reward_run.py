"""Runs that train a reward model, and what comes after them."""

import json

import jax
import numpy as np
import pytest
import runs

from research.commands import export, score
from research.errors import InputError
from research.run import metrics
from research.run.run import run

pytestmark = pytest.mark.slow

MODEL = {"num_layers": 1, "d_model": 16, "num_heads": 2, "num_kv_heads": 2, "d_ff": 16, "num_labels": 1}


def config_of(name="", **fields):
    return runs.small(
        **{
            "model": MODEL,
            "seq_len": 128,
            "data": {"path": "preferences:reverse/0.1", "examples": 60, "eval_fraction": 0.2},
            "objective": {"terms": {"reward": {"centering": 0.01}}},
            "eval": {"every": 2, "generate": 0},
            **fields,
        }
    )


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    return runs.Finished(tmp_path_factory, config_of)


def test_half_a_run_and_the_rest_are_the_whole(finished, tmp_path):
    finished.check_resumed("", tmp_path)


@pytest.mark.slow
def test_microbatches_and_a_mesh_change_nothing(finished, tmp_path):
    finished.check_cut("", tmp_path / "cut", mesh={"data": 1, "fsdp": 2, "tensor": 2}, microbatches=2)


def test_a_run_begins_where_theory_has_it_and_says_how_it_goes(finished):
    lines = metrics.read_metrics(finished(""))
    first = next(line for line in lines if "eval/loss" in line)
    assert first["step"] == 0
    assert first["eval/log_loss"] == pytest.approx(np.log(2), rel=0.02)
    last = [line for line in lines if "eval/loss" in line][-1]
    for name in ("accuracy", "accuracy_where_longer_wins", "accuracy_where_shorter_wins", "calibration_error"):
        assert 0 <= last[f"eval/{name}"] <= 1
    assert last["eval/margin"] == pytest.approx(last["eval/chosen"] - last["eval/rejected"], abs=1e-5)
    assert not any(name.startswith("eval/bits") for name in last)


def test_an_exported_reward_model_gives_the_same_rewards(finished, tmp_path, capfd):
    records = [{"prompt": "reverse: abc", "chosen": "cba", "rejected": "Um, abc"}, {"text": "abc"}]
    (tmp_path / "x.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    assert export.main([f"--model={finished('')}", f"--output={tmp_path / 'model'}"]) == 0
    assert "there was no pad, and now it is <|pad|> (261)" in capfd.readouterr().err
    scored = []
    for name, flags in ((finished(""), ()), (tmp_path / "model", ("--template=chat",))):
        output = tmp_path / f"{len(scored)}.jsonl"
        flags = [f"--model={name}", f"--data={tmp_path / 'x.jsonl'}", f"--output={output}", *flags]
        assert score.main(["--reward", *flags]) == 0
        scored.append([json.loads(line) for line in output.read_text().splitlines()])
    assert scored[0] == scored[1]
    assert scored[0][0]["rewards"][0] != scored[0][0]["rewards"][1]


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"model": {**MODEL, "num_labels": 0}}, "model.num_labels = 0: the model's head predicts tokens"),
        ({"objective": {"terms": {"reward": {"margin": True}}}}, "reads the batch field 'margin'"),
        ({"eval": {"every": 2, "generate": 4}}, "eval.generate = 4: the policy is a reward model"),
        ({"data": {"path": "tasks:copy", "examples": 40}}, "reads the batch field 'pair'"),
    ],
)
def test_what_cannot_be_honoured_is_refused(fields, words, tmp_path):
    with pytest.raises(InputError, match=words):
        run(config_of(**fields), str(tmp_path / "run"), devices=jax.devices()[:1])
    assert not (tmp_path / "run").exists()
