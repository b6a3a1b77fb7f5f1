import csv
import json
import math
import pathlib
import re
import signal
import subprocess
import sys
import textwrap
import time

import numpy as np
import pytest
from absl import flags
from ml_collections import config_flags

from research.commands.sweep import main
from research.errors import InputError
from research.studies import execution
from research.studies.execution import BAD_INPUT, FAILED, STOPPED
from research.studies.runner import Runner
from research.studies.stages import Plan, state
from research.studies.sweep import flag_value, format_table, plan, sweep

# Stands for a process that runs a stage: it appends a line per start to its folder, and ends as `seed` says.
PROGRAM = """
import json, pathlib, signal, sys, time
workdir, command = pathlib.Path(sys.argv[1]), sys.argv[2]
seed = json.loads((workdir / "stage.json").read_text())["settings"]["seed"]
steps = json.loads((workdir / "stage.json").read_text())["settings"]["steps"]
with open(workdir / "starts", "a") as f:
    f.write(command + "\\n")
if seed == 13:
    sys.exit("error: thirteen")
if seed == 75:
    signal.signal(signal.SIGINT, lambda *_: sys.exit(75))
    (workdir / "ready").touch()
    time.sleep(30)
(workdir / "done.json").write_text(json.dumps({"step": steps, "metrics": {"eval/loss": seed / 2, "eval/acc": seed}}))
print("all is well")
"""

EXPERIMENT = """
from experiments import base

def get_config(arg=""):
    config = base.get_config()
    config.data.path = "tasks:copy"
    config.steps = 10
    return config
"""


@pytest.fixture
def program(tmp_path):
    path = tmp_path / "program.py"
    path.write_text(PROGRAM)
    return [sys.executable, str(path)]


@pytest.fixture
def experiment(tmp_path):
    """Writes an experiment with this body of sweep(add); returns its path."""

    def write(body, name="x.py"):
        path = tmp_path / name
        path.write_text(EXPERIMENT + "\ndef sweep(add):\n" + textwrap.indent(textwrap.dedent(body), "    "))
        return str(path)

    return write


def seeds(*values):
    return f"for seed in {values}:\n    add({{'seed': seed}})"


def test_values_survive_the_way_through_config_flags(experiment, monkeypatch):
    path = experiment("pass")
    given = {
        "seed": np.int64(7),
        "optimizer.learning_rate": np.float64(1e-7),
        "data.labels": ("a", "b"),
        "data.path": "a b=c:(d)",
        "optimizer.nesterov": False,
    }
    values = flags.FlagValues()
    config_flags.DEFINE_config_file("config", flag_values=values)
    argv = ["main", f"--config={path}", *(f"--config.{k}={flag_value(k, v)}" for k, v in given.items())]
    monkeypatch.setattr(sys, "argv", argv)  # config_flags reads the overrides from there
    values(argv)
    for field, value in given.items():
        node = values.config
        for part in field.split("."):
            node = node[part]
        assert node == value
        assert type(node) is type(value.item() if hasattr(value, "item") else value)


def test_flags_of_tuples():
    assert flag_value("x", ("a", 1)) == "('a',1)"
    assert flag_value("x", (2,)) == "(2,)"
    assert flag_value("x", ()) == "()"


@pytest.mark.parametrize(
    ("value", "remedy"), [(None, "turns it off"), ([1, 2], "tuple"), ({"a": 1}, "one by one"), ((None,), "turns")]
)
def test_values_that_no_flag_can_hold(value, remedy):
    with pytest.raises(InputError, match=rf"optimizer\.x = .*{remedy}"):
        flag_value("optimizer.x", value)


def test_plan_names_folders_by_what_differs(experiment):
    path = experiment(
        """
        for lr in (1e-3, 3e-3):
            add({"optimizer.learning_rate": lr, "seed": 1})
        add({"eval.every": 5, "log.every": 2, "data.labels": ("a", "b")})
        add({"data.template": "a/b"})
        add({"data.template": "a:b"})
        add({}, name="plain")
        add({"data.prompt": "x" * 200})
        """
    )
    entries = plan(path, {"steps": "7"}, "out")
    names = [entry.name for entry in entries]
    assert names[:3] == [
        "learning_rate=0.001,seed=1",
        "learning_rate=0.003,seed=1",
        "eval.every=5,log.every=2,labels=a,b",
    ]
    assert names[3][:13] == names[4][:13] == "template=a-b-"
    assert names[5] == "plain"
    assert len(names[6]) < 110
    assert len(set(names)) == len(names)
    assert entries[0].command == (
        *("python", "-m", "research.main"),
        f"--config={path}",
        f"--workdir=out/{names[0]}",
        "--config.steps=7",
        "--config.optimizer.learning_rate=0.001",
        "--config.seed=1",
    )
    assert entries[0].stage.workdir == f"out/{names[0]}"
    assert [entries[0].stage.settings[field] for field in ("steps", "seed")] == [7, 1]
    assert entries[0].stage.settings["optimizer"]["learning_rate"] == 1e-3


@pytest.mark.parametrize(
    ("body", "common", "message"),
    [
        ("pass", {}, r"adds no run(.|\n)*def sweep\(add\)"),
        ("add({'optimizer.learning_rat': 1.0})", {}, "optimizer.learning_rat: .*'learning_rate'"),
        ("add({'seed.x': 1.0})", {}, "seed.x: .*below a value"),
        ("add({'seed': 1})", {"sed": "2"}, "sweep: sed: .*'seed'"),
        ("add({'seed': 1})", {"seed": "2"}, "--config.seed=2: the sweep .* sets it"),
        ("add({'seed': 1})\nadd({'seed': 1}, name='b')", {}, "entries 1 and 2 are the same run"),
        ("add({'seed': 1}, name='a')\nadd({'seed': 2}, name='a')", {}, "'a' is given to several"),
        ("add({'seed': 1}, name='../a')", {}, "name '../a'"),
        ("add({'seed': None})", {}, "seed = None can't be given"),
        ("add({'seed': 'x'})", {}, "config.seed=x"),
        ("add({'data.path': '/no/x.jsonl'})", {}, "stage path=-no-x.jsonl: data.path: there is no"),
    ],
)
def test_plans_that_cannot_work(experiment, tmp_path, body, common, message):
    with pytest.raises(InputError, match=message):
        plan(experiment(body), common, str(tmp_path / "out"))
    assert not (tmp_path / "out").exists()


def test_experiment_files_that_cannot_be_swept(tmp_path, experiment):
    (tmp_path / "plain.py").write_text(EXPERIMENT)
    with pytest.raises(InputError, match=r"plain\.py: it defines no sweep(.|\n)*for learning_rate in"):
        plan(str(tmp_path / "plain.py"), {}, "out")
    with pytest.raises(InputError, match=r"plan\.py: there is no such file\. Did you mean .*plain\.py"):
        plan(str(tmp_path / "plan.py"), {}, "out")


@pytest.mark.parametrize("jobs", [1, 3])
def test_a_sweep_runs_sums_up_and_goes_on(tmp_path, experiment, program, capsys, jobs):
    path, out = experiment(seeds(2, 13, 1)), tmp_path / "out"
    assert sweep(path, {"steps": "3"}, str(out), jobs=jobs, program=program) == FAILED
    printed = capsys.readouterr().out
    assert "error: thirteen" in printed
    assert "failed: seed=13" in printed
    with open(out / "results.csv", newline="") as f:
        rows = list(csv.DictReader(f))
    assert [(row["run"], row["status"], row["step"], row["eval/loss"]) for row in rows] == [
        ("seed=1", "done", "3", "0.5"),
        ("seed=2", "done", "3", "1.0"),
        ("seed=13", "failed", "", ""),
    ]
    assert (out / "seed=2/log.txt").read_text() == "all is well\n"
    started = (out / "seed=2/starts").read_text()
    line = f"--config={path} --workdir={out}/seed=2 --config.steps=3 --config.seed=2"
    assert started == f"python -m research.main {line}\n"

    # The same command again: only what isn't finished starts.
    assert sweep(path, {"steps": "3"}, str(out), metric="eval/acc", maximize=True, program=program) == FAILED
    assert len((out / "seed=2/starts").read_text().splitlines()) == 1
    assert len((out / "seed=13/starts").read_text().splitlines()) == 2
    with open(out / "results.csv", newline="") as f:
        assert [row["run"] for row in csv.DictReader(f)] == ["seed=2", "seed=1", "seed=13"]
    with pytest.raises(InputError, match=r"--metric=eval/los: .*'eval/loss'"):
        sweep(path, {"steps": "3"}, str(out), metric="eval/los", program=program)


def test_a_finished_run_of_other_settings_is_not_reused(tmp_path, experiment, program):
    path, out = experiment(seeds(1)), tmp_path / "out"
    assert sweep(path, {"steps": "3"}, str(out), program=program) == 0
    for config, common in ((path, {"steps": "4"}), (path, {}), (path + ":debug", {"steps": "3"})):
        with pytest.raises(InputError, match="other settings"):
            sweep(config, common, str(out), program=program)
    assert sweep(path, {"steps": "3"}, str(out), program=program) == 0
    (tmp_path / "by_hand/seed=1").mkdir(parents=True)
    (tmp_path / "by_hand/seed=1/config.json").write_text("{}")
    with pytest.raises(InputError, match="no sweep made"):
        sweep(path, {}, str(tmp_path / "by_hand"), program=program)


def test_what_else_changes_a_run_is_named(tmp_path, experiment, program):
    path, out = experiment(seeds(1)), tmp_path / "out"
    assert sweep(path, {}, str(out), program=program) == 0
    text = pathlib.Path(path).read_text()
    pathlib.Path(path).write_text(text.replace("config.steps = 10", "config.steps, config.ema_decay = 10, 0.5"))
    with pytest.raises(InputError, match=r"other settings: ema_decay = 0\.0 there, 0\.5 now"):
        sweep(path, {}, str(out), program=program)


def test_sweeps_of_an_earlier_release_go_on(tmp_path, experiment, program):
    """They have no stage.json."""
    path, out = experiment(seeds(1, 2)), tmp_path / "out"
    assert sweep(path, {}, str(out), program=program) == 0
    for run in ("seed=1", "seed=2"):
        (out / run / "stage.json").unlink()
    (out / "seed=2/done.json").unlink()
    assert sweep(path, {}, str(out), program=program) == 0
    assert [len((out / run / "starts").read_text().splitlines()) for run in ("seed=1", "seed=2")] == [1, 2]


def test_dry_run_prints_commands_and_writes_nothing(tmp_path, experiment, capsys):
    path = experiment(seeds(1, 2))
    assert main([f"--config={path}:v", f"--workdir={tmp_path}/out", "--dry_run", "--config.data.prompt=a b"]) == 0
    printed = capsys.readouterr().out
    assert f"-m research.main --config={path}:v --workdir={tmp_path}/out/seed=1 '--config.data.prompt=a b'" in printed
    assert not (tmp_path / "out").exists()


def test_command_line_errors(tmp_path, capsys):
    assert main([f"--config={tmp_path}/no.py", "--workdir=out"]) == BAD_INPUT
    assert f"there is no file '{tmp_path}/no.py'" in capsys.readouterr().err
    assert main(["--config=x.py", "--workdir=out", "--confg.seed=1"]) == BAD_INPUT
    err = capsys.readouterr().err
    assert "--confg.seed: no such flag" in err
    assert "Did you mean '--config.seed'?" in err


def wait_for(path):
    deadline = time.monotonic() + 20
    while not path.exists():
        assert time.monotonic() < deadline, f"{path} doesn't come"
        time.sleep(0.02)


def test_ctrl_c_is_passed_on_and_waited_for(tmp_path, experiment, program):
    path, out = experiment(seeds(75, 2)), tmp_path / "out"
    call = f"sweep({path!r}, {{}}, {str(out)!r}, program={program!r})"
    # A shell's job in the background would hand on that SIGINT is ignored.
    code = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler); "
    code += f"from research.studies.sweep import sweep; raise SystemExit({call})"
    root = pathlib.Path(__file__).parents[2]
    process = subprocess.Popen([sys.executable, "-c", code], cwd=root, stdout=subprocess.PIPE, text=True)
    try:
        wait_for(out / "seed=75/ready")
        # While it runs, nobody else can run it.
        (busy, _) = plan(path, {}, str(out))
        assert state(busy.stage) == "running"
        with execution.lock(busy.stage) as log:
            assert log is None
        process.send_signal(signal.SIGINT)
        printed, _ = process.communicate(timeout=20)
    finally:
        process.kill()
    assert process.returncode == STOPPED
    assert "SIGINT: passed on to 1 running" in printed
    assert "[1/2] seed=75  stopped" in printed
    assert not (out / "seed=2/starts").exists()
    with open(out / "results.csv", newline="") as f:
        assert {row["run"]: row["status"] for row in csv.DictReader(f)} == {
            "seed=75": "stopped",
            "seed=2": "not started",
        }


def test_a_runner_runs_at_most_so_many_at_a_time(tmp_path):
    code = textwrap.dedent(
        """
        import os, pathlib, sys, time
        folder, stage = pathlib.Path(sys.argv[1]), pathlib.Path(sys.argv[2])
        mark = folder / str(os.getpid())
        mark.touch(); print(len(list(folder.iterdir()))); time.sleep(0.3); mark.unlink()
        (stage / "done.json").write_text('{"metrics": {}}')
        """
    )
    (tmp_path / "marks").mkdir()
    add = Plan(f"{tmp_path}/store")
    for i in range(4):
        add.command(f"toy{i}", "json.tool", {"number": i})
    program = [sys.executable, "-c", code, str(tmp_path / "marks")]
    assert Runner(add.stages, jobs=2, program=program).run() == {}
    together = [int(pathlib.Path(stage.workdir, "log.txt").read_text()) for stage in add.stages]
    assert max(together) == 2


def test_results_that_are_not_numbers_come_last(tmp_path, experiment, program):
    path, out = experiment(seeds(1, 2)), tmp_path / "out"
    assert sweep(path, {}, str(out), program=program) == 0
    (out / "seed=1/done.json").write_text(json.dumps({"step": 10, "metrics": {"eval/loss": math.nan}}))
    sweep(path, {}, str(out), program=program)
    with open(out / "results.csv", newline="") as f:
        assert [row["run"] for row in csv.DictReader(f)] == ["seed=2", "seed=1"]


def test_table_fits():
    rows = [{"run": "a", "status": "done", "eval/loss": 0.123456}, {"run": "bb", "status": "failed"}]
    table = format_table(["run", "status", "eval/loss"], rows, 80)
    assert table.splitlines() == ["run  status  eval/loss", "a    done    0.1235", "bb   failed"]
    assert "eval/loss" not in format_table(["run", "status", "eval/loss"], rows, 20)


def test_the_sweep_of_the_docs_is_planned(tmp_path):
    page = (pathlib.Path(__file__).parents[2] / "docs/studies.md").read_text()
    (tmp_path / "rates.py").write_text(re.findall(r"```python\n(.*?)```", page, re.DOTALL)[1])
    entries = plan(f"{tmp_path}/rates.py:debug", {}, str(tmp_path / "out"))
    assert {entry.name for entry in entries} == set(re.findall(r"^(learning_rate=\S+)  done", page, re.MULTILINE))
