"""Answers as rows of a batch, and the order in which they are trained on."""

import numpy as np
import pytest

from research.rollouts import buffer
from research.rollouts.collection import Group
from research.sources.prompts import Prompt


def group(prompt, *answers, stopped=(True, True)):
    tokens, log_probs = np.zeros((2, 4), np.int32), np.zeros((2, 4), np.float32)
    for row, answer in enumerate(answers):
        tokens[row, : len(answer)] = answer
        log_probs[row, : len(answer)] = -np.arange(1, len(answer) + 1)
    asked = Prompt(np.array(prompt, np.int32), "", {}, str, 1)
    lengths = np.array([len(answer) for answer in answers], np.int32)
    nothing = np.zeros((2, 1), np.float32)
    return Group(asked, tokens, lengths, log_probs, np.array(stopped), nothing, nothing > 0, nothing[0])


GROUPS = [group([5, 6], [7, 8, 2], [2]), group([9], [], [3, 3, 3, 3], stopped=(False, False))]


@pytest.mark.parametrize("truncated", ["train", "mask"])
def test_rows(truncated):
    rows = buffer.lay_out(GROUPS, 8, range(90, 91), truncated)
    np.testing.assert_array_equal(rows["tokens"][0], [90, 5, 6, 7, 8, 2, 0, 0])
    np.testing.assert_array_equal(rows["virtual"][0], [1, 0, 0, 0, 0, 0, 0, 0])
    np.testing.assert_array_equal(rows["segment_ids"][0], [1, 1, 1, 1, 1, 1, 0, 0])
    np.testing.assert_array_equal(rows["source"][0], [1, 1, 1, 1, 1, 1, 0, 0])
    np.testing.assert_array_equal(rows["positions"][0], [0, 1, 2, 3, 4, 5, 0, 0])
    np.testing.assert_array_equal(rows["loss_mask"][0], [0, 0, 0, 1, 1, 1, 0, 0])
    np.testing.assert_array_equal(rows["sampler_log_prob"][0], [0, 0, -1, -2, -3, 0, 0, 0])
    np.testing.assert_array_equal(rows["loss_mask"].sum(axis=1), [3, 1, 0, 4 if truncated == "train" else 0])
    np.testing.assert_array_equal(rows["segment_ids"].sum(axis=1), [6, 4, 2, 6])


def test_prompts_that_are_shared_end_at_one_place():
    rows = buffer.lay_out(GROUPS, 8, range(90, 91), "train", prompts_end=4)
    np.testing.assert_array_equal(rows["tokens"][0], [0, 90, 5, 6, 7, 8, 2, 0])
    np.testing.assert_array_equal(rows["positions"][0], [0, 0, 1, 2, 3, 4, 5, 0])
    np.testing.assert_array_equal(rows["segment_ids"][3], [0, 0, 1, 1, 1, 1, 1, 1])
    np.testing.assert_array_equal(rows["sampler_log_prob"][3], [0, 0, 0, -1, -2, -3, -4, 0])
    for first, second in ((0, 1), (2, 3)):
        np.testing.assert_array_equal(rows["tokens"][first, :4], rows["tokens"][second, :4])


def test_what_is_of_an_answer_stands_where_its_tokens_are_predicted():
    rows = buffer.lay_out(GROUPS, 8, range(0), "train")
    placed = buffer.at_prediction(np.array([1.0, 2.0, 3.0, 4.0]), rows)
    assert placed.dtype == np.float32
    np.testing.assert_array_equal(placed[0], [0, 1, 1, 1, 0, 0, 0, 0])
    np.testing.assert_array_equal(placed[2], np.zeros(8))
    np.testing.assert_array_equal(placed[3], [4, 4, 4, 4, 0, 0, 0, 0])
    np.testing.assert_array_equal(placed != 0, rows["sampler_log_prob"] != 0)


def test_every_epoch_has_all_rows_once_in_another_order():
    orders = [[buffer.minibatch((0, 1), 12, 4, served) for served in range(3 * e, 3 * e + 3)] for e in range(2)]
    first, second = (np.concatenate(order) for order in orders)
    np.testing.assert_array_equal(np.sort(first), np.arange(12))
    np.testing.assert_array_equal(np.sort(second), np.arange(12))
    assert not np.array_equal(first, second)
    assert not np.array_equal(orders[0][0], buffer.minibatch((0, 2), 12, 4, 0))


@pytest.mark.parametrize("microbatches", [1, 2])
def test_answers_to_a_prompt_stay_together_in_each_microbatch(microbatches):
    parts = [
        buffer.minibatch((0, 1), 24, 12, served, together=3, microbatches=microbatches)[first::microbatches]
        for served in range(2)
        for first in range(microbatches)
    ]
    groups = np.concatenate(parts).reshape(-1, 3)
    np.testing.assert_array_equal(groups - groups[:, :1], np.tile(np.arange(3), (8, 1)))
    np.testing.assert_array_equal(np.sort(groups[:, 0]), np.arange(0, 24, 3))
