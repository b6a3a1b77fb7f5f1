"""A run that is killed at any moment, and started again, ends with the bits of one that was left alone."""

import itertools
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from runs import assert_same

from research.errors import Exit
from research.run import checkpoint, metrics

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

STEPS = 300
COMMAND = [
    *(sys.executable, "-m", "research.main", "--config=experiments/sft.py:debug", f"--config.steps={STEPS}"),
    *("--config.log.every=1", "--config.checkpoint.every=10", "--config.eval.every=10", "--config.eval.generate=0"),
]


def start(workdir):
    with open(f"{workdir}.log", "a") as log:
        return subprocess.Popen([*COMMAND, f"--workdir={workdir}"], stderr=log)


def finish(workdir):
    status = start(workdir).wait()
    assert status == 0, Path(f"{workdir}.log").read_text()[-3000:]


def reached(workdir):
    """The last step in the log of metrics."""
    lines = workdir / "metrics.jsonl"
    return max((r["step"] for r in metrics.read_metrics(str(workdir))), default=0) if lines.exists() else 0


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    for name in ("a", "b"):
        finish(folder / name)
    assert_same(folder / "a", folder / "b")
    return folder / "a"


@pytest.mark.parametrize(("number", "times"), [(signal.SIGKILL, 6), (signal.SIGTERM, 4)])
def test_killed_run_ends_with_the_same_parameters(number, times, whole, tmp_path):
    workdir = tmp_path / "run"
    rng = random.Random(times)
    statuses, saved = [], []
    for i in range(times):
        process = start(workdir)
        if i % 3 == 2:  # somewhere in imports, data, restoring, compiling
            time.sleep(rng.uniform(0, 6))
        else:  # somewhere in a step, an evaluation or a save, a while on from where it was
            target = reached(workdir) + rng.randint(3, 25)
            while process.poll() is None and reached(workdir) < target:
                time.sleep(0.02)
            time.sleep(rng.uniform(0, 0.3))
        process.send_signal(number)
        statuses.append(process.wait())
        saved.append(max(checkpoint.steps(workdir), default=0))
        assert statuses[-1] in (-number, Exit.PREEMPTED), Path(f"{workdir}.log").read_text()[-3000:]
    assert all(a <= b for a, b in itertools.pairwise(saved)), f"a checkpoint was lost: {saved}"
    assert len(set(saved)) > 2, f"the kills came at too few places: {saved}"
    assert number != signal.SIGTERM or Exit.PREEMPTED in statuses
    print(f"statuses {statuses}, newest checkpoints {saved}")
    finish(workdir)
    assert_same(whole, workdir)
    steps = [r["step"] for r in metrics.read_metrics(str(workdir)) if "train/loss" in r]
    assert steps == list(range(1, STEPS + 1))
