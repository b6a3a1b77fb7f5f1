"""Further data that the objective is measured on: `eval.sets`."""

import json

import pytest

from research import main
from research.errors import Exit
from research.run import metrics

FLAGS = ["--config=experiments/sft.py:debug", "--config.eval.generate=0", "--config.log.tensorboard=False"]


def write(path, records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def test_sets_that_cannot_be_measured_are_refused(tmp_path, capfd):
    pairs = write(tmp_path / "a.jsonl", [{"prompt": f"p{i}", "response": "yes"} for i in range(20)])
    for path, said in (("no.jsonl", "eval.sets.far: "), (f"0.5*{pairs},0.5*tasks:copy", "eval.sets.far = ")):
        flags = [*FLAGS, f"--config.eval.sets.far={path}", f"--workdir={tmp_path}/run"]
        assert main.main(flags) == Exit.BAD_INPUT
        assert f"error: {said}" in capfd.readouterr().err
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
@pytest.mark.usefixtures("one_device")
def test_each_set_has_its_scores_and_those_of_the_same_data_are_the_same(tmp_path):
    pairs = write(tmp_path / "a.jsonl", [{"prompt": f"p{i}", "response": "yes" * 3} for i in range(40)])
    near = write(tmp_path / "near.jsonl", [{"prompt": f"q{i}", "response": "no"} for i in range(9)])
    flags = [f"--config.data.path={pairs}", f"--config.data.eval_path={near}", "--config.eval.batches=0"]
    flags += [f"--config.eval.sets.near={near}", "--config.eval.sets.far=tasks:copy", f"--workdir={tmp_path}/run"]
    assert main.main([*FLAGS, *flags]) == 0
    for record in metrics.read_metrics(str(tmp_path / "run")):
        if "eval/loss" in record:
            assert record["eval/near/loss"] == record["eval/loss"]
            assert record["eval/near/accuracy"] == record["eval/accuracy"]
            assert record["eval/far/loss"] != record["eval/loss"]
