"""The rollout that waits: what checkpoints have of it, and what happens where drawing it fails."""

import concurrent.futures
import json
import threading

import numpy as np
import pytest

from research.rollouts.ahead import OF_GROUPS, Drawn, UnderWay, restored
from research.rollouts.collection import Group


def drawn():
    rng = np.random.default_rng(0)
    rewards = rng.random((3, 2, 2)).astype(np.float32)
    rewards[0, 1] = np.nan
    lengths = np.array([[1, 2], [3, 4], [5, 6]], np.int32)
    groups = [
        Group(None, None, lengths[p], None, np.array([True, p > 1]), rewards[p], rewards[p] > 2, rewards[p, 0])
        for p in range(3)
    ]
    rows = {"tokens": rng.integers(0, 9, (6, 4)).astype(np.int32)}
    return Drawn(rows, groups, 7, 20, {"reward": (1 / 3, 6.0)})


def test_a_checkpoint_has_what_credit_reads():
    whole = drawn()
    again = restored(whole.arrays(), json.loads(json.dumps(whole.facts())))
    assert (again.row, again.version, again.metrics) == (whole.row, whole.version, whole.metrics)
    np.testing.assert_array_equal(again.rows["tokens"], whole.rows["tokens"])
    assert again.rows.keys() == whole.rows.keys()
    for a, b in zip(again.groups, whole.groups, strict=True):
        for name in OF_GROUPS:
            np.testing.assert_array_equal(getattr(a, name), getattr(b, name))


def test_a_rollout_is_waited_for_and_its_errors_are_raised():
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        under_way, ready = UnderWay(pool), threading.Event()
        assert under_way.get(1) is None
        under_way.begin(2, lambda: (ready.wait(), drawn())[1])
        ready.set()
        assert under_way.get(3) is None
        assert under_way.get(2).row == 7
        assert under_way.get(2) is under_way.get(2)
        under_way.begin(3, lambda: 1 // 0)
        with pytest.raises(ZeroDivisionError):
            under_way.get(3)
    at_once = UnderWay(None)
    at_once.begin(1, drawn)
    assert not at_once.apart
    assert at_once.get(1).version == 20
