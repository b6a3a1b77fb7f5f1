"""From rewards to advantages of tokens: the KL in the reward, the critic's, and what can't be judged."""

import goldens
import numpy as np
import pytest

from research.errors import InputError
from research.rollouts.advantages import AdvantageSpec
from research.rollouts.collection import Group
from research.rollouts.credit import Credit
from research.rollouts.gae import gae
from research.rollouts.kl_penalty import KlPenalty

RLOO = [case for name, case in goldens.load("advantages").items() if name.startswith("trl_rloo") and "b0.05" in name]


def rollout(rewards, mask):
    """Groups of P x G answers, whose tokens `mask` [P G, T - 1] stand behind a prompt of one."""
    P, G, _ = rewards.shape
    lengths = mask.sum(axis=1).astype(np.int32).reshape(P, G)
    stopped, none = np.ones(G, bool), np.full(rewards.shape[2], np.nan, np.float32)
    failed = np.zeros(rewards.shape[1:], bool)
    rewards = rewards.astype(np.float32)
    groups = [Group(None, None, lengths[p], None, stopped, rewards[p], failed, none) for p in range(P)]
    return groups, {"loss_mask": np.pad(mask, ((0, 0), (1, 0)))}


def placed(values, mask):
    """What is of the answers' tokens, one before them."""
    return np.pad(np.where(mask > 0, values, 0), ((0, 0), (0, 1))).astype(np.float32)


@pytest.mark.parametrize("case", RLOO, ids=lambda case: case.name)
def test_the_kl_in_the_reward_of_trls_rloo(case):
    x, h = case.inputs, case.hparams
    mask, rewards = x["completion_mask"], x["rewards_per_func"]
    rewards = rewards.reshape(-1, h["num_generations"], rewards.shape[1])
    groups, batch = rollout(rewards, mask)
    batch["old_log_prob"] = placed(x["old_per_token_logps"], mask)
    batch["reference_log_prob"] = placed(x["ref_per_token_logps"], mask)
    clip = tuple(h["reward_clip_range"])
    spec = AdvantageSpec("leave_one_out", "none", clip=clip, kl=KlPenalty(weight=h["beta"]))
    fields, carry, metrics = credit(spec, x["reward_weights"])(groups, batch, credit(spec).init())
    expected = placed(case.outputs["advantages"][:, None], mask)
    np.testing.assert_allclose(fields["advantage"], expected, rtol=1e-4, atol=1e-5)
    kl = np.sum(mask * (x["old_per_token_logps"] - x["ref_per_token_logps"]), axis=1)
    assert metrics["rollout/kl"][0] / metrics["rollout/kl"][1] == pytest.approx(kl.mean(), rel=1e-3)
    assert carry["kl_weight"] == h["beta"]


def credit(spec, weights=(1.0,)):
    return Credit(spec, np.asarray(weights), "train")


def critic_rollout():
    """Answers of 3, 1, 2 and 4 tokens; the third can't be judged."""
    rng = np.random.default_rng(0)
    mask = (np.arange(4)[None] < np.array([3, 1, 2, 4])[:, None]).astype(np.float32)
    groups, batch = rollout(np.array([1.0, 0.0, np.nan, 1.0]).reshape(2, 2, 1), mask)
    names = ("value", "old_log_prob", "reference_log_prob")
    draws = rng.standard_normal((3, 4, 4)).astype(np.float32)
    batch |= {name: placed(values, mask) for name, values in zip(names, draws, strict=True)}
    return groups, batch, mask, draws


def test_the_critics_advantages_and_returns():
    groups, batch, mask, (values, old, reference) = critic_rollout()
    spec = AdvantageSpec("critic", "none", gamma=0.9, lam=0.8, kl=KlPenalty(weight=0.1, target=2.0, horizon=8))
    fields, carry, metrics = credit(spec)(groups, batch, {"average": [0.0, 0.0], "kl_weight": 0.5})
    rewards = -0.5 * mask * (old - reference)  # by the weight that the controller has come to
    rewards[0, 2] += 1
    rewards[3, 3] += 1
    judged = mask * np.array([[1], [1], [0], [1]])
    advantages, returns = gae(rewards, values, judged, gamma=0.9, lam=0.8)
    np.testing.assert_allclose(fields["advantage"], placed(advantages, mask), rtol=1e-5, atol=1e-6)
    expected = placed(np.where(judged > 0, returns, values), mask)  # so that the critic's error is 0 there
    np.testing.assert_allclose(fields["returns"], expected, rtol=1e-5, atol=1e-6)
    kl = np.sum(mask * (old - reference), axis=1).mean()
    assert carry["kl_weight"] == pytest.approx(0.5 * (1 + np.clip(kl / 2 - 1, -0.2, 0.2) * 4 / 8))
    assert metrics["rollout/kl_weight"] == (0.5, 1.0)
    assert metrics["rollout/explained_variance"][0] < 1


@pytest.mark.parametrize("sampler", [False, True])
def test_a_kl_that_is_in_no_reward_is_reported_where_there_is_a_reference(sampler):
    groups, batch, mask, (_, old, reference) = critic_rollout()
    batch["sampler_log_prob"] = batch.pop("old_log_prob") if sampler else 0 * batch["value"]
    spec = AdvantageSpec()
    alone = {name: x for name, x in batch.items() if name != "reference_log_prob"}
    fields, carry, metrics = credit(spec)(groups, batch, credit(spec).init())
    again, _, none = credit(spec)(groups, alone, credit(spec).init())
    np.testing.assert_array_equal(fields["advantage"], again["advantage"])
    kl = np.sum(mask * (old - reference), axis=1).mean()
    assert metrics["rollout/kl"][0] / metrics["rollout/kl"][1] == pytest.approx(kl, rel=1e-4)
    assert not {"rollout/kl", "rollout/kl_weight"} & none.keys()
    assert carry["kl_weight"] == 0


def test_whitened_over_the_tokens_that_are_judged():
    groups, batch, mask, _ = critic_rollout()
    advantage = credit(AdvantageSpec("critic", "batch", "tokens"))(groups, batch, credit(AdvantageSpec()).init())[0][
        "advantage"
    ][:, :-1]
    here = advantage[(mask > 0) & (np.arange(4) != 2)[:, None]]
    np.testing.assert_allclose([here.mean(), here.std(ddof=1)], [0, 1], atol=1e-5)
    np.testing.assert_array_equal(advantage[2], 0)


@pytest.mark.parametrize("scale", ["none", "batch"])
def test_without_a_baseline_a_token_bears_the_kl_of_those_to_come(scale):
    """REINFORCE++: of a token what it decided, itself and later, and not what came before it."""
    groups, batch, mask, (_, old, reference) = critic_rollout()
    spec = AdvantageSpec("none", scale, kl=KlPenalty(weight=0.1))
    fields, _, _ = credit(spec)(groups, batch, credit(spec).init())
    penalties = 0.1 * mask * (old - reference)
    to_come = np.cumsum(penalties[:, ::-1], axis=1)[:, ::-1]
    scores = np.array([1.0, 0.0, np.nan, 1.0])
    divisor = np.nanstd(scores, ddof=1) + 1e-4 if scale == "batch" else 1
    expected = np.nan_to_num((scores[:, None] - to_come) * mask / divisor)
    np.testing.assert_allclose(fields["advantage"], placed(expected, mask), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kind": "critic"}, "advantage.scale = 'group': kind = 'critic' compares tokens"),
        ({"kind": "critic", "scale": "none", "whiten": "answers"}, "advantage.whiten = 'answers': advantages of kind"),
        ({"kind": "critic", "scale": "none", "lam": 1.1}, "advantage.lam = 1.1: must be in"),
        ({"gamma": 0.9}, "advantage.gamma = 0.9: is of kind = 'critic', and kind = 'group'"),
        ({"decay": 0.5}, "advantage.decay = 0.5: is of kind = 'ema', and kind = 'group'"),
        ({"epsilon": 1e-6, "scale": "none"}, "advantage.epsilon = 1e-06: .* nothing is divided by one"),
        ({"kind": "critic", "scale": "batch", "epsilon": 1e-6}, "advantage.epsilon = 1e-06: .* nothing is divided"),
        ({"kind": "greedy", "kl": KlPenalty(weight=0.1)}, "advantage.kl.weight = 0.1: is a part of the summed reward"),
    ],
)
def test_what_does_not_go_together_is_refused(options, message):
    with pytest.raises(InputError, match=message):
        AdvantageSpec(**options).check(answers=2, rows=4)
