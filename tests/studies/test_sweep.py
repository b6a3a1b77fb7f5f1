import csv
import json
import math
import pathlib
import signal
import subprocess
import sys
import textwrap
import time

import numpy as np
import pytest
from absl import flags
from ml_collections import config_flags

from research.errors import InputError
from research.studies.sweep import BAD_INPUT, FAILED, STOPPED, flag_value, format_table, main, plan, run_all, sweep

# Stands for research.main: it takes the same flags, appends a line per start, and ends as `seed` says.
PROGRAM = """
import json, pathlib, signal, sys, time
flags = dict(arg[2:].split("=", 1) for arg in sys.argv[1:])
workdir, seed = pathlib.Path(flags["workdir"]), int(flags["config.seed"])
with open(workdir / "starts", "a") as f:
    f.write(" ".join(sys.argv[1:]) + "\\n")
if seed == 13:
    sys.exit("error: thirteen")
if seed == 75:
    signal.signal(signal.SIGINT, lambda *_: sys.exit(75))
    (workdir / "ready").touch()
    time.sleep(30)
(workdir / "done.json").write_text(json.dumps({"step": 5, "metrics": {"eval/loss": seed / 2, "eval/acc": seed}}))
print("all is well")
"""

EXPERIMENT = """
from ml_collections import ConfigDict

def get_config(arg=""):
    return ConfigDict({
        "seed": 0,
        "optimizer": {"learning_rate": 1e-3, "betas": (0.9, 0.95)},
        "head": {"learning_rate": 1.0},
        "steps": 10,
        "path": "x",
        "ema": False,
    }).lock()
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
        "optimizer.betas": (0.5, 1),
        "path": "a b=c:(d)",
        "ema": True,
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
        add({"head.learning_rate": 0.1, "optimizer.betas": (0.9, 0.99)})
        add({"path": "a/b"})
        add({"path": "a:b"})
        add({}, name="plain")
        add({"path": "x" * 200})
        """
    )
    entries = plan(path, {"steps": "7"}, "out", ["run"])
    names = [entry.name for entry in entries]
    assert names[:3] == [
        "optimizer.learning_rate=0.001,seed=1",
        "optimizer.learning_rate=0.003,seed=1",
        "head.learning_rate=0.1,betas=0.9,0.99",
    ]
    assert names[3][:9] == names[4][:9] == "path=a-b-"
    assert names[5] == "plain"
    assert len(names[6]) < 110
    assert len(set(names)) == len(names)
    assert entries[0].command == (
        "run",
        f"--config={path}",
        f"--workdir=out/{names[0]}",
        "--config.steps=7",
        "--config.optimizer.learning_rate=0.001",
        "--config.seed=1",
    )


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
        ("seed=1", "done", "5", "0.5"),
        ("seed=2", "done", "5", "1.0"),
        ("seed=13", "failed", "", ""),
    ]
    assert (out / "seed=2/log.txt").read_text() == "all is well\n"
    started = (out / "seed=2/starts").read_text()
    assert started == f"--config={path} --workdir={out}/seed=2 --config.steps=3 --config.seed=2\n"

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


def test_dry_run_prints_commands_and_writes_nothing(tmp_path, experiment, capsys):
    path = experiment(seeds(1, 2))
    assert main([f"--config={path}:v", f"--workdir={tmp_path}/out", "--dry_run", "--config.path=a b"]) == 0
    printed = capsys.readouterr().out
    assert f"-m research.main --config={path}:v --workdir={tmp_path}/out/seed=1 '--config.path=a b'" in printed
    assert not (tmp_path / "out").exists()


def test_command_line_errors(tmp_path, capsys):
    assert main([f"--config={tmp_path}/no.py", "--workdir=out"]) == BAD_INPUT
    assert "no such file" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["--config=x.py", "--workdir=out", "--confg.seed=1"])
    assert "'--confg.seed=1'" in capsys.readouterr().err


def wait_for(path):
    deadline = time.monotonic() + 20
    while not path.exists():
        assert time.monotonic() < deadline, f"{path} doesn't come"
        time.sleep(0.02)


def test_ctrl_c_is_passed_on_and_waited_for(tmp_path, experiment, program):
    path, out = experiment(seeds(75, 2)), tmp_path / "out"
    call = f"sweep({path!r}, {{}}, {str(out)!r}, program={program!r})"
    code = f"from research.studies.sweep import sweep; raise SystemExit({call})"
    root = pathlib.Path(__file__).parents[2]
    process = subprocess.Popen([sys.executable, "-c", code], cwd=root, stdout=subprocess.PIPE, text=True)
    try:
        wait_for(out / "seed=75/ready")
        # While it runs, nobody else can run it.
        busy = str(out / "seed=75")
        assert run_all({busy: ["false"]}, 1) == {busy: STOPPED}
        process.send_signal(signal.SIGINT)
        printed, _ = process.communicate(timeout=20)
    finally:
        process.kill()
    assert process.returncode == STOPPED
    assert "SIGINT: passed on to 1 running" in printed
    assert "seed=75: stopped" in printed
    assert not (out / "seed=2/starts").exists()
    with open(out / "results.csv", newline="") as f:
        assert {row["run"]: row["status"] for row in csv.DictReader(f)} == {
            "seed=75": "stopped",
            "seed=2": "not started",
        }


def test_run_all_runs_at_most_so_many_at_a_time(tmp_path):
    code = textwrap.dedent(
        """
        import os, pathlib, sys, time
        folder, mark = pathlib.Path(sys.argv[1]), pathlib.Path(sys.argv[1]) / str(os.getpid())
        mark.touch(); print(len(list(folder.iterdir()))); time.sleep(0.3); mark.unlink()
        """
    )
    (tmp_path / "marks").mkdir()
    commands = {str(tmp_path / str(i)): [sys.executable, "-c", code, str(tmp_path / "marks")] for i in range(4)}
    assert run_all(commands, 2) == dict.fromkeys(commands, 0)
    together = [int((tmp_path / str(i) / "log.txt").read_text()) for i in range(4)]
    assert max(together) == 2


def test_results_that_are_not_numbers_come_last(tmp_path, experiment, program):
    path, out = experiment(seeds(1, 2)), tmp_path / "out"
    assert sweep(path, {}, str(out), program=program) == 0
    (out / "seed=1/done.json").write_text(json.dumps({"step": 5, "metrics": {"eval/loss": math.nan}}))
    sweep(path, {}, str(out), program=program)
    with open(out / "results.csv", newline="") as f:
        assert [row["run"] for row in csv.DictReader(f)] == ["seed=2", "seed=1"]


def test_table_fits():
    rows = [{"run": "a", "status": "done", "eval/loss": 0.123456}, {"run": "bb", "status": "failed"}]
    table = format_table(["run", "status", "eval/loss"], rows, 80)
    assert table.splitlines() == ["run  status  eval/loss", "a    done    0.1235", "bb   failed"]
    assert "eval/loss" not in format_table(["run", "status", "eval/loss"], rows, 20)
