"""What a config says of rollouts, and what of it can't be."""

import pytest
from runs import small

from research import config
from research.errors import InputError
from research.rollouts.spec import RolloutSpec, Sizes, sizes

REWARDS = {"rewards": {"exact_match": 1.0}, "data": {"path": "tasks:copy", "pack": False}, "batch_size": 8}


def test_sizes():
    assert sizes(RolloutSpec(answers=4), 8) == Sizes(2, 4, 8, 1)
    several = sizes(RolloutSpec(prompts=6, answers=4, epochs=3), 8)
    assert (several.rows, several.minibatches, several.updates) == (24, 3, 9)
    pairs = sizes(RolloutSpec(prompts=16, answers=3, epochs=2, pairs=True), 8)
    assert (pairs.rows, pairs.minibatches, pairs.updates) == (16, 2, 4)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"rewards": {}, "rollout": {"answers": 4}}, r"rollout\.answers = 4: has no effect without rewards"),
        (
            {"rewards": {}, "advantage": {"scale": "batch"}},
            r"advantage\.scale = 'batch': has no effect without rewards",
        ),
        ({"rewards": {}, "rollout": {"ahead": True}}, r"rollout\.ahead = True: has no effect without rewards"),
        (
            {"rollout": {"pairs": True, "prompts": 12}},
            r"rollout\.prompts = 12: with rollout\.pairs = True each gives one",
        ),
        (
            {"rollout": {"pairs": True, "answers": 1}},
            r"rollout\.answers = 1: rollout\.pairs = True compares the answers",
        ),
        (
            {"rollout": {"pairs": True, "truncated": "mask"}},
            r"rollout\.truncated = 'mask': keeps the rewards of answers",
        ),
        (
            {"rollout": {"pairs": True}, "advantage": {"scale": "none"}},
            r"advantage\.scale = 'none': has no effect with rollout\.pairs = True",
        ),
        ({"rollout": {"share": 0.5}}, r"rollout\.share = 0\.5: with rewards all answers are the policy's"),
        ({"data": {"path": "tasks:copy"}}, r"data\.pack = True: with rewards the policy answers one prompt a row"),
        ({"rollout": {"temperature": 0.0}}, r"rollout\.temperature = 0\.0: gives one answer again and again"),
        ({"rollout": {"answers": 3}}, r"batch_size = 8: counts answers, and isn't a multiple of rollout\.answers = 3"),
        ({"rollout": {"prompts": 3, "answers": 2}}, r"rollout\.prompts x rollout\.answers = 3 x 2 = 6: isn't a mult"),
        ({"rollout": {"answers": 1}}, r"advantage\.kind = 'group': compares the answers to one prompt"),
        ({"rewards": {"exact_match": 0, "length": {"most": 3, "weight": 0.0}}}, r"rewards = .*: all have the weight 0"),
        ({"rollout": {"epochs": 0}}, r"rollout\.epochs = 0: must be at least 1"),
        ({"rollout": {"truncated": "drop"}}, r"rollout\.truncated = 'drop': must be one of train, mask, leave_out"),
        ({"rewards": {"exact_mach": 1.0}}, r"rewards\.exact_mach: no module .* 'exact_match'"),
    ],
)
def test_what_cannot_be_is_named(fields, message):
    with pytest.raises(InputError, match=message):
        config.check(small(**{**REWARDS, **fields}), num_devices=1)


def test_a_whole_config():
    config.check(small(**REWARDS), num_devices=1)
    assert RolloutSpec(top_k=5, min_p=0.1).cut_short == "rollout.top_k = 5, rollout.min_p = 0.1"
    assert RolloutSpec().cut_short == ""
