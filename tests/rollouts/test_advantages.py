"""Advantages against TRL and verl, and what must hold of any baseline."""

import goldens
import jax.numpy as jnp
import numpy as np
import pytest

from research.errors import InputError
from research.rollouts import advantages, gae
from research.rollouts.advantages import KINDS, AdvantageSpec, Facts, RunningMean

GOLDEN = goldens.load("advantages")
VERL = {  # of one reward, in float64
    "verl_grpo": AdvantageSpec("group", epsilon=1e-6),
    "verl_dr_grpo": AdvantageSpec("group", scale="none"),
    "verl_rloo": AdvantageSpec("leave_one_out", scale="none"),
    "verl_opo": AdvantageSpec("opo", scale="none"),
    "verl_remax": AdvantageSpec("greedy", scale="none"),
    "verl_reinforce_pp_baseline": AdvantageSpec("group", scale="none", whiten="tokens"),
}
ELSEWHERE = ("verl_whiten", "verl_reinforce_pp_", "verl_agg")  # below; the last in tests/ops/test_policy_losses.py


def cases(prefix):
    return [name for name in GOLDEN if name.startswith(prefix)]


def of_one(spec, rewards, **facts):
    """The advantages of one reward [P, G]."""
    rewards = np.asarray(rewards, np.float32)
    return advantages.advantages(spec, rewards[:, :, None], np.ones(1, np.float32), Facts(**facts))


@pytest.mark.parametrize("name", cases("trl_grpo"))
def test_group_advantages_are_trls(name):
    case = GOLDEN[name]
    rewards = case.inputs["rewards_per_func"]
    combined = case.hparams["multi_objective_aggregation"] == "normalize_then_sum"
    spec = (
        AdvantageSpec(combine="advantages", whiten="answers")  # GDPO; TRL then always scales by the group
        if combined
        else AdvantageSpec(scale=case.hparams["scale_rewards"])
    )
    groups = rewards.reshape(-1, case.hparams["num_generations"], rewards.shape[1])
    values = advantages.advantages(spec, groups, case.inputs["reward_weights"])
    np.testing.assert_allclose(values.ravel(), case.outputs["advantages"], rtol=2e-5, atol=2e-6)


@pytest.mark.parametrize("name", cases("trl_rloo"))
def test_leave_one_out_advantages_are_trls(name):
    case = GOLDEN[name]
    options, inputs = case.hparams, case.inputs
    clip = options["reward_clip_range"]
    rewards = inputs["rewards_per_func"].reshape(-1, options["num_generations"], inputs["rewards_per_func"].shape[1])
    total = advantages.sum_rewards(rewards, inputs["reward_weights"], clip and tuple(clip))
    gaps = (inputs["old_per_token_logps"] - inputs["ref_per_token_logps"]) * inputs["completion_mask"]
    total = total - options["beta"] * gaps.sum(1).reshape(total.shape)
    whiten = "answers" if options["normalize_advantages"] else "none"
    values = of_one(AdvantageSpec("leave_one_out", scale="none", whiten=whiten), total)
    np.testing.assert_allclose(values.ravel(), case.outputs["advantages"], rtol=3e-5, atol=3e-6)


@pytest.mark.parametrize("name", [n for prefix in VERL for n in cases(prefix + "_") if n[len(prefix) + 1 :].isdigit()])
def test_advantages_are_verls(name):
    case, spec = GOLDEN[name], VERL[name.rpartition("_")[0]]
    mask, rewards = case.inputs["response_mask"], case.inputs["token_level_rewards"].sum(1)
    index, lengths = case.inputs["group_index"], mask.sum(1)
    if spec.kind == "greedy":  # verl has a baseline for each row
        index = np.arange(len(rewards))
    width = max(np.bincount(index))
    at = (index, np.array([np.sum(index[:row] == group) for row, group in enumerate(index)]))
    grouped, longest = np.full((max(index) + 1, width), np.nan), np.zeros((max(index) + 1, width))
    grouped[at], longest[at] = rewards, lengths
    rows = of_one(spec, grouped, lengths=longest, greedy=case.inputs.get("reward_baselines"))[at]
    tokens = rows[:, None] * mask
    if spec.whiten == "tokens":
        tokens = advantages.whiten(jnp.asarray(tokens), jnp.asarray(mask))
    np.testing.assert_allclose(tokens, case.outputs["advantages"], rtol=2e-5, atol=2e-6)


@pytest.mark.parametrize("name", [n for n in cases("verl_reinforce_pp_") if "baseline" not in n])
def test_returns_to_go_whitened_are_verls(name):
    rewards, mask = (GOLDEN[name].inputs[key] for key in ("token_level_rewards", "response_mask"))
    returns, _ = gae.gae(rewards, np.zeros_like(rewards), mask, gamma=GOLDEN[name].hparams["gamma"], lam=1.0)
    np.testing.assert_allclose(returns, GOLDEN[name].outputs["returns"], rtol=1e-6)
    whitened = advantages.whiten(*(jnp.asarray(x, jnp.float32) for x in (returns, mask)))
    np.testing.assert_allclose(whitened, GOLDEN[name].outputs["advantages"], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", cases("verl_whiten"))
def test_whitening_is_verls_where_tokens_count(name):
    case = GOLDEN[name]
    values, mask = (jnp.asarray(case.inputs[k], jnp.float32) for k in ("values", "mask"))
    out = advantages.whiten(values, mask, shift=case.hparams["shift_mean"])
    np.testing.assert_allclose(out, case.outputs["out"] * case.inputs["mask"], rtol=1e-5, atol=1e-5)


def test_every_golden_case_is_compared():
    compared = (*(prefix + "_" for prefix in VERL), "trl_grpo", "trl_rloo", *ELSEWHERE)
    assert [name for name in GOLDEN if not name.startswith(compared)] == []


SPECS = [
    AdvantageSpec(kind, scale, whiten)
    for kind in KINDS
    if kind != "critic"  # of tokens: test_credit.py
    for scale in advantages.SCALES
    for whiten in advantages.WHITENINGS[:2]
]
FACTS = {"lengths": np.array([[2, 5], [1, 0]]), "greedy": np.array([0.0, 1.0]), "average": 0.3}


@pytest.mark.parametrize("spec", SPECS, ids=lambda spec: f"{spec.kind}-{spec.scale}-{spec.whiten}")
def test_advantages_are_finite_and_0_where_an_answer_is_not_judged(spec):
    nan = np.nan
    for rewards in ([[nan, 1], [0, 1]], [[nan, nan], [0, 1]], [[nan, nan], [nan, nan]], [[1, 1], [1, 1]]):
        values = of_one(spec, rewards, **FACTS)
        assert values.dtype == np.float32
        assert np.all(np.isfinite(values))
        np.testing.assert_array_equal(values[np.isnan(rewards)], 0)


@pytest.mark.parametrize("kind", [kind for kind, row in KINDS.items() if row.compares])
@pytest.mark.parametrize("scale", advantages.SCALES)
def test_a_group_that_agrees_says_exactly_nothing(kind, scale):
    values = of_one(AdvantageSpec(kind, scale), [[0.1] * 3, [0.1, 0.7, 0.4]], lengths=np.array([[3, 1, 2]] * 2))
    np.testing.assert_array_equal(values[0], 0)
    assert np.all(values[1] != 0) or kind == "group"
    np.testing.assert_array_equal(advantages.agree(np.array([[0.1] * 3, [0.1, 0.7, np.nan]])), [True, False])


def test_a_group_of_two_is_the_difference():
    half = of_one(AdvantageSpec("group", scale="none"), [[0, 1]])
    np.testing.assert_allclose(half, [[-0.5, 0.5]])
    np.testing.assert_allclose(of_one(AdvantageSpec("leave_one_out", scale="none"), [[0, 1]]), 2 * half)
    scaled = of_one(AdvantageSpec("group", epsilon=1e-9), [[0, 1], [0, 1e-3]])
    np.testing.assert_allclose(scaled, [[-(0.5**0.5), 0.5**0.5]] * 2, rtol=1e-5)  # whatever the difference


def test_gpg_gives_the_groups_that_disagree_the_weight_of_all():
    values = of_one(AdvantageSpec("gpg", scale="none"), [[1, 1], [0, 1], [0, 0], [0, 0]])
    np.testing.assert_allclose(values, [[0, 0], [-2, 2], [0, 0], [0, 0]])


def test_a_running_mean_is_a_mean_from_the_first_batch_on():
    mean = RunningMean()
    assert mean.value == 0
    mean = mean.after(np.array([1.0, np.nan, 3.0], np.float32), 0.9)
    assert mean.value == pytest.approx(2)
    assert mean.after(np.array([4.0], np.float32), 0.5).value == pytest.approx((0.1 * 0.5 * 2 + 0.5 * 4) / 0.55)
    assert mean.after(np.array([np.nan], np.float32), 0.9) == mean


def test_each_reward_compared_by_itself_keeps_a_small_one_audible():
    """GDPO: of rewards summed first, one that is a hundred times the other is all that is heard."""
    rewards = np.array([[[0, 0], [0, 1], [100, 0], [100, 1]]], np.float32)
    summed = advantages.advantages(AdvantageSpec(), rewards, np.ones(2))
    apart = advantages.advantages(AdvantageSpec(combine="advantages"), rewards, np.ones(2))
    assert summed[0, 1] - summed[0, 0] < 0.02
    np.testing.assert_allclose(apart[0, 1] - apart[0, 0], apart[0, 2] - apart[0, 0], rtol=1e-3)


def test_the_summed_reward_is_clipped_and_leaves_out_who_does_not_judge():
    rewards = np.array([[[5, np.nan], [-9, 1], [np.nan, np.nan]]], np.float32)
    total = advantages.sum_rewards(rewards, np.array([1.0, 2.0]), (-3, 4))
    np.testing.assert_array_equal(total, [[4, -3, np.nan]])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kind": "grup"}, "kind = 'grup'.*'group'"),
        ({"scale": "std"}, "scale = 'std'"),
        ({"whiten": "all"}, "whiten"),
        ({"combine": "sum"}, "combine"),
        ({"clip": (1.0, -1.0)}, "clip"),
        ({"clip": (-1.0, 1.0), "combine": "advantages"}, "clip.*sums none"),
        ({"kind": "ema", "combine": "advantages"}, "kind = 'ema'.*sums none"),
        ({"epsilon": 0.0}, "epsilon"),
        ({"decay": 1.0}, "decay"),
    ],
)
def test_wrong_options_are_refused(options, message):
    with pytest.raises(InputError, match=f"advantage.*{message}"):
        AdvantageSpec(**options)


def test_a_comparison_of_one_answer_is_refused():
    for spec in (AdvantageSpec(), AdvantageSpec("batch", scale="group")):
        with pytest.raises(InputError, match=r"rollout\.answers = 1"):
            spec.check(1, 4)
        spec.check(2, 4)
    AdvantageSpec("batch", scale="batch").check(1, 4)
    for options in ({"kind": "batch"}, {"scale": "batch"}, {"whiten": "answers"}):
        with pytest.raises(InputError, match="compares the answers of a rollout, and there is one"):
            AdvantageSpec(**{"kind": "none", "scale": "none", **options}).check(1, 1)
    AdvantageSpec("none", scale="none").check(1, 1)


@pytest.mark.parametrize("scale", ["group", "batch"])
@pytest.mark.parametrize("kind", ["none", "ema", "greedy"])
def test_rewards_that_are_all_one_are_not_divided_by_their_deviation(kind, scale):
    facts = {"greedy": np.array([0.5, 0.5]), "average": 0.5}
    values = of_one(AdvantageSpec(kind, scale), [[1.0, 1.0], [1.0, np.nan]], **facts)
    np.testing.assert_array_equal(values, np.where([[1, 1], [1, 0]], 1.0 if kind == "none" else 0.5, 0))


WITH_ITSELF = 1 - 1 / 4  # a mean of four answers that holds the answer's own reward takes a quarter of it away


@pytest.mark.parametrize("kind", KINDS)
def test_the_expected_gradient_of_a_bandit(kind):
    """Two arms, of which the right one pays 1 with probability 0.8 and the other with 0.3; the policy pulls it with
    probability s(x). The mean over prompts of advantage times d log p / dx is the true gradient 0.5 p (1 - p) within
    four standard errors, times what a mean that holds the answer's own reward takes away."""
    rng, prompts, answers, p = np.random.default_rng(0), 40_000, 4, 0.35
    right = rng.random((prompts, answers)) < p
    rewards = (rng.random((prompts, answers)) < np.where(right, 0.8, 0.3)).astype(np.float32)
    facts = {"lengths": np.ones((prompts, answers)), "greedy": rng.random(prompts) < 0.3, "average": 0.6}
    if kind == "critic":  # which expects the same of each, rightly or not
        flat = rewards.reshape(-1, 1)
        values = gae.gae(flat, np.full_like(flat, 0.4), np.ones_like(flat))[0].reshape(rewards.shape)
    else:
        values = of_one(AdvantageSpec(kind, scale="none"), rewards, **facts)
    samples = np.mean(values * (right - p), axis=1)
    true = 0.5 * p * (1 - p)
    factor = WITH_ITSELF if kind in ("group", "gpg", "opo") else 1
    if kind == "gpg":  # groups that agree give their weight to the others
        factor /= 1 - advantages.agree(rewards).mean()
    error = np.std(samples) / prompts**0.5
    assert abs(np.mean(samples) - factor * true) < 4 * error
    assert abs(np.mean(samples)) > 20 * error  # and the test can tell it from 0
