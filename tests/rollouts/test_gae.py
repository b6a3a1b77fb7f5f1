"""Advantages and returns of a critic, and rewards of tokens, against brute force and other libraries."""

import goldens
import jax
import numpy as np
import pytest

from research.errors import InputError
from research.rollouts.advantages import whiten
from research.rollouts.gae import explained_variance, gae, token_rewards
from research.rollouts.kl_penalty import KlPenalty

CASES = goldens.load("ppo")


def of(kind):
    return [case for name, case in CASES.items() if name.startswith(kind)]


def floats(x):
    return np.asarray(x, np.float32)


def brute_force(rewards, values, mask, gamma, lam):
    """The double sum of one row, over its own tokens alone."""
    advantages, real = np.zeros(len(mask)), np.flatnonzero(mask)
    r, v = rewards[real], np.append(values[real], 0.0)
    errors = r + gamma * v[1:] - v[:-1]
    for i, at in enumerate(real):
        advantages[at] = sum((gamma * lam) ** k * error for k, error in enumerate(errors[i:]))
    return advantages


@pytest.mark.parametrize(("gamma", "lam"), [(1.0, 0.95), (0.9, 1.0), (0.97, 0.0)])
def test_gae_is_the_double_sum(gamma, lam):
    rng = np.random.default_rng(0)
    rewards, values = rng.standard_normal((2, 5, 9)).astype(np.float32)
    mask = (rng.random((5, 9)) < 0.6).astype(np.float32)  # with holes
    mask[3] = 0
    garbage = np.where(mask > 0, 0, np.nan).astype(np.float32)  # what lies elsewhere doesn't count
    advantages, returns = gae(rewards + garbage, values + garbage, mask, gamma=gamma, lam=lam)
    expected = np.stack([brute_force(*row, gamma, lam) for row in zip(rewards, values, mask, strict=True)])
    np.testing.assert_allclose(advantages, expected, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(returns, expected + values * mask, rtol=1e-5, atol=1e-6)


def test_with_lambda_1_the_return_is_the_sum_of_rewards():
    rewards = np.array([[0.0, 0.0, 1.0, 0.0]], np.float32)
    values = np.array([[0.3, 0.9, 0.2, 7.0]], np.float32)
    mask = np.array([[1, 1, 1, 0]], np.float32)
    np.testing.assert_allclose(gae(rewards, values, mask, lam=1.0)[1], [[1, 1, 1, 0]], atol=1e-6)


def test_gae_refuses_what_is_no_share():
    one = np.ones((1, 1), np.float32)
    for name in ("gamma", "lam"):
        with pytest.raises(InputError, match=f"{name} = 1.5: must be in"):
            gae(one, one, one, **{name: 1.5})


def test_verl_and_torchrl():
    for case in of("verl_gae"):
        h = case.hparams
        rewards, values, mask = (floats(case.inputs[k]) for k in ("token_level_rewards", "values", "response_mask"))
        advantages, returns = gae(rewards, values, mask, gamma=h["gamma"], lam=h["lam"])
        np.testing.assert_allclose(returns, case.outputs["returns"] * mask, rtol=1e-5, atol=1e-5)
        expected = case.outputs["advantages_whitened"] * mask  # verl leaves something where there is no token
        np.testing.assert_allclose(whiten(advantages, mask), expected, rtol=1e-5, atol=1e-5)
    for case in of("torchrl_gae"):
        h = case.hparams
        rewards, values = floats(case.inputs["rewards"]), floats(case.inputs["values"])
        out = gae(rewards, values, np.ones_like(values), gamma=h["gamma"], lam=h["lam"])
        for ours, name in zip(out, ("advantages", "returns"), strict=True):
            np.testing.assert_allclose(ours, case.outputs[name].reshape(ours.shape), rtol=1e-5, atol=1e-5)


def test_trl_ppo():
    """Its values have a token more than its answers, which gets the score where it fits into the row."""
    for case in of("trl_ppo_rewards_gae"):
        x, h = case.inputs, case.hparams
        answers, mask = (1 - floats(x[name]) for name in ("padding_mask", "padding_mask_p1"))
        log_probs, reference, values, scores = (
            floats(x[name]) for name in ("logprobs", "ref_logprobs", "values", "scores")
        )
        penalty = KlPenalty(weight=0.1, estimator=h["kl_estimator"])
        kl = penalty.estimates(log_probs, reference, answers)
        np.testing.assert_allclose(kl, case.outputs["kl"], rtol=1e-5, atol=1e-6)
        rewards = token_rewards(scores, h["kl_coef"] * kl, mask)
        if h["whiten_rewards"]:
            rewards = whiten(rewards, mask, shift=False)
        np.testing.assert_allclose(rewards, case.outputs["rewards"], rtol=1e-5, atol=1e-6)
        advantages, returns = gae(rewards, values * mask, mask, gamma=h["gamma"], lam=h["lam"])
        np.testing.assert_allclose(returns, case.outputs["returns"], rtol=1e-5, atol=1e-5)
        np.testing.assert_allclose(whiten(advantages, answers), case.outputs["advantages"], rtol=1e-4, atol=1e-5)


def test_openrlhf_rewards():
    for case in of("openrlhf_reward"):
        x, low_high = case.inputs, case.hparams["reward_clip_range"]
        scores, kl = floats(np.clip(x["score"], *low_high)), floats(case.hparams["kl_coef"] * x["kl"])
        rewards = token_rewards(scores, kl, floats(x["mask"]))
        np.testing.assert_allclose(rewards, case.outputs["rewards"] * x["mask"], rtol=1e-6, atol=1e-6)


def test_explained_variance():
    mask = np.array([[1, 1, 1, 0]], np.float32)
    returns = np.array([[0, 1, 2, 50]], np.float32)
    assert explained_variance(returns, returns, mask) == 1
    assert explained_variance(np.full((1, 4), 1, np.float32), returns, mask) == 0
    np.testing.assert_allclose(explained_variance(np.array([[0, 1, 1, 9.0]], np.float32), returns, mask), 0.5)
    assert np.isnan(explained_variance(returns, 0 * returns, mask))


def test_estimators_of_the_kl():
    """All are 0 where policies agree; k1 and k3 have the KL as their mean under the policy, k2 nearly."""
    logits = np.array([[[0.3, -0.2, 0.9]], [[0.1, 0.0, 0.6]]], np.float32)
    log_p, log_q = np.asarray(jax.nn.log_softmax(logits))
    kl, mask = float(np.sum(np.exp(log_p) * (log_p - log_q))), np.ones((1, 3), np.float32)
    for kind, near in (("k1", 1e-5), ("k3", 1e-5), ("k2", 0.1)):
        penalty = KlPenalty(weight=1.0, estimator=kind)
        assert float(np.sum(np.exp(log_p) * penalty.estimates(log_p, log_q, mask))) == pytest.approx(kl, rel=near)
        assert not np.any(penalty.estimates(log_p, log_p, mask))
    assert np.all(np.isfinite(KlPenalty(weight=1.0, estimator="k3").estimates(-500 * mask, 0 * mask, mask)))
    np.testing.assert_array_equal(KlPenalty(weight=1.0, clip=0.5).estimates(-2 * mask, 0 * mask, mask), -0.5 * mask)


def test_the_controller_steers_to_its_target():
    penalty = KlPenalty(weight=0.2, target=6.0, horizon=1000)
    assert penalty.next_weight(0.2, 12.0, 100) == pytest.approx(0.2 * 1.02)  # the error is held to 0.2
    assert penalty.next_weight(0.2, 6.6, 100) == pytest.approx(0.2 * 1.01)
    assert penalty.next_weight(0.2, 0.0, 100) == pytest.approx(0.2 * 0.98)
    assert KlPenalty(weight=0.2).next_weight(0.2, 12.0, 100) == 0.2
    kl, weight = 12.0, 0.2
    for _ in range(30):  # a policy whose KL falls with the weight
        weight = float(penalty.next_weight(weight, kl, 1000))
        kl = 3.0 / weight
    assert kl == pytest.approx(6.0, rel=0.01)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"weight": -1.0}, "weight = -1.0: must be at least 0"),
        ({"weight": 1.0, "estimator": "k4"}, "estimator = 'k4': must be one of"),
        ({"target": 1.0}, "target = 1.0: has no effect with advantage.kl.weight = 0"),
        ({"weight": 1.0, "horizon": 5}, "horizon = 5: is the controller's. Set advantage.kl.target"),
        ({"weight": 1.0, "target": 1.0, "horizon": 0}, "horizon = 0: must be at least 1"),
    ],
)
def test_options_of_the_penalty_are_checked(options, message):
    with pytest.raises(InputError, match="advantage.kl." + message):
        KlPenalty(**options).check()
