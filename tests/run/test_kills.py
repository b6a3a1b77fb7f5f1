"""Kills, a full disk and other processes at random moments: the run ends with the bits of one that was left alone.

Each test makes a few rounds. UNDERSTUDY_FAULTS=100 makes so many, and UNDERSTUDY_FAULTS_SEED draws other moments:

    UNDERSTUDY_FAULTS=100 pytest -n 0 -s -m slow tests/run/test_kills.py -k moment
"""

import contextlib
import os
import random
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from runs import assert_same

from research.errors import Exit
from research.run import checkpoint, metrics
from research.signals import STOPS

pytestmark = [pytest.mark.slow, pytest.mark.timeout(7200)]

ROUNDS, SEED = int(os.environ.get("UNDERSTUDY_FAULTS", 0)), int(os.environ.get("UNDERSTUDY_FAULTS_SEED", 0))
STEPS = 24
COMMAND = [
    *(sys.executable, "-m", "research.main", "--config=experiments/sft.py:debug", f"--config.steps={STEPS}"),
    *("--config.log.every=1", "--config.checkpoint.every=3", "--config.eval.every=12", "--config.eval.generate=0"),
    *("--config.eval.batches=1", "--config.checkpoint.best_metric=", "--config.checkpoint.keep_last=1"),
]
SOON = 2.0  # seconds in which Python itself may not have begun, on a busy machine
# Two devices, so that arrays are saved in parts; eight would take most of the time to wait for each other.
ENVIRONMENT = os.environ | {"XLA_FLAGS": re.sub(r"device_count=\d+", "device_count=2", os.environ["XLA_FLAGS"])}


@pytest.fixture(autouse=True, scope="module")
def heard():
    """Programs that are begun ignore no signal, as a shell's job in the background would have them do."""
    before = {number: signal.getsignal(number) for number in STOPS}
    for number in STOPS:
        signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def start(workdir):
    with open(f"{workdir}.log", "a") as log:
        return begin([*COMMAND, f"--workdir={workdir}"], log)


def begin(command, log):
    return subprocess.Popen(command, stderr=log, stdout=log, env=ENVIRONMENT)


def said(workdir):
    return Path(f"{workdir}.log").read_text()


def check_whole(whole, workdir):
    """A finished run is that which was left alone, its log of metrics too."""
    assert_same(whole, workdir)
    steps = [r["step"] for r in metrics.read_metrics(str(workdir)) if "train/loss" in r]
    assert steps == list(range(1, STEPS + 1))
    assert not (workdir / "owner.json").exists()
    assert "Traceback" not in said(workdir), said(workdir)[-3000:]


@pytest.fixture(scope="module")
def lone(tmp_path_factory):
    """(workdir of a run that was left alone, seconds that it took)."""
    workdir, began = tmp_path_factory.mktemp("lone") / "run", time.monotonic()
    assert start(workdir).wait() == 0, said(workdir)[-3000:]
    return workdir, time.monotonic() - began


def reached(workdir):
    """The last step in the log of metrics."""
    there = (workdir / "metrics.jsonl").exists()
    return max((r["step"] for r in metrics.read_metrics(str(workdir))), default=0) if there else 0


def wait_somewhere(process, workdir, rng, seconds):
    """Waits until a random moment, or the end of a process: one of the time that a run takes, most of which is its
    start, or one in a step, an evaluation or a save."""
    target, until, before = 0, rng.uniform(0, seconds), reached(workdir)
    if rng.random() < 0.5 and before + 1 < STEPS:
        target, until = rng.randint(before + 1, STEPS - 1), rng.uniform(0, 0.3)
    while process.poll() is None and reached(workdir) < target:
        time.sleep(0.01)
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(until)


def test_kills_at_any_moment(lone, tmp_path):
    whole, seconds = lone
    rng, kills, runs = random.Random(SEED), 0, 0
    workdir = tmp_path / "run-0"
    while kills < (ROUNDS or 4):
        before, began = max(checkpoint.steps(workdir), default=0), time.monotonic()
        process = start(workdir)
        number = rng.choice([signal.SIGKILL, signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
        wait_somewhere(process, workdir, rng, seconds)
        took = time.monotonic() - began
        if process.poll() is None:
            process.send_signal(number)
            status = process.wait()
            kills += 1
            print(f"kill {kills}: {number.name} after {took:.1f} s, at step {reached(workdir)}: status {status}")
            allowed = {-number} if number == signal.SIGKILL else {Exit.PREEMPTED, Exit.DONE}
            if took < SOON and status not in allowed:
                assert status in (-number, 1), said(workdir)[-3000:]
                Path(f"{workdir}.log").write_text("")  # of a traceback of Python's own start
                continue
            assert status in allowed, said(workdir)[-3000:]
        elif not before:
            seconds = min(seconds, took)  # the first run compiled what the others read
        assert max(checkpoint.steps(workdir), default=0) >= before
        if process.returncode == 0:
            check_whole(whole, workdir)
            runs += 1
            workdir = tmp_path / f"run-{runs}"
    assert start(workdir).wait() == 0, said(workdir)[-3000:]
    check_whole(whole, workdir)
    print(f"{kills} kills, {runs + 1} whole runs")


@pytest.fixture
def small_disk(tmp_path):
    """A folder on a disk of 16 MiB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=16m", "none", str(folder)]
    if subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("a disk can't be mounted here")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


def fill(folder, delay, seconds):
    """Fills a disk after a delay, for so many seconds."""
    time.sleep(delay)
    ballast = folder / "ballast"
    with contextlib.suppress(OSError), open(ballast, "wb", buffering=0) as file:
        while True:
            file.write(b"\0" * 4096)
    time.sleep(seconds)
    ballast.unlink()


def test_a_disk_that_is_full_for_a_while(lone, small_disk, tmp_path):
    whole, seconds = lone
    rng, fills, statuses, runs = random.Random(SEED), 0, [], 0
    while fills < (ROUNDS or 1):
        workdir = small_disk / f"run-{runs}"
        status = None
        while status != 0:
            times = rng.uniform(0, seconds), rng.uniform(0.2, 0.5 * seconds)
            filling = threading.Thread(target=fill, args=(small_disk, *times))
            with open(tmp_path / "log", "a") as log:
                process = begin([*COMMAND, f"--workdir={workdir}"], log)
            filling.start()
            status = process.wait()
            filling.join()
            fills += 1
            statuses.append((round(times[0] / seconds, 2), round(times[1], 1), status))
            print(f"fill {fills}: at {statuses[-1][0]} of a run, for {times[1]:.1f} s: status {status}")
            text = (tmp_path / "log").read_text()
            assert status in (Exit.DONE, Exit.FAILED, Exit.BAD_INPUT), (statuses[-1], text[-3000:])
            assert "Traceback" not in text, text[-3000:]
            assert status == 0 or "No space left on device" in text.splitlines()[-1], text[-3000:]
        (workdir.parent / f"{workdir.name}.log").touch()
        check_whole(whole, workdir)
        for path in sorted(workdir.rglob("*"), reverse=True):
            path.rmdir() if path.is_dir() else path.unlink()
        runs += 1
    print(f"{fills} fills, {runs} whole runs")


def at_once(commands, rng, within, log):
    """Starts commands at random moments; their (status, last line)."""
    began, processes = time.monotonic(), []
    for moment, command in sorted((rng.uniform(0, within), command) for command in commands):
        time.sleep(max(0, began + moment - time.monotonic()))
        with open(f"{log}-{len(processes)}", "w") as file:
            processes.append(begin(command, file))
    statuses = [process.wait() for process in processes]
    lines = [Path(f"{log}-{i}").read_text().splitlines()[-1] for i in range(len(processes))]
    return list(zip(statuses, lines, strict=True))


def test_several_processes_on_one_workdir_and_on_one_output(lone, tmp_path):
    whole, seconds = lone
    rng = random.Random(SEED)
    data = tmp_path / "data.jsonl"
    data.write_text("".join(f'{{"text": "record {i} {"x" * (i % 7)}"}}\n' for i in range(2000)))
    score = [sys.executable, "-m", "research", "score", "--with=length,duplicates", f"--data={data}"]
    subprocess.run([*score, f"--output={tmp_path}/lone.jsonl"], check=True, capture_output=True)
    for i in range(ROUNDS or 1):
        count = rng.randint(2, 8 if ROUNDS else 3)
        workdir, output = tmp_path / f"run-{i}", tmp_path / f"out-{i}.jsonl"
        ends = at_once([[*COMMAND, f"--workdir={workdir}"]] * count, rng, rng.uniform(0, seconds), f"{workdir}.log")
        assert any(status == 0 for status, _ in ends), ends
        for status, line in ends:  # one that comes when the first has ended finds the run finished
            assert status == 0 or (status == Exit.BAD_INPUT and "has it" in line), ends
        (tmp_path / f"run-{i}.log").touch()
        check_whole(whole, workdir)
        scored = at_once([[*score, f"--output={output}"]] * count, rng, rng.uniform(0, 2), f"{output}.log")
        assert [status for status, _ in scored].count(0) == 1, scored
        for status, line in scored:
            assert status == 0 or (status == Exit.BAD_INPUT and ("has it" in line or "is there already" in line)), (
                scored
            )
        assert output.read_bytes() == (tmp_path / "lone.jsonl").read_bytes()
        left = {path.name for path in tmp_path.glob(f"out-{i}.jsonl*")} - {output.name}
        assert all(".log-" in name for name in left), left
        print(f"round {i}: {count} processes, runs {[s for s, _ in ends]}, scores {[s for s, _ in scored]}")
