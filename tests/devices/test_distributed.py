"""Several processes on this machine, each with devices of its own, are one run."""

import functools
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import jax
import numpy as np
import pytest

from research import cli, config, loading
from research.devices import compilation, distributed
from research.run import checkpoint, loop, metrics
from research.run.run import run

STEPS = 24
TESTS = Path(__file__).parent.parent
slow = pytest.mark.slow


def flags(workdir, mesh, steps=STEPS, experiment="experiments/sft.py:debug"):
    """What research.main takes for a run."""
    options = {"steps": steps, "log.every": 1, "eval.every": 0, "checkpoint.every": 4, "checkpoint.best_metric": ""}
    options |= {f"mesh.{axis}": size for axis, size in mesh.items()}
    named = [f"--config={experiment}", f"--workdir={workdir}"]
    return named + [f"--config.{name}={value}" for name, value in options.items()]


def start(logs, processes, devices, program):
    """Popen objects of the processes of a program; their output goes to LOGS.N.log."""
    with socket.socket() as s:
        s.bind(("localhost", 0))
        port = s.getsockname()[1]
    env = {k: v for k, v in os.environ.items() if not k.startswith(("XLA_FLAGS", "JAX_", "PJRT_"))}
    env |= {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": str(devices)}
    env["PYTHONPATH"] = os.pathsep.join(filter(None, [env.get("PYTHONPATH"), str(TESTS)]))
    # Each compiles for itself: half the time without the newer emitters, and less without LLVM's optimisations.
    env["XLA_FLAGS"] = "--xla_backend_optimization_level=0 "
    env["XLA_FLAGS"] += "--xla_backend_extra_options=xla_cpu_disable_new_fusion_emitters"
    made = []
    for i in range(processes):
        peers = [f"--coordinator=localhost:{port}", f"--num_processes={processes}", f"--process_id={i}"]
        with open(f"{logs}.{i}.log", "w") as log:
            command = [sys.executable, "-m", *program, *peers]
            made.append(subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, env=env))
    return made


def start_run(workdir, processes, devices, mesh):
    return start(workdir, processes, devices, ["research.main", *flags(workdir, mesh)])


def finish(processes, seconds=240):
    """Their exit statuses."""
    end = time.time() + seconds
    try:
        return [p.wait(max(0.1, end - time.time())) for p in processes]
    finally:
        for p in processes:
            p.kill()


def run_here(workdir, named, devices=1):
    """Does a run in this process, on so many devices; returns its workdir."""
    read = cli.read_experiment([flag for flag in named if flag.startswith("--config")])
    run(config.parse(read.values), str(workdir), devices=jax.devices()[:devices])
    return workdir


def log(logs, i):
    return Path(f"{logs}.{i}.log").read_text()


def records(workdir):
    return [r for r in metrics.read_metrics(str(workdir)) if "train/loss" in r]


def losses(workdir):
    return {r["step"]: r["train/loss"] for r in records(workdir)}


def wait_for(workdir, step, processes, logs=None, seconds=240):
    end = time.time() + seconds
    while time.time() < end and all(p.poll() is None for p in processes):
        if (workdir / "metrics.jsonl").exists() and any(s >= step for s in losses(workdir)):
            return
        time.sleep(0.1)
    for p in processes:
        p.kill()
    pytest.fail(f"step {step} was not reached:\n{log(logs or workdir, 0)}")


def same(found, wanted):
    assert found.keys() == wanted.keys()
    steps = sorted(wanted)
    np.testing.assert_allclose([found[s] for s in steps], [wanted[s] for s in steps], rtol=2e-3)


# Experiments beside sft.py:debug itself, each of which begins as this does.
BEGIN = """
from experiments import sft


def get_config(arg=""):
    config = sft.get_config("debug")
    config.eval.generate = 0
"""
EXPERIMENTS = {
    "prefix": """
    config.objective = {"terms": {"prefix_lm": 1.0}}
    config.model.prefix = True
""",
    "masked": """
    config.objective = {"terms": {"masked": {"whole_word": True}}}
    config.model.causal = False
""",
    "adapter": """
    config.adapter = {"kind": "lora", "rank": 4, "dropout": 0.3, "also": "final_norm/scale"}
""",
    "rewards": """
    config.data.update(path="tasks:copy", pack=False)
    config.rewards = {"length": {"most": 3, "over": 8}, "exact_match": 1.0}
    config.rollout.update(prompts=4, answers=4, epochs=2, max_new_tokens=8, filter_rounds=1)
    config.advantage.whiten = "tokens"
    config.objective = {"terms": {"policy_gradient": {"old": "trainer"}}}
""",
}
# Name -> (steps, mesh of two processes with two devices each). Those that are stopped below have data and fsdp.
IN_TURN = {
    "prefix": (6, {"data": 4}),
    "masked": (4, {"data": 2, "sequence": 2}),
    "adapter": (6, {"data": 1, "fsdp": 2, "tensor": 2}),
    "rewards": (6, {"data": 2, "fsdp": 2}),
    "sft": (6, {"data": 1, "sequence": 2, "tensor": 2}),
}


class InTurn:
    """Runs that two processes did in turn, and one that goes on until process 1 is interrupted.

    Attributes:
      folder: has each under its name.
      statuses: of the processes.
    """

    def __init__(self, folder):
        self.folder = folder
        for name, lines in EXPERIMENTS.items():
            (folder / f"{name}.py").write_text(f"{BEGIN}{lines}    return config\n")
        plan = [self.flags(name, folder / name, mesh) for name, (_, mesh) in IN_TURN.items()]
        plan.append(flags(folder / "endless", {"data": 4}, steps=100_000))
        (folder / "plan.json").write_text(json.dumps(plan))
        processes = start(folder / "all", 2, 2, ["runs_in_turn", str(folder / "plan.json")])
        wait_for(folder / "endless", 3, processes, folder / "all", seconds=400)
        processes[1].send_signal(signal.SIGINT)
        self.statuses = finish(processes, 60)

    def flags(self, name, workdir, mesh):
        experiment = f"{self.folder}/{name}.py" if name in EXPERIMENTS else "experiments/sft.py:debug"
        return flags(workdir, mesh, IN_TURN[name][0], experiment)

    def both(self, name):
        """The workdirs of one process with one device, and of the two."""
        return run_here(self.folder / f"{name}-alone", self.flags(name, self.folder, {})), self.folder / name


@pytest.fixture(scope="module")
def in_turn(tmp_path_factory):
    return InTurn(tmp_path_factory.mktemp("in_turn"))


pytestmark = pytest.mark.timeout(600)


@slow
def test_several_processes_have_the_losses_of_one(in_turn):
    alone, together = in_turn.both("sft")
    assert len(losses(alone)) == 6
    same(losses(together), losses(alone))
    assert json.loads((together / "done.json").read_text())["step"] == 6


@slow
def test_several_processes_split_the_same_documents_at_the_same_places(in_turn):
    """The share of prefixes of each step is a sum over all that was drawn."""
    alone, together = ([r["train/prefix_share"] for r in records(workdir)] for workdir in in_turn.both("prefix"))
    assert len(set(alone)) == 6
    assert together == alone


@slow
def test_several_processes_mask_the_same_tokens(in_turn):
    alone, together = (
        [(r["step"], r["train/nll"], r["train/chosen"]) for r in records(workdir)] for workdir in in_turn.both("masked")
    )
    assert len(alone) == 4
    np.testing.assert_allclose(together, alone, rtol=1e-4)


@slow
def test_several_processes_train_an_adapter_as_one_does(in_turn):
    """Kernels and adapters are cut over both, and the same of maps' inputs is left out."""
    alone, together = in_turn.both("adapter")
    assert len(losses(alone)) == 6
    same(losses(together), losses(alone))
    whole, cut = (loading.load_model(str(workdir)).params for workdir in (alone, together))
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-2, atol=2e-4), cut, whole)


@slow
def test_several_processes_judge_answers_and_learn_as_one_does(in_turn):
    alone, together = (
        [(r["step"], r["train/loss"], r.get("train/reward", 0), r["train/grad_norm"]) for r in records(workdir)]
        for workdir in in_turn.both("rewards")
    )
    assert len(alone) == 6
    np.testing.assert_allclose(together, alone, rtol=2e-3, atol=1e-5)


@slow
def test_an_error_of_one_process_is_told_to_the_others(in_turn):
    assert in_turn.statuses[0] == distributed.LOST
    assert re.search(r"process 0: process 1 .* ended: KeyboardInterrupt", log(in_turn.folder / "all", 0))


@slow
def test_a_run_is_stopped_and_loses_a_process_and_ends_as_if_left_alone(tmp_path, capfd):
    """SIGTERM to one of two saves once at the same step; of four that go on one is killed, which ends the others, who
    name it; one process goes on to the end. The second of two is killed in tests/test_launch.py."""
    alone = losses(run_here(tmp_path / "alone", flags(tmp_path, {})))
    workdir = tmp_path / "w"
    processes = start_run(workdir, 2, 2, {"data": 4})
    wait_for(workdir, 5, processes)
    processes[1].send_signal(signal.SIGTERM)
    assert finish(processes) == [75, 75], log(workdir, 1)
    stops = {int(re.search(r"saved step (\d+) of", log(workdir, i))[1]) for i in range(2)}
    assert stops == {checkpoint.steps(workdir)[-1]}
    (stop,) = stops
    assert 5 <= stop < STEPS - 6

    processes = start_run(workdir, 4, 1, {"data": 1, "fsdp": 2, "sequence": 2})
    wait_for(workdir, stop + 5, processes)
    processes[0].kill()
    began = time.time()
    assert finish(processes, 60)[1:] == [distributed.LOST] * 3
    assert time.time() - began < 60
    for i in range(1, 4):
        assert re.search(rf"error: process {i}: process 0 \(pid \d+ on .*died", log(workdir, i))
    saved = checkpoint.steps(workdir)[-1]
    assert stop <= saved < STEPS
    capfd.readouterr()
    run_here(workdir, flags(workdir, {"data": 2, "tensor": 2, "sequence": 2}), devices=8)
    assert f"resumed  at step {saved}" in capfd.readouterr().err
    same(losses(workdir), alone)


def test_a_broken_transfer_waits_for_who_died_and_other_errors_do_not():
    broken = "UNKNOWN: Gloo AllGather failed: [external/gloo/gloo/transport/tcp/pair.cc:547] Connection closed by peer"
    for error in jax.errors.JaxRuntimeError(broken), ValueError(broken):
        assert distributed.between_processes(error)
    for error in ValueError("lengths differ"), KeyboardInterrupt():
        assert not distributed.between_processes(error)


def test_an_interrupt_that_a_library_swallows_comes_again(monkeypatch):
    monkeypatch.setattr(distributed.jax, "process_count", lambda: 2)
    before = signal.getsignal(signal.SIGINT)
    with loop.stop_on_signals(threading.Event()) as stop:
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
        with pytest.raises(KeyboardInterrupt):
            loop.should_stop(stop, 1)
    assert signal.getsignal(signal.SIGINT) is before


def test_several_processes_with_cpus_do_without_the_compilation_cache(monkeypatch):
    asked = []
    monkeypatch.setattr(compilation.jax.config, "update", lambda *args: asked.append(args))
    monkeypatch.setattr(distributed.jax, "process_count", lambda: 2)
    compilation.use_compilation_cache()
    assert not asked
    monkeypatch.setattr(distributed.jax, "process_count", lambda: 1)
    compilation.use_compilation_cache()
    assert asked


@pytest.fixture
def watches(tmp_path, monkeypatch):
    """Those of three processes, in this one."""
    made = []
    (tmp_path / "processes").mkdir()
    for i in range(3):
        monkeypatch.setattr(distributed.jax, "process_index", lambda i=i: i)
        monkeypatch.setattr(distributed.jax, "process_count", lambda: 3)
        made.append(distributed.Watch(str(tmp_path), stall_seconds=100))
    for watch in made:
        watch.beat()
    return made


def clock(monkeypatch, seconds):
    now = time.monotonic()
    monkeypatch.setattr(distributed.time, "monotonic", lambda: now + seconds)


def test_a_silent_process_is_named_and_one_that_beats_is_not(watches, monkeypatch):
    first, second, third = watches
    third.progress(7)
    third.beat()
    assert first.look() == ""
    clock(monkeypatch, distributed.DEAD_SECONDS + 1)
    second.beat()
    assert re.match(r"process 2 \(pid \d+ on \S+, at step 7\) died: it has not been heard of for 21 s", first.look())
    third.beat()
    assert first.look() == ""


def test_a_process_that_ended_well_is_not_missed_and_one_that_did_not_is(watches, monkeypatch):
    first, second, third = watches
    second.ended, third.ended = "", ""
    second.beat()
    third.beat()
    assert first.look() == ""
    clock(monkeypatch, distributed.DEAD_SECONDS + 1)
    assert first.look() == ""
    third.ended = "OSError: no space"
    third.beat()
    assert first.look().endswith("ended: OSError: no space")


def test_no_step_for_long_names_those_behind(watches, monkeypatch):
    first, second, third = watches
    first.progress(12)
    second.progress(12)
    third.progress(11)
    clock(monkeypatch, 101)
    second.beat()
    third.beat()
    assert first.look() == (
        "no step for 101 s (stall_seconds); this process is at step 12, and stalled are those behind it: 2"
    )
