"""Worker processes: what is slow or faulty costs its sample, and nothing is left behind."""

import os
import signal

import numpy as np
import pytest

from research.errors import InputError
from research.rollouts import rewards
from research.rollouts.rewards import Sample, judging, workers

CODE = """import os, sys, time

def mine(sample, scale: float = 1.0):
    print("not a result")
    if sample.answer == "slow":
        time.sleep(60)
    if sample.answer == "die":
        os._exit(3)
    if sample.answer == "quit":
        sys.exit("quits")
    if sample.answer == "bug":
        return 1 / 0
    if sample.answer == "text":
        return "x"
    if sample.answer == "inf":
        return float("inf")
    return None if sample.answer == "none" else scale * len(sample.answer)

def forks(sample):
    if os.fork() == 0:
        return 7.0
    os.wait()
    return float(len(sample.answer))

def listed(sample):
    return bool([sample.answer])

constant = 3
"""


def sample(answer):
    return Sample({"response": "aa"}, "p", answer, 1, "stop")


def spec(path, **fields):
    return rewards.load({"mine": {"reward": f"{path}:mine", **fields}})


@pytest.fixture
def code(tmp_path):
    path = tmp_path / "code.py"
    path.write_text(CODE)
    return path


def test_what_is_slow_or_faulty_costs_its_sample(code, capfd):
    answers = ["a", "slow", "aa", "die", "bug", "text", "inf", "quit", "none", "aaaa", "a" * 50 + "!"]
    entries = spec(code, weight=0.5, seconds=2.0, scale=2.0) | rewards.load(
        {
            "exact_match": 1.0,
            "regex": {"weight": 0.0, "pattern": "^(a+)+$", "seconds": 2.0},
        }  # takes for ever with the last
    )
    with judging.Judge(entries) as judge:
        judge.start()
        judged = judge([sample(a) for a in answers])
    nan = np.nan
    np.testing.assert_array_equal(judged.values[0], np.float32([2, nan, 4, nan, nan, nan, nan, nan, nan, 8, 102]))
    np.testing.assert_array_equal(judged.failed[0], [0, 1, 0, 1, 1, 1, 1, 1, 0, 0, 0])
    np.testing.assert_array_equal(judged.values[1], np.float32([0, 0, 1, 0, 0, 0, 0, 0, 0, 0, 0]))
    np.testing.assert_array_equal(judged.values[2], np.float32([1, 0, 1, 0, 0, 0, 0, 0, 0, 1, nan]))
    np.testing.assert_array_equal(judged.failed[1:], [[0] * 11, [0] * 10 + [1]])
    # What one reward can't judge is judged by the other; what one has failed with is out.
    np.testing.assert_array_equal(judged.total(), np.float32([1, nan, 3, nan, nan, nan, nan, nan, 0, 4, nan]))
    np.testing.assert_array_equal(judged.kept()[1], np.float32([0, nan, 1, nan, nan, nan, nan, nan, 0, 0, nan]))
    out, errors = capfd.readouterr()
    assert out == ""
    assert f"mine: {code}:12: ZeroDivisionError: division by zero." in errors
    faults = "took longer than rewards.mine.seconds = 2.", "ended with status 3.", "returned 'x'", "SystemExit: quits."
    for fault in faults:
        assert errors.count(fault) == 1, fault


def test_a_copy_of_a_worker_says_nothing(code):
    with judging.Judge(rewards.load({"mine": {"reward": f"{code}:forks"}})) as judge:
        judge.start()
        values = judge([sample(a) for a in ("a", "aa", "aaa")]).values
    np.testing.assert_array_equal(values, [[1, 2, 3]])


def test_processes_end_with_the_run_and_with_what_they_started(code):
    pool = workers.Pool(*spec(code, workers=2).values())
    workers.start([pool])
    numbers = [worker.process.pid for worker in pool._workers]
    assert len(set(numbers)) == 2
    os.kill(numbers[0], signal.SIGINT)  # as a terminal sends it
    assert workers.judge([pool], [sample("a")] * 9) == [[workers.Verdict(1.0)] * 9]
    assert [worker.process.pid for worker in pool._workers] == numbers  # started once
    pool.close()
    for number in numbers:
        with pytest.raises(ProcessLookupError):
            os.kill(number, 0)


def test_a_worker_whose_run_is_gone_ends(code):
    pool = workers.Pool(*spec(code).values())
    workers.start([pool])
    (worker,) = pool._workers
    worker.connection.close()
    assert worker.process.wait(60) == 0


def test_order_over_workers_and_chunks(code):
    with judging.Judge(spec(code, workers=2)) as judge:
        judged = judge([sample("a" * i) for i in range(150)])
        assert judged.values[0].tolist() == list(range(150))
        assert judge([sample("aa")]).values.tolist() == [[2]]


def test_a_reward_that_only_fails_ends_the_run(code):
    with judging.Judge(spec(code)) as judge:
        judge([sample("bug")] * 15)
        with pytest.raises(InputError, match=r"code.py:12: ZeroDivisionError.* judged none of the first 16 answers"):
            judge([sample("bug")] * 15)
    with judging.Judge(spec(code)) as judge:
        judge([sample("a")] + [sample("bug")] * 30)


def test_a_user_s_file(code):
    def start(reward, **options):
        with judging.Judge(rewards.load({"x": {"reward": reward, **options}})) as judge:
            judge.start()
            return judge([sample("a")]).values.item()

    assert start(f"{code}:listed") == 1
    with pytest.raises(InputError, match=r"^rewards.x.reward: .*code.py has no function 'mein'. Did you mean 'mine'\?"):
        start(f"{code}:mein")
    with pytest.raises(InputError, match=r"^rewards.x.scales: no such option. Did you mean 'scale'\?"):
        start(f"{code}:mine", scales=1.0)
    with pytest.raises(InputError, match=r"^rewards.x.scale = 'a': must be of type float"):
        start(f"{code}:mine", scale="a")
    code.write_text("import nowhere\n")
    with pytest.raises(InputError, match=r"code.py:1: ModuleNotFoundError: No module named 'nowhere'"):
        start(f"{code}:mine")
    code.write_text("import os\nos._exit(4)\n")
    with pytest.raises(InputError, match=r"^rewards.x: can't be made: its process ended with status 4"):
        start(f"{code}:mine")
    code.write_text("def mine(:\n")
    with pytest.raises(InputError, match=r"code.py:1: SyntaxError"):
        rewards.load({"x": {"reward": f"{code}:mine"}})


def test_a_module_beside_the_run(tmp_path, monkeypatch):
    (tmp_path / "beside_the_run.py").write_text(
        "def make(n: int = 2):\n    return lambda sample: n / len(sample.answer)\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    with judging.Judge(rewards.load({"beside_the_run": {"n": 3}})) as judge:
        judged = judge([sample("aa"), sample("")])
    assert judged.values[0, 0] == 1.5
    assert judged.failed.tolist() == [[False, True]]
