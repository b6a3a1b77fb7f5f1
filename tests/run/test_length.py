"""How long a run is: in steps, in epochs, or until nothing gets better."""

import json

import pytest

from research import config, main
from research.errors import InputError
from research.run import metrics, resolve


def write(path, count=20):
    lines = [{"prompt": f"p{i}", "response": "yes"} for i in range(count)]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return str(path)


def resolved(tmp_path, data, **fields):
    values = {"batch_size": 8, "seq_len": 32, "tokenizer": {"kind": "byte"}, "eval": {"every": 0}}
    values |= {"objective": {"terms": {"sft": 1.0}}, "data": {"pack": False, "eval_fraction": 0.0, **data}}
    return resolve.resolve(config.parse(values | fields), str(tmp_path / "run"))


@pytest.mark.parametrize(("epochs", "steps"), [(1, 3), (2, 5), (0.4, 1), (0.01, 1)])
def test_epochs_are_steps_once_the_data_is_read(tmp_path, epochs, steps):
    assert resolved(tmp_path, {"path": write(tmp_path / "a.jsonl")}, epochs=epochs).config.steps == steps


def test_without_epochs_steps_stay(tmp_path):
    assert resolved(tmp_path, {"path": write(tmp_path / "a.jsonl")}, steps=77).config.steps == 77


def test_a_schedule_that_is_longer_than_the_epochs_is_refused(tmp_path):
    data = {"path": write(tmp_path / "a.jsonl")}
    with pytest.raises(InputError, match=r"optimizer.warmup_steps = 4 is more than steps = 3"):
        resolved(tmp_path, data, epochs=1, optimizer={"warmup_steps": 4})
    assert resolved(tmp_path, data, epochs=1, optimizer={"warmup_share": 0.5}).config.steps == 3


def test_rows_that_are_drawn_have_no_epochs(tmp_path):
    a, b = write(tmp_path / "a.jsonl"), write(tmp_path / "b.jsonl")
    with pytest.raises(InputError, match=r"epochs = 1.0: rows are drawn by weight"):
        resolved(tmp_path, {"path": f"0.5*{a},0.5*{b}"}, epochs=1)


def test_patience_needs_a_metric():
    with pytest.raises(InputError, match=r"checkpoint.patience = 2: waits for a better checkpoint.best_metric"):
        config.check(config.parse({"checkpoint": {"patience": 2}}), num_devices=1)


@pytest.mark.slow
@pytest.mark.usefixtures("one_device")
def test_a_run_ends_when_nothing_gets_better_and_stays_so(tmp_path, capfd):
    flags = ["--config=experiments/sft.py:debug", f"--workdir={tmp_path}/run", "--config.steps=6"]
    flags += ["--config.optimizer.learning_rate=0.0", "--config.eval.generate=0", "--config.log.tensorboard=False"]
    assert main.main([*flags, "--config.checkpoint.patience=2"]) == 0
    said = capfd.readouterr().err
    assert "step 2: no new best eval/loss in 2 evaluations (checkpoint.patience): this is the end" in said
    assert "done     2 steps in " in said
    assert "(the best is the first)" in said
    done = tmp_path / "run/done.json"
    assert json.loads(done.read_text())["step"] == 2
    assert main.main([*flags, "--config.checkpoint.patience=2"]) == 0
    assert "finished at step 2 already" in capfd.readouterr().err
    done.unlink()  # as if it had been killed before it was written
    assert main.main([*flags, "--config.checkpoint.patience=2"]) == 0
    assert json.loads(done.read_text())["step"] == 2
    assert main.main([*flags, "--config.checkpoint.patience=4"]) == 0
    assert json.loads(done.read_text())["step"] == 4
    assert main.main([*flags, "--config.checkpoint.patience=0"]) == 0
    assert json.loads(done.read_text())["step"] == 6
    assert [r["step"] for r in metrics.read_metrics(str(tmp_path / "run")) if "eval/loss" in r] == list(range(7))
