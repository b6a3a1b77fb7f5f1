"""What a run says of rewards that tell no answers apart."""

import pytest

from research.rollouts.notices import Constant

REWARDS = {"exact_match": 1.0, "format": {"weight": 0.5, "tags": ("think",)}, "length": {"weight": 0.0, "most": 3}}


def rollout(name, value, deviation=0.0):
    return {f"reward/{name}": value, f"reward/{name}/deviation": deviation}


def test_a_reward_that_gives_all_answers_of_five_rollouts_one_number_is_told_once():
    tell, told = Constant(REWARDS), []
    for _ in range(12):
        told += tell({"loss": 0.1})  # an update without a rollout before it
        told += tell(rollout("exact_match", 0.0) | rollout("format", 0.2, 0.1) | rollout("length", -1.0))
    (line,) = told
    assert line.startswith("rewards.exact_match: gives 0 to every answer of 5 rollouts")


@pytest.mark.parametrize("between", [rollout("format", 0.5, 0.5), rollout("format", 1.0)])
def test_one_that_has_told_answers_apart_meanwhile_begins_anew(between):
    tell = Constant(REWARDS)
    told = [tell(values) for values in [rollout("format", 0.0)] * 4 + [between] + [rollout("format", 0.0)] * 5]
    assert [bool(lines) for lines in told] == [False] * 9 + [True]


def test_a_rollout_that_a_reward_does_not_judge_says_nothing_of_it():
    tell = Constant(REWARDS)
    told = [tell(values) for values in ([rollout("format", 0.0), {"reward/format/unjudged": 1.0}] * 5)]
    assert [bool(lines) for lines in told] == [False] * 8 + [True, False]
