"""Several processes on this machine, each with two simulated devices, are one run."""

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

import jax
import numpy as np
import pytest

from research import loading
from research.devices import compilation, distributed
from research.run import checkpoint, loop, metrics

STEPS = 24
slow = pytest.mark.slow


def start(workdir, processes, devices, mesh, steps=STEPS, config="experiments/sft.py:debug"):
    """Popen objects of the processes of a run; their output goes to WORKDIR.N.log."""
    with socket.socket() as s:
        s.bind(("localhost", 0))
        port = s.getsockname()[1]
    env = {k: v for k, v in os.environ.items() if not k.startswith(("XLA_FLAGS", "JAX_", "PJRT_"))}
    env |= {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": str(devices)}
    # Each compiles for itself: half the time without the newer emitters, and less without LLVM's optimisations.
    env["XLA_FLAGS"] = "--xla_backend_optimization_level=0 "
    env["XLA_FLAGS"] += "--xla_backend_extra_options=xla_cpu_disable_new_fusion_emitters"
    command = [sys.executable, "-m", "research.main", f"--config={config}", f"--workdir={workdir}"]
    options = {"steps": steps, "log.every": 1, "eval.every": 0, "checkpoint.every": 4, "checkpoint.best_metric": ""}
    options |= {f"mesh.{axis}": size for axis, size in mesh.items()}
    command += [f"--config.{name}={value}" for name, value in options.items()]
    made = []
    for i in range(processes):
        peers = [f"--coordinator=localhost:{port}", f"--num_processes={processes}", f"--process_id={i}"]
        with open(f"{workdir}.{i}.log", "w") as log:
            command_line = command + (peers if processes > 1 else [])
            made.append(subprocess.Popen(command_line, stdout=log, stderr=subprocess.STDOUT, env=env))
    return made


def finish(processes, seconds=240):
    """Their exit statuses."""
    end = time.time() + seconds
    try:
        return [p.wait(max(0.1, end - time.time())) for p in processes]
    finally:
        for p in processes:
            p.kill()


def log(workdir, i):
    with open(f"{workdir}.{i}.log") as f:
        return f.read()


def losses(workdir):
    records = metrics.read_metrics(str(workdir))
    return {r["step"]: r["train/loss"] for r in records if "train/loss" in r}


def wait_for(workdir, step, processes, seconds=120):
    end = time.time() + seconds
    while time.time() < end and all(p.poll() is None for p in processes):
        if (workdir / "metrics.jsonl").exists() and any(s >= step for s in losses(workdir)):
            return
        time.sleep(0.1)
    pytest.fail(f"step {step} was not reached:\n{log(workdir, 0)}")


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """The losses of one process with one device."""
    workdir = tmp_path_factory.mktemp("alone") / "w"
    assert finish(start(workdir, 1, 1, {})) == [0], log(workdir, 0)
    return losses(workdir)


def same(found, wanted):
    assert found.keys() == wanted.keys()
    steps = sorted(wanted)
    np.testing.assert_allclose([found[s] for s in steps], [wanted[s] for s in steps], rtol=2e-3)


@slow
@pytest.mark.parametrize(
    ("processes", "mesh"),
    [(2, {"sequence": 2, "tensor": 2}), (4, {"fsdp": 4, "sequence": 2})],  # those killed below have data and fsdp
)
def test_several_processes_have_the_losses_of_one(processes, mesh, alone, tmp_path):
    workdir = tmp_path / "w"
    mesh = {"data": 1} | mesh
    assert finish(start(workdir, processes, 2, mesh)) == [0] * processes, log(workdir, processes - 1)
    same(losses(workdir), alone)
    assert json.loads((workdir / "done.json").read_text())["step"] == STEPS


PREFIX_LM = """
from experiments import sft

def get_config(arg=""):
    config = sft.get_config(arg)
    config.objective = {"terms": {"prefix_lm": 1.0}}
    config.model.prefix = True
    return config
"""


@slow
def test_several_processes_split_the_same_documents_at_the_same_places(tmp_path):
    """The share of prefixes of each step is a sum over all that was drawn."""
    (tmp_path / "prefix.py").write_text(PREFIX_LM)
    shares = []
    for processes in (1, 2):
        workdir = tmp_path / str(processes)
        run = start(workdir, processes, 2, {"data": 2 * processes}, 6, f"{tmp_path}/prefix.py:debug")
        assert finish(run) == [0] * processes, log(workdir, processes - 1)
        records = metrics.read_metrics(str(workdir))
        shares.append([r["train/prefix_share"] for r in records if "train/prefix_share" in r])
    assert len(set(shares[0])) == 6
    assert shares[0] == shares[1]


ENCODER = """
from experiments import sft


def get_config(arg=""):
    config = sft.get_config("debug")
    config.objective = {"terms": {"masked": {"whole_word": True}}}
    config.model.causal = False
    config.eval.generate = 0
    return config
"""


@slow
def test_several_processes_mask_the_same_tokens(tmp_path):
    (tmp_path / "encoder.py").write_text(ENCODER)
    found = []
    for processes, devices, mesh in ((1, 1, {}), (2, 2, {"data": 2, "sequence": 2})):
        workdir = tmp_path / str(processes)
        begun = start(workdir, processes, devices, mesh, steps=4, config=str(tmp_path / "encoder.py"))
        assert finish(begun) == [0] * processes, log(workdir, 0)
        records = [r for r in metrics.read_metrics(str(workdir)) if "train/nll" in r]
        found.append([(r["step"], r["train/nll"], r["train/chosen"]) for r in records])
    assert len(found[0]) == 4
    np.testing.assert_allclose(found[1], found[0], rtol=1e-4)


ADAPTER = """
from experiments import sft


def get_config(arg=""):
    config = sft.get_config("debug")
    config.adapter = {"kind": "lora", "rank": 4, "dropout": 0.3, "also": "final_norm/scale"}
    config.eval.generate = 0
    return config
"""


@slow
def test_several_processes_train_an_adapter_as_one_does(tmp_path):
    """Kernels and adapters are cut over both, and the same of maps' inputs is left out."""
    (tmp_path / "adapter.py").write_text(ADAPTER)
    found = []
    for processes, devices, mesh in ((1, 1, {}), (2, 2, {"data": 1, "fsdp": 2, "tensor": 2})):
        workdir = tmp_path / str(processes)
        begun = start(workdir, processes, devices, mesh, steps=6, config=str(tmp_path / "adapter.py"))
        assert finish(begun) == [0] * processes, log(workdir, 0)
        found.append(losses(workdir))
    assert len(found[0]) == 6
    same(found[1], found[0])
    whole, cut = (loading.load_model(str(tmp_path / name)).params for name in "12")
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-2, atol=2e-4), cut, whole)


REINFORCEMENT = """
from experiments import sft


def get_config(arg=""):
    config = sft.get_config("debug")
    config.data.update(path="tasks:copy", pack=False)
    config.rewards = {"length": {"most": 3, "over": 8}, "exact_match": 1.0}
    config.rollout.update(prompts=4, answers=4, epochs=2, max_new_tokens=8, filter_rounds=1)
    config.advantage.whiten = "tokens"
    config.objective = {"terms": {"policy_gradient": {"old": "trainer"}}}
    config.eval.generate = 0
    return config
"""


@slow
def test_several_processes_judge_answers_and_learn_as_one_does(tmp_path):
    (tmp_path / "reinforcement.py").write_text(REINFORCEMENT)
    found = []
    for processes, devices, mesh in ((1, 1, {}), (2, 2, {"data": 2, "fsdp": 2})):
        workdir = tmp_path / str(processes)
        begun = start(workdir, processes, devices, mesh, steps=6, config=str(tmp_path / "reinforcement.py"))
        assert finish(begun) == [0] * processes, log(workdir, 0)
        records = [r for r in metrics.read_metrics(str(workdir)) if "train/loss" in r]
        found.append([(r["step"], r["train/loss"], r.get("train/reward", 0), r["train/grad_norm"]) for r in records])
    assert len(found[0]) == 6
    np.testing.assert_allclose(found[1], found[0], rtol=2e-3, atol=1e-5)


@slow
@pytest.mark.parametrize("killed", [0, 1])
def test_a_killed_process_ends_the_others_who_name_it_and_one_process_goes_on(killed, alone, tmp_path):
    workdir = tmp_path / "w"
    processes = start(workdir, 2, 2, {"data": 2, "fsdp": 2})
    wait_for(workdir, 10, processes)
    processes[killed].kill()
    began = time.time()
    statuses = finish(processes, 60)
    assert time.time() - began < 60
    assert statuses[1 - killed] == distributed.LOST
    assert re.search(rf"error: process {1 - killed}: process {killed} \(pid \d+ on .*died", log(workdir, 1 - killed))
    saved = checkpoint.steps(workdir)[-1]
    assert 4 <= saved < STEPS
    assert finish(start(workdir, 1, 8, {"data": 2, "tensor": 2, "sequence": 2})) == [0]
    assert f"resumed  at step {saved}" in log(workdir, 0)
    same(losses(workdir), alone)


@slow
def test_sigterm_to_one_saves_once_at_the_same_step(alone, tmp_path):
    workdir = tmp_path / "w"
    processes = start(workdir, 2, 2, {"data": 4})
    wait_for(workdir, 5, processes)
    processes[1].send_signal(signal.SIGTERM)
    assert finish(processes) == [75, 75], log(workdir, 1)
    saved = [int(re.search(r"saved step (\d+) of", log(workdir, i))[1]) for i in range(2)]
    assert saved[0] == saved[1] == checkpoint.steps(workdir)[-1] < STEPS
    assert finish(start(workdir, 2, 2, {"data": 2, "fsdp": 2})) == [0, 0]
    same(losses(workdir), alone)


@slow
def test_an_error_of_one_process_is_told_to_the_others(tmp_path):
    workdir = tmp_path / "w"
    processes = start(workdir, 2, 2, {"data": 4}, steps=100_000)
    wait_for(workdir, 3, processes)
    processes[1].send_signal(signal.SIGINT)
    statuses = finish(processes, 60)
    assert statuses[0] == distributed.LOST
    assert re.search(r"process 0: process 1 .* ended: KeyboardInterrupt", log(workdir, 0))


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
