"""A run that is killed at any moment, and started again, ends with the bits of one that was left alone."""

import os
import random
import signal
import subprocess
import sys
import time

import pytest
from test_run import assert_same

from research import checkpoint, main, metrics

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

COMMAND = [
    *(sys.executable, "-m", "research.main", "--config=experiments/sft.py:debug"),
    *("--config.steps=600", "--config.log.every=1", "--config.checkpoint.every=10", "--config.eval.every=10"),
]


def start(workdir):
    return subprocess.Popen([*COMMAND, f"--workdir={workdir}"], stderr=subprocess.PIPE, text=True, env=dict(os.environ))


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The run left alone, and the seconds it took (the second time, programs and tokens being cached)."""
    folder = tmp_path_factory.mktemp("whole")
    for name in ("first", "second"):
        began = time.monotonic()
        _, error = (process := start(folder / name)).communicate()
        assert process.returncode == 0, error
    assert_same(folder / "first", folder / "second")
    return folder / "second", time.monotonic() - began


@pytest.mark.parametrize(("number", "times"), [(signal.SIGKILL, 10), (signal.SIGTERM, 3)])
def test_killed_run_ends_with_the_same_parameters(number, times, whole, tmp_path):
    reference, seconds = whole
    rng = random.Random(times)
    statuses, reached = [], []
    for _ in range(times):
        process = start(tmp_path)
        time.sleep(rng.uniform(0.2, 0.9) * seconds)
        process.send_signal(number)
        _, error = process.communicate()
        statuses.append(process.returncode)
        reached.append(max(checkpoint.steps(tmp_path), default=0))
        assert process.returncode in (-number, main.PREEMPTED, 0), error
    assert reached == sorted(reached)
    assert len(set(reached)) > 2, f"the kills came at too few places: {reached}"
    if number == signal.SIGTERM:
        assert main.PREEMPTED in statuses
    _, error = (process := start(tmp_path)).communicate()
    assert process.returncode == 0, error
    assert_same(reference, tmp_path)
    steps = [r["step"] for r in metrics.read_metrics(str(tmp_path)) if "train/loss" in r]
    assert steps == list(range(1, 601))
