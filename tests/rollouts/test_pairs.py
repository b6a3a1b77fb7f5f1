"""The best and the worst answer of each group as a row with a comparison."""

import numpy as np
import pytest

from research.rollouts.collection import Group
from research.rollouts.pairs import Pairing
from research.sources.prompts import Prompt

NONE = np.nan


def group(rewards, stopped=(True, True, True)):
    """Three answers of 1, 2 and 3 tokens to a prompt of two."""
    tokens = np.array([[7, 0, 0], [8, 8, 0], [9, 9, 9]], np.int32)
    rewards = np.array(rewards, np.float32)[:, None]
    asked = Prompt(np.array([5, 6], np.int32), "", {}, str, 1)
    lengths, log_probs = np.array([1, 2, 3], np.int32), np.zeros((3, 3), np.float32)
    return Group(asked, tokens, lengths, log_probs, np.array(stopped), rewards, np.isnan(rewards) & False, rewards[0])


def rows(*groups, truncated="train"):
    return Pairing(14, range(90, 91), np.ones(1), truncated).lay_out(groups)


def test_the_better_answer_stands_in_front():
    batch = rows(group([0.0, 1.0, 0.5]))
    np.testing.assert_array_equal(batch["tokens"][0], [90, 5, 6, 8, 8, 90, 5, 6, 7, 0, 0, 0, 0, 0])
    np.testing.assert_array_equal(batch["virtual"][0], [1, 0, 0, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0, 0])
    np.testing.assert_array_equal(batch["segment_ids"][0], [1, 1, 1, 1, 1, 2, 2, 2, 2, 0, 0, 0, 0, 0])
    np.testing.assert_array_equal(batch["positions"][0], [0, 1, 2, 3, 4, 0, 1, 2, 3, 0, 0, 0, 0, 0])
    np.testing.assert_array_equal(batch["loss_mask"][0], [0, 0, 0, 1, 1, 0, 0, 0, 1, 0, 0, 0, 0, 0])
    np.testing.assert_array_equal(batch["pair"][0], [1] * 9 + [0] * 5)
    np.testing.assert_array_equal(batch["side"][0], [0] * 5 + [1] * 4 + [-1] * 5)
    np.testing.assert_array_equal(batch["source"][0], [1] * 9 + [0] * 5)


@pytest.mark.parametrize(
    ("rewards", "stopped", "truncated"),
    [
        ([1.0, 1.0, 1.0], (True, True, True), "train"),
        ([NONE, 1.0, NONE], (True, True, True), "train"),
        ([NONE, NONE, NONE], (True, True, True), "train"),
        ([0.0, 1.0, 1.0], (False, True, True), "leave_out"),
    ],
)
def test_where_nothing_is_to_be_compared_the_row_is_padding(rewards, stopped, truncated):
    batch = rows(group([0.0, 1.0, 0.5]), group(rewards, stopped), truncated=truncated)
    padding = {"side": -1}
    for name, values in batch.items():
        np.testing.assert_array_equal(values[1], padding.get(name, 0), err_msg=name)
    assert batch["loss_mask"][0].sum() == 3


def test_what_cannot_be_judged_is_neither():
    batch = rows(group([NONE, 0.25, 0.5]))
    np.testing.assert_array_equal(batch["tokens"][0, :11], [90, 5, 6, 9, 9, 9, 90, 5, 6, 8, 8])
