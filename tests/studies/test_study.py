"""Studies: what is planned, run, skipped, shared, submitted and reported. Runs are fakes in all but one test."""

import errno
import importlib
import json
import os
import pathlib
import re
import signal
import subprocess
import sys
import threading
import time
from types import SimpleNamespace

import pytest

from research import files
from research.commands.study import main
from research.errors import InputError
from research.run import checkpoint, metrics, run
from research.studies import execution, stages
from research.studies.execution import BAD_INPUT, DIVERGED, FAILED, STOPPED
from research.studies.runner import run_stages
from research.studies.stages import Plan, finished, state

# A command's module: `mode` says how it ends; each call is noted in OUTPUT.calls.
TOY = """
import json, os, pathlib, sys, time

def main(argv):
    flags = dict(arg[2:].split("=", 1) for arg in argv if "=" in arg)
    output = pathlib.Path(flags["output"])
    with open(f"{output}.calls", "a") as f:
        f.write(json.dumps(argv) + "\\n")
    print("toy at work")
    if flags.get("mode") == "bad":
        print("error: --data: is bad", file=sys.stderr)
        return 2
    if flags.get("mode") == "flag":
        sys.exit("usage: toy")
    if flags.get("mode") == "slow" and not os.path.exists(os.environ["GO"]):
        try:
            time.sleep(60)
        except KeyboardInterrupt:
            return 130
    output.write_text(flags.get("text", "made") + "\\n")
"""

EXPERIMENT = """
import functools
from ml_collections import ConfigDict

def get_config(arg=""):
    return ConfigDict({"steps": 5, "study": {"seeds": 2, "store": "", "big": {"lr": 1e-3}}}).lock()

def study(config, add):
    run = {"steps": config.steps, "data": {"path": "tasks:copy"}}
    small = add.train("small", run)
    labels = add.command("labels", "toy", {"model": small.workdir, "output": "{workdir}/x.jsonl"})
    students = []
    for seed in range(config.study.seeds):
        data = {"path": f"{labels.workdir}/x.jsonl"}
        students.append(add.train(f"student-s{seed}", run | {"seed": seed, "data": data}))
    return functools.partial(report, students)

def report(students, workdir):
    with open(f"{workdir}/report.txt", "a") as f:
        f.write(" ".join(stage.name for stage in students) + "\\n")
"""

RUN = {"steps": 5, "data": {"path": "tasks:copy"}}


@pytest.fixture(autouse=True)
def toy(tmp_path, monkeypatch):
    (tmp_path / "modules").mkdir()
    (tmp_path / "modules/toy.py").write_text(TOY)
    monkeypatch.syspath_prepend(str(tmp_path / "modules"))
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "modules"))
    monkeypatch.delitem(sys.modules, "toy", raising=False)
    monkeypatch.chdir(pathlib.Path(__file__).parents[2])


@pytest.fixture
def experiment(tmp_path):
    path = tmp_path / "x.py"
    path.write_text(EXPERIMENT)
    return str(path)


@pytest.fixture
def runs(monkeypatch):
    """Replaces run.run by one that ends at once, as `seed` says; returns the workdirs it was called with."""
    called = []

    def fake(config, workdir, *, started, command, stop):
        called.append(os.path.basename(workdir))
        print("step 1/5  loss 3", file=sys.stderr)
        if config.seed == 13:
            raise run.Diverged("step 3: loss not finite")
        if config.seed == 14:
            raise InputError("data.path: no good")
        if config.seed == 15:
            raise RuntimeError("out of memory")
        if config.seed == 75:
            raise run.Preempted("saved step 3")
        if config.seed == 76:  # told to stop when it was about to end anyway
            stop.set()
        final = {"train/loss": 1.5, "eval/loss": 1.25, "eval/accuracy": 0.5, "eval/perplexity": 3.0}
        files.write_json(pathlib.Path(workdir) / "done.json", {"step": config.steps, "metrics": final})
        return final

    monkeypatch.setattr(run, "run", fake)
    return called


def command(experiment, tmp_path, *flags):
    return main([f"--config={experiment}", f"--workdir={tmp_path}/runs/x", *flags])


def stems(names):
    return [name.rpartition("-")[0] for name in names]


def test_stages_know_their_inputs_and_their_folders_hold_hashes(tmp_path):
    add = Plan(f"{tmp_path}/store")
    small = add.train("small", RUN)
    large = add.train("large", RUN | {"seed": 1, "model": {"init_from": small.workdir}})
    labels = add.command("labels", "toy", {"models": [small.workdir, large.workdir], "output": "{workdir}/x"})
    last = add.train("last", RUN | {"data": {"path": f"0.5*{labels.workdir}/x.jsonl,0.5*tasks:copy"}})
    assert (small.inputs, large.inputs) == ((), (small.id,))
    assert labels.inputs == (small.id, large.id)
    assert last.inputs == (labels.id,)
    assert small.workdir == f"{tmp_path}/store/small-{small.digest}"
    assert small.settings["batch_size"] == 32  # the default: settings are the whole config
    assert add.stages == [small, large, labels, last]
    assert not (tmp_path / "store").exists()


def test_the_hash_is_over_what_decides_the_result(tmp_path):
    add = Plan(f"{tmp_path}/store")
    first = add.train("first", RUN)
    free = {"log": {"every": 3}, "compilation_cache": False, "mesh": {"fsdp": 4}, "study": {"seeds": 3}, "seed": 0}
    assert add.train("other", RUN | free | {"data": {"path": "tasks:copy", "cache_dir": "/x"}}) is first
    assert add.stages == [first]
    changed = [{"seed": 1}, {"optimizer": {"learning_rate": 0.5}}, {"model": {"d_model": 128}}, {"steps": 6}]
    assert len({add.train("first", RUN | change).digest for change in changed} | {first.digest}) == 5
    # What is upstream counts, its name and the place of the store don't.
    elsewhere = Plan(f"{tmp_path}/elsewhere")
    digests = []
    for plan, name, seed in ((add, "first", 0), (elsewhere, "another", 0), (elsewhere, "another", 1)):
        base = plan.train(name, RUN | {"seed": seed})
        digests.append(plan.command("labels", "toy", {"model": base.workdir}).digest)
    assert digests[0] == digests[1] != digests[2]


def test_hashes_are_those_of_the_first_release(tmp_path):
    """Stages that users have finished are known again: commands and runs, whatever is called otherwise since.

    Where this fails, a default has changed or a field is gone: the result would be another, and the stages are too.
    """
    add = Plan(f"{tmp_path}/store")
    small = add.train("small", RUN)
    labels = add.command("labels", "label", {"model": small.workdir, "output": "{workdir}/x.jsonl"})
    data, roles = {"path": f"{labels.workdir}/x.jsonl"}, {"teacher": {"init_from": small.workdir}}
    student = add.train("student", RUN | {"seed": 1, "data": data, "roles": roles})
    own = add.command("own", "json.tool", {"model": student.workdir})
    digests = [stage.digest for stage in (small, labels, student, own)]
    assert digests == ["3099b07f50", "3eadf41f53", "71b11def3c", "1f3b484b51"]
    assert labels.settings["module"] == "label"
    assert add.command("labels", "research.commands.label", labels.settings["args"]) is labels
    with pytest.raises(InputError, match=r"no module 'research\.label' to run\. Write 'label'"):
        add.command("labels", "research.label", {})


@pytest.mark.parametrize("section", ["", "optimizer", "model", "roles"])
def test_a_field_that_is_added_later_counts_where_it_is_set(tmp_path, monkeypatch, section):
    def with_field(values, value):
        """As a config would be after a release that has another field."""
        values = json.loads(json.dumps(values))
        {"": values, "roles": values["roles"].get("teacher")}.get(section, values.get(section))["novel"] = value
        return values

    settings = Plan(f"{tmp_path}/store").train("a", RUN | {"roles": {"teacher": {"init_from": "x"}}}).settings
    before = stages.make_stage("a", "train", settings, ()).digest
    defaults = stages.config_lib.defaults() | {"roles": {"teacher": {}}}
    defaults = with_field(defaults, 0.0)
    defaults["model"]["novel"] = 0.0  # roles have the fields of model
    monkeypatch.setattr(stages.config_lib, "defaults", lambda: defaults)
    digests = [stages.make_stage("a", "train", with_field(settings, value), ()).digest for value in (0.0, 0.5)]
    assert digests[0] == before != digests[1]


def test_the_hash_is_over_contents_of_files(tmp_path):
    data, folder, run_folder = tmp_path / "a.jsonl", tmp_path / "texts", tmp_path / "began"
    data.write_text('{"text": "a"}\n')
    (folder / "deep").mkdir(parents=True)
    (folder / "deep/b.txt").write_text("b")
    (run_folder / "checkpoints/5").mkdir(parents=True)
    (run_folder / "checkpoints/5/weights").write_text("w")
    (run_folder / "metrics.jsonl").write_text("")

    def digests():
        add = Plan(f"{tmp_path}/store")
        return [
            add.train("a", RUN | {"data": {"path": f"0.5*{data},0.5*{folder}/deep/*.txt"}}).digest,
            add.train("b", RUN | {"data": {"path": "tasks:copy", "eval_path": str(folder)}}).digest,
            add.train("c", RUN | {"model": {"init_from": str(run_folder)}}).digest,
            add.command("d", "toy", {"task": f"choice,name=x:{data}", "output": "{workdir}/y"}).digest,
            add.train("e", RUN).digest,
        ]

    def changed():
        nonlocal before
        now = digests()
        before, differ = now, "".join(x for x, a, b in zip("abcde", before, now, strict=True) if a != b)
        return differ

    before = digests()
    assert changed() == ""
    data.write_text('{"text": "c"}\n')
    assert changed() == "ad"
    (folder / "deep/b.txt").write_text("c")
    assert changed() == "ab"
    (folder / "c.txt").write_text("d")
    assert changed() == "b"
    (run_folder / "metrics.jsonl").write_text("{}")  # a log says nothing of the model
    assert changed() == ""
    (run_folder / "checkpoints/6").mkdir()
    (run_folder / "checkpoints/6/weights").write_text("v")
    assert changed() == "c"


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ('add.train("a", {"stepz": 3})', "stage a: stepz: .*'steps'"),
        ('add.train("a", {"steps": "3"})', "stage a: steps = '3'"),
        ('add.train("a", {"objective": {"terms": {"sfd": 1.0}}})', "stage a: .*'sft'"),
        ('add.train("a", {"data": {"path": "/no/x.jsonl"}})', "stage a: data.path: there is no '/no/x.jsonl'"),
        (
            'add.train("a", {"data": {"path": "", "sources": {"b": {"path": "/no/x.jsonl"}}}})',
            "stage a: data.sources.b.path: there is no '/no/x.jsonl'",
        ),
        ('add.train("a,b", {})', "stage 'a,b': a name is of letters"),
        ('add.command("a", "research.labell", {})', "stage a: there is no module 'research.labell'"),
        ('add.command("a", "nothing.here", {})', "stage a: there is no module 'nothing.here'"),
        ('add.command("a", "toy", {"x": object()})', "a stage's settings are numbers"),
        ("pass", "adds no stage"),
    ],
)
def test_plans_that_cannot_work(tmp_path, experiment, body, message, capsys):
    pathlib.Path(experiment).write_text(EXPERIMENT.partition("def study")[0] + f"def study(config, add):\n    {body}\n")
    assert command(experiment, tmp_path) == BAD_INPUT
    printed = capsys.readouterr().err
    assert re.search(message, printed), printed
    assert not (tmp_path / "runs").exists()


def test_batches_that_fit_no_device_are_found_before_anything_runs(tmp_path, runs):
    add = Plan(f"{tmp_path}/store")
    add.train("good", RUN)
    add.train("odd", RUN | {"batch_size": 7})
    with pytest.raises(InputError, match="stage odd: batch_size = 7"):
        run_stages(add.stages)
    assert runs == []


@pytest.mark.slow
def test_with_jobs_the_devices_are_left_to_the_runs(tmp_path):
    """What plans touches none: a process that has touched a TPU has it alone."""
    code = f"""
from research.studies.runner import run_stages
from research.studies.stages import Plan
from jax._src import xla_bridge
add = Plan({str(tmp_path / "store")!r})
add.train("odd", {{"batch_size": 7, "mesh": {{"data": 2}}, "data": {{"path": "tasks:copy"}}}})
try:
    run_stages(add.stages, jobs=1)
except ValueError as error:
    print(error, xla_bridge._backends)
"""
    environment = os.environ | {"JAX_NUM_CPU_DEVICES": "2", "JAX_PLATFORMS": "cpu", "PYTHONPATH": "."}
    line = [sys.executable, "-c", code]
    printed = subprocess.run(line, capture_output=True, text=True, env=environment, timeout=120, check=False)
    assert "stage odd: batch_size = 7 isn't divisible" in printed.stdout, printed
    assert printed.stdout.strip().endswith("{}"), printed.stdout


def test_a_study_runs_in_order_and_then_skips(tmp_path, experiment, runs, capsys):
    assert command(experiment, tmp_path) == 0
    assert stems(runs) == ["small", "student-s0", "student-s1"]
    lines = re.sub(r"\d:\d\d", "TIME", capsys.readouterr().out).splitlines()
    assert lines[0] == f"4 stages in {tmp_path}/runs/store, the study in {tmp_path}/runs/x"
    assert lines[1] == "[1/4] small  TIME  eval  loss 1.25  accuracy 0.5  ETA TIME"
    assert lines[4].startswith("[4/4] student-s1  TIME  eval  loss 1.25")
    assert "ETA" not in lines[4]
    assert len(lines) == 5

    (labels,) = (tmp_path / "runs/store").glob("labels-*")
    assert (labels / "x.jsonl").read_text() == "made\n"
    assert (labels / "log.txt").read_text() == "toy at work\n"
    (small,) = (tmp_path / "runs/store").glob("small-*")
    assert json.loads((labels / "x.jsonl.calls").read_text()) == [f"--model={small}", f"--output={labels}/x.jsonl"]
    assert (small / "log.txt").read_text() == "step 1/5  loss 3\n"
    record = json.loads((tmp_path / "runs/x/study.json").read_text())
    assert [(s["name"], s["state"]) for s in record["stages"]][1:3] == [("labels", "done"), ("student-s0", "done")]
    assert record["stages"][1]["inputs"] == [small.name]
    assert record["config"]["study"]["seeds"] == 2
    assert record["versions"]["jax"]
    assert json.loads((small / "stage.json").read_text())["settings"]["steps"] == 5

    runs.clear()
    assert command(experiment, tmp_path, "--config.study.seeds=3") == 0
    assert stems(runs) == ["student-s2"]
    assert "[2/5] labels  done already" in capsys.readouterr().out
    assert (tmp_path / "runs/x/report.txt").read_text().splitlines()[1] == "student-s0 student-s1 student-s2"
    assert len((labels / "x.jsonl.calls").read_text().splitlines()) == 1


def test_studies_share_stages_whatever_they_call_them(tmp_path, experiment, runs):
    assert command(experiment, tmp_path) == 0
    runs.clear()
    other = tmp_path / "y.py"
    other.write_text(EXPERIMENT.replace('"small"', '"floor"').replace("student", "pupil").replace('"labels"', '"weak"'))
    assert main([f"--config={other}", f"--workdir={tmp_path}/runs/y", "--config.study.seeds=3"]) == 0
    assert stems(runs) == ["pupil-s2"]
    record = json.loads((tmp_path / "runs/y/study.json").read_text())
    assert [s["name"] for s in record["stages"]] == ["floor", "weak", "pupil-s0", "pupil-s1", "pupil-s2"]
    assert "/store/small-" in record["stages"][0]["workdir"]  # the first name stays
    # A store of its own shares nothing.
    runs.clear()
    assert command(experiment, tmp_path, f"--config.study.store={tmp_path}/own") == 0
    assert len(runs) == 3


def test_runs_with_fewer_steps_than_asked_are_not_done(tmp_path, runs):
    add = Plan(f"{tmp_path}/store")
    stage = add.train("a", RUN)
    os.makedirs(stage.workdir)
    done = pathlib.Path(stage.workdir) / "done.json"
    done.write_text('{"step": 4, "metrics": {}}')
    run_stages(add.stages)
    assert len(runs) == 1
    run_stages(add.stages)
    assert len(runs) == 1
    done.write_text("{")
    with pytest.raises(InputError, match=r"done\.json: is no JSON"):
        run_stages(add.stages)


@pytest.mark.parametrize(
    ("seed", "status", "message"),
    [(13, DIVERGED, "step 3: loss not finite"), (14, BAD_INPUT, "data.path: no good"), (15, FAILED, "out of memory")],
)
def test_a_failure_ends_the_study_and_names_the_stage(tmp_path, runs, seed, status, message, capsys, experiment):
    text = EXPERIMENT.replace("small = add", f'add.train("odd", run | {{"seed": {seed}}})\n    small = add')
    pathlib.Path(experiment).write_text(text)
    assert command(experiment, tmp_path) == status
    assert stems(runs) == ["odd"]
    printed = capsys.readouterr().err
    assert f"error: stage odd in {tmp_path}/runs/store/odd-" in printed
    assert message in printed
    (stage, *rest) = json.loads((tmp_path / "runs/x/study.json").read_text())["stages"]
    assert stage["state"] == "failed"
    assert message in stage["error"]
    assert {s["state"] for s in rest} == {"new"}
    assert not (tmp_path / "runs/x/report.txt").exists()
    if seed == 15:
        assert "Traceback" in (pathlib.Path(stage["workdir"]) / "log.txt").read_text()


@pytest.mark.parametrize("elsewhere", [False, True])
def test_a_run_that_may_diverge_is_a_result(tmp_path, runs, capsys, elsewhere):
    def plan(**options):
        add = Plan(f"{tmp_path}/store")
        return add, add.train("hot", RUN | {"seed": 13}, **options), add.train("good", RUN)

    add, hot, good = plan(may_diverge=True)
    if elsewhere:  # as it leaves its folder in a process of its own
        os.makedirs(hot.workdir)
        stages.write_stage(hot)
        assert execution.run_stage(stages.read_stage(hot.workdir), sys.stderr) == {}
    assert run_stages(add.stages) == {}
    assert stems(runs) == ["hot", "good"]
    assert finished(hot) == {"metrics": {}, "diverged": "step 3: loss not finite"}
    assert [stages.state(stage) for stage in (hot, good)] == ["diverged", "done"]
    assert ("diverged: step 3: loss not finite" in capsys.readouterr().out) == (not elsewhere)
    run_stages(add.stages)
    assert len(runs) == 2  # it isn't tried again
    add, same, _ = plan()
    assert same.workdir == hot.workdir
    with pytest.raises(execution.StageFailed, match="step 3: loss not finite"):
        run_stages(add.stages)


def test_a_full_disk_hides_no_reason(tmp_path, runs, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    stage = Plan(f"{tmp_path}/store").train("hot", RUN | {"seed": 13})
    os.makedirs(stage.workdir)
    monkeypatch.setattr(execution.files, "write_json", full)
    with pytest.raises(execution.StageFailed, match="step 3: loss not finite"):
        execution.run_stage(stage, SimpleNamespace(write=full, flush=lambda: None))


def test_keep_going_leaves_out_what_needs_the_failed_stage(tmp_path, runs, capsys):
    add = Plan(f"{tmp_path}/store")
    bad = add.train("bad", RUN | {"seed": 13})
    needs = add.command("needs", "toy", {"model": bad.workdir, "output": "{workdir}/x"})
    also = add.train("also", RUN | {"data": {"path": f"{needs.workdir}/x.jsonl"}})
    good = add.train("good", RUN)
    lost = run_stages(add.stages, keep_going=True)
    assert lost.keys() == {bad.id, needs.id, also.id}
    assert lost[bad.id].endswith("step 3: loss not finite")
    assert lost[also.id] == f"needs {needs.id}"
    assert [state(stage) for stage in add.stages] == ["failed", "new", "new", "done"]
    assert f"[2/4] needs  left out: needs {bad.id}" in capsys.readouterr().out
    assert runs == [bad.id, good.id]


def test_keep_going_still_reports(tmp_path, experiment, runs, capsys):
    text = EXPERIMENT.replace('{"seed": seed, ', '{"seed": 13 + 7 * seed, ')
    pathlib.Path(experiment).write_text(text)
    assert command(experiment, tmp_path, "--keep_going") == FAILED
    assert stems(runs) == ["small", "student-s0", "student-s1"]
    assert (tmp_path / "runs/x/report.txt").exists()
    assert "not done: student-s0-" in capsys.readouterr().err


@pytest.mark.slow
def test_stages_in_processes_of_their_own(tmp_path, monkeypatch, capsys):
    """What needs another waits for it; what fails is told with its log, and the others go on."""
    monkeypatch.setenv("GO", str(tmp_path / "go"))
    (tmp_path / "go").touch()
    add = Plan(f"{tmp_path}/store")
    first = add.command("first", "toy", {"output": "{workdir}/x"})
    second = add.command("second", "toy", {"output": "{workdir}/x", "data": first.workdir})
    bad = add.command("bad", "toy", {"mode": "bad", "output": "{workdir}/x"})
    needs = add.command("needs", "toy", {"output": "{workdir}/x", "data": bad.workdir})
    lost = run_stages(add.stages, keep_going=True, jobs=3)
    assert lost.keys() == {bad.id, needs.id}
    assert "error: --data: is bad" in lost[bad.id]
    assert [state(stage) for stage in (first, second, bad, needs)] == ["done", "done", "failed", "new"]
    lines = capsys.readouterr().out.splitlines()
    order = [line.split()[1] for line in lines if "started" in line]
    assert order == ["first", "bad", "second"]
    assert (pathlib.Path(first.workdir) / "log.txt").read_text() == "toy at work\n"
    with pytest.raises(execution.StageFailed, match="error: --data: is bad") as failure:
        run_stages(add.stages, jobs=1)
    assert failure.value.status == BAD_INPUT


@pytest.mark.parametrize(("mode", "message"), [("bad", "error: --data: is bad"), ("flag", "ended with status 1")])
def test_a_command_that_fails_is_told_with_its_log(tmp_path, mode, message):
    add = Plan(f"{tmp_path}/store")
    stage = add.command("labels", "toy", {"mode": mode, "output": "{workdir}/x"})
    with pytest.raises(execution.StageFailed, match=message) as failure:
        run_stages(add.stages)
    assert failure.value.status == (2 if mode == "bad" else 1)
    assert state(stage) == "failed"


def test_arguments_become_flags(tmp_path):
    add = Plan(f"{tmp_path}/store")
    args = {"ema": True, "off": False, "none": None, "stop": ["a", "b"], "k": 32, "output": "{workdir}/x,{workdir}/y"}
    stage = add.command("labels", "toy", args)
    assert execution.stage_arguments(stage) == [
        "--ema",
        *("--stop=a", "--stop=b", "--k=32"),
        f"--output={stage.workdir}/x,{stage.workdir}/y",
    ]


def test_a_stop_inside_a_run_or_at_its_end_ends_the_study(tmp_path, runs, experiment, capsys):
    text = EXPERIMENT.replace('{"seed": seed, ', '{"seed": 75 + seed, ')
    pathlib.Path(experiment).write_text(text)
    assert command(experiment, tmp_path) == STOPPED
    assert stems(runs) == ["small", "student-s0"]
    assert "saved step 3" in capsys.readouterr().err
    assert json.loads((tmp_path / "runs/x/study.json").read_text())["stages"][2]["state"] == "begun"
    pathlib.Path(experiment).write_text(text.replace("75 + seed", "76 + seed"))
    runs.clear()
    assert command(experiment, tmp_path) == STOPPED
    assert stems(runs) == ["student-s0"]  # done, and the next not begun
    assert "stopped after stage student-s0" in capsys.readouterr().err


def test_later_stages_follow_from_results(tmp_path, experiment, runs, capsys):
    """A study that yields goes on with its results: the first command to the end, another finds all of it done."""
    body = """
def study(config, add):
    run = {"steps": config.steps, "data": {"path": "tasks:copy"}}
    first = [add.train(f"rate{rate}", run | {"optimizer": {"learning_rate": rate}}) for rate in (0.1, 0.2)]
    yield
    losses = [json.loads((pathlib.Path(stage.workdir) / "done.json").read_text())["metrics"] for stage in first]
    add.train(f"loss{losses[1]['eval/loss']}", run | {"seed": 1})
    return functools.partial(report, first)

def report("""
    source = pathlib.Path(experiment)
    start, end = EXPERIMENT.index("def study"), EXPERIMENT.index("def report(")
    source.write_text("import json, pathlib\n" + EXPERIMENT[:start] + body.lstrip() + EXPERIMENT[end + 11 :])

    assert command(experiment, tmp_path, "--dry_run") == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[1] for line in lines[:2]] == ["rate0.1", "rate0.2"]
    assert lines[2].startswith("more stages follow")
    assert command(experiment, tmp_path, "--report") == BAD_INPUT
    assert command(experiment, tmp_path, "--submit=print") == 0
    printed = capsys.readouterr()
    assert "--report: more stages follow" in printed.err
    assert len(printed.out.splitlines()) == 2
    assert command(experiment, tmp_path) == 0
    assert stems(runs) == ["rate0.1", "rate0.2", "loss1.25"]
    assert "1 more stages, which follow from these" in capsys.readouterr().out
    assert (tmp_path / "runs/x/report.txt").read_text() == "rate0.1 rate0.2\n"
    names = [stage["name"] for stage in json.loads((tmp_path / "runs/x/study.json").read_text())["stages"]]
    assert names == ["rate0.1", "rate0.2", "loss1.25"]
    assert command(experiment, tmp_path, "--dry_run") == 0
    assert len(capsys.readouterr().out.splitlines()) == 3
    assert command(experiment, tmp_path) == 0
    assert len(runs) == 3


def test_a_failure_leaves_later_stages_unknown(tmp_path, experiment, runs, capsys):
    body = """
def study(config, add):
    add.train("bad", {"steps": config.steps, "data": {"path": "tasks:copy"}, "seed": 13})
    add.train("good", {"steps": config.steps, "data": {"path": "tasks:copy"}})
    yield
    return functools.partial(report, [])

def report("""
    start, end = EXPERIMENT.index("def study"), EXPERIMENT.index("def report(")
    pathlib.Path(experiment).write_text(EXPERIMENT[:start] + body.lstrip() + EXPERIMENT[end + 11 :])
    assert command(experiment, tmp_path, "--keep_going") == FAILED
    assert "more stages follow from the results" in capsys.readouterr().err
    assert not (tmp_path / "runs/x/report.txt").exists()


def test_dry_run_lists_and_writes_nothing(tmp_path, experiment, runs, capsys):
    assert command(experiment, tmp_path, "--dry_run") == 0
    lines = capsys.readouterr().out.splitlines()
    store = f"{tmp_path}/runs/store"
    small = lines[0].rpartition("/")[2]
    assert lines[0] == f"[1/4] small  new  {store}/{small}"
    assert lines[1].startswith(f"[2/4] labels  new  {store}/labels-")
    assert lines[1].endswith(f"  after {small}")
    assert not (tmp_path / "runs").exists()
    assert runs == []


def test_only_runs_one_stage_whose_inputs_are_done(tmp_path, experiment, runs, capsys):
    assert command(experiment, tmp_path, "--only=labels") == BAD_INPUT
    assert "--only=labels: needs small in" in capsys.readouterr().err
    assert command(experiment, tmp_path, "--only=smal") == BAD_INPUT
    assert "'small'" in capsys.readouterr().err
    assert command(experiment, tmp_path, "--only=small") == 0
    assert command(experiment, tmp_path, "--only=labels") == 0
    assert stems(runs) == ["small"]
    assert not (tmp_path / "runs/x/report.txt").exists()
    assert command(experiment, tmp_path, "--report") == 0
    assert (tmp_path / "runs/x/report.txt").exists()
    assert stems(runs) == ["small"]


def test_submit_hands_over_what_is_not_done_in_order(tmp_path, experiment, runs, capsys):
    assert command(experiment, tmp_path, "--only=small") == 0
    capsys.readouterr()
    queue = tmp_path / "queue.py"
    queue.write_text(
        f"import sys\nlog = open({str(tmp_path / 'jobs')!r}, 'a+')\nlog.seek(0)\nn = len(log.readlines())\n"
        "print(sys.argv[1:], file=log)\nprint(f'Submitted {100 + n};cluster')\n"
    )
    flag = f"--submit={sys.executable} {queue} --name={{name}} --after=ok:{{after}} --wrap={{command}}"
    assert command(experiment, tmp_path, "--config.study.seeds=1", flag) == 0
    jobs = [eval(line) for line in (tmp_path / "jobs").read_text().splitlines()]
    ids = [stage.partition("=")[2] for (stage, *_) in jobs]
    assert stems(ids[:2]) == ["labels", "student-s0"]
    own = f"python -m research study --config={experiment} --workdir={tmp_path}/runs/x --config.study.seeds=1"
    assert jobs == [
        [f"--name={ids[0]}", f"--wrap={own} --only={ids[0]}"],  # its input is done already: it waits for none
        [f"--name={ids[1]}", "--after=ok:100", f"--wrap={own} --only={ids[1]}"],
        ["--name=report", "--after=ok:100:101", f"--wrap={own} --report"],
    ]
    assert f"101  {ids[1]}  after 100" in capsys.readouterr().out
    assert command(experiment, tmp_path, "--submit=print", "--config.study.seeds=1") == 0
    assert capsys.readouterr().out.splitlines() == [
        f"{own} --only={ids[0]}",
        f"{own} --only={ids[1]}  # after {ids[0]}",
        f"{own} --report  # after {ids[0]} {ids[1]}",
    ]
    for template, message in (
        ("sbatch {comand}", "must hold {command}"),
        ("sbatch {command} {user}", "it has {user}"),
        ("false {command}", "ended with status 1"),
        ("true {command}", "it printed no job"),
    ):
        assert command(experiment, tmp_path, f"--submit={template}") == BAD_INPUT
        assert message in capsys.readouterr().err
    assert stems(runs) == ["small"]


def test_command_line_errors(tmp_path, experiment, capsys):
    for flags, message in (
        (["--config.study.seedz=3"], r"no such field 'study.seedz'. Did you mean 'study.seeds'\?$"),
        (["--dry_run", "--report"], "give one of them"),
        (["--onli=x"], "onli"),
        ([f"--config.study.store={tmp_path}/a,b"], "study.store = .*can't name files"),
    ):
        assert command(experiment, tmp_path, *flags) == BAD_INPUT
        printed = capsys.readouterr().err
        assert re.search(message, printed), printed
    assert main(["--config=experiments/sft.py", "--dry_run"]) == BAD_INPUT
    assert "no section `study`" in capsys.readouterr().err


def wait_for(path):
    deadline = time.monotonic() + 60
    while not path.exists():
        assert time.monotonic() < deadline, f"{path} doesn't come"
        time.sleep(0.02)


SLOW = """
from ml_collections import ConfigDict

def get_config(arg=""):
    return ConfigDict({"study": {}})

def study(config, add):
    first = add.command("first", "toy", {"output": "{workdir}/x"})
    slow = add.command("slow", "toy", {"mode": "slow", "output": "{workdir}/x", "data": first.workdir})
    add.command("free", "toy", {"output": "{workdir}/x", "text": "free"})
    add.command("last", "toy", {"output": "{workdir}/x", "data": slow.workdir})
"""


@pytest.mark.slow
def test_killed_and_stopped_studies_go_on_and_processes_share_the_work(tmp_path, monkeypatch):
    path, store, go = tmp_path / "slow.py", tmp_path / "runs/store", tmp_path / "go"
    path.write_text(SLOW)
    monkeypatch.setenv("GO", str(go))
    flags = [f"--config={path}", f"--workdir={tmp_path}/runs/x"]

    def start():
        line = [sys.executable, "-m", "research", "study", *flags]
        return subprocess.Popen(line, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)

    def calls(name):
        files = list(store.glob(f"{name}-*/x.calls"))
        return len(files[0].read_text().splitlines()) if files else 0

    def until(name, count):
        deadline = time.monotonic() + 60
        while calls(name) < count:
            assert time.monotonic() < deadline, f"{name} isn't begun"
            time.sleep(0.02)

    processes = [start()]
    try:
        until("slow", 1)
        processes[0].send_signal(signal.SIGKILL)
        processes[0].wait()
        assert [calls(name) for name in ("first", "slow", "free")] == [1, 1, 0]
        processes.append(start())
        until("slow", 2)
        # Another process leaves the stage that runs alone, and does what doesn't need it.
        processes.append(start())
        until("free", 1)
        processes[1].send_signal(signal.SIGTERM)
        assert "stopped in stage slow" in processes[1].communicate(timeout=60)[0]
        assert processes[1].returncode == STOPPED
        until("slow", 3)  # the waiting process takes over
        processes[2].send_signal(signal.SIGKILL)
        processes[2].wait()
        go.touch()
        processes.append(start())
        printed = processes[3].communicate(timeout=60)[0]
    finally:
        for process in processes:
            process.kill()
    assert processes[3].returncode == 0, printed
    assert "[1/4] first  done already" in printed
    assert [calls(name) for name in ("first", "slow", "free", "last")] == [1, 4, 1, 1]


def test_a_process_waits_for_a_stage_that_another_runs(tmp_path, capsys):
    add = Plan(f"{tmp_path}/store")
    stage = add.command("a", "toy", {"output": "{workdir}/x"})

    def finish():
        time.sleep(0.7)
        files.write_json(pathlib.Path(stage.workdir) / "done.json", {})

    with execution.lock(stage) as log:
        assert log is not None
        assert state(stage) == "running"
        threading.Thread(target=finish).start()
        run_stages(add.stages)
    printed = capsys.readouterr().out
    assert "waiting for another process, which runs a" in printed
    assert "[1/1] a  done by another process" in printed
    assert not (pathlib.Path(stage.workdir) / "x").exists()


REAL = """
import json, pathlib
from experiments import base

def get_config(arg=""):
    config = base.get_config()
    with config.unlocked():
        config.study = {"seeds": 1}
    config.data.path = "tasks:copy"
    config.tokenizer.kind = "byte"
    config.eval.generate = 0
    base.debug(config)
    config.update(seq_len=32)
    config.eval.every = 2
    return config

def study(config, add):
    small = add.train("small", config)
    rest = {k: v for k, v in config.to_dict().items() if k != "model"}
    mine = {"terms": {"focal": 1.0}, "focal": {"gamma": 2.0}}
    large = add.train("large", rest | {"seed": 1, "model": {"init_from": small.workdir}, "objective": mine})
    return lambda workdir: pathlib.Path(workdir, "report.json").write_text(json.dumps(large.workdir))
"""


FOCAL = """
import jax.numpy as jnp

from research.objectives.types import LossOut, Objective, next_token_targets
from research.ops.losses import log_probs


def make(gamma=1.0):
    def loss(forward, batch, context):
        targets, weights = next_token_targets(batch)
        log_p = log_probs(forward.hidden(), forward.head(), targets).target
        focal = -((1 - jnp.exp(log_p)) ** gamma) * log_p
        n = jnp.sum(weights)
        return LossOut(jnp.sum(weights * focal), n, {"gamma": (gamma * n, n)})

    return Objective(loss=loss)
"""


@pytest.mark.slow
@pytest.mark.usefixtures("one_device")
def test_real_runs_through_main_with_a_loss_of_ones_own(tmp_path, monkeypatch):
    """A new loss is one module and one config, wherever they are."""
    path = tmp_path / "real.py"
    path.write_text(REAL)
    (tmp_path / "focal.py").write_text(FOCAL)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path), prepend=os.pathsep)
    line = [sys.executable, "-m", "research.main", f"--config={path}", f"--workdir={tmp_path}/runs/x"]
    done = subprocess.run(line, capture_output=True, text=True, timeout=200, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    lines = done.stdout.splitlines()
    assert [text.split()[1] for text in lines[1:]] == ["small", "large"]
    assert "eval  loss" in lines[2]
    large = pathlib.Path(json.loads((tmp_path / "runs/x/report.json").read_text()))
    assert "step 2/2" in (large / "log.txt").read_text()
    assert "step 2/2" not in done.stdout + done.stderr
    stored = json.loads((large / "config.json").read_text())
    assert stored["config"]["model"]["d_model"] == 64  # as the stage before it
    assert stored["command"].startswith("python -m research study --config=")
    assert checkpoint.steps(large)[-1] == 2
    assert metrics.read_metrics(str(large))[-1]["eval/gamma"] == 2.0


def test_the_study_of_the_docs_is_planned(tmp_path, capsys):
    page = pathlib.Path("docs/studies.md").read_text()
    (tmp_path / "warm_start.py").write_text(re.findall(r"```python\n(.*?)```", page, re.DOTALL)[0])
    flags = [f"--config={tmp_path}/warm_start.py:debug", f"--workdir={tmp_path}/runs/warm", "--dry_run"]
    assert main(flags) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[1] for line in lines] == ["copy", "anew-s0", "anew-s1", "warm-s0", "warm-s1"]
    assert lines[3].endswith(f"after {lines[0].rpartition('/')[2]}")


@pytest.mark.parametrize(
    ("command", "output", "stays"),
    [
        ("export", "{workdir}/model", False),
        ("annotate", "{workdir}/notes", True),  # goes on with it
        ("score", "{workdir}/scores", True),  # replaces a file, and says what is wrong with a folder
        ("export", "DIR/model", True),  # isn't the stage's own
    ],
)
def test_what_a_try_has_written_whole_before_it_was_killed_is_in_nobodys_way(command, output, stays, tmp_path):
    folder = pathlib.Path(output.replace("{workdir}", str(tmp_path / "stage")).replace("DIR", str(tmp_path)))
    folder.mkdir(parents=True)
    settings = {"args": {"output": output.replace("DIR", str(tmp_path))}}
    stage = SimpleNamespace(workdir=str(tmp_path / "stage"), settings=settings)
    execution._remove_whole_output(stage, importlib.import_module(f"research.commands.{command}"))
    assert folder.exists() == stays
