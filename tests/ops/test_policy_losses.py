"""Losses of policy gradients against TRL, verl and OpenRLHF, and what theory says of them."""

import goldens
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from research.ops import policy_losses
from research.ops.head import Head
from research.ops.losses import log_probs
from research.ops.policy_losses import AGGREGATIONS, KL, LOSSES, Options, Samples

GOLDEN = goldens.load("grpo")
ADVANTAGES = goldens.load("advantages")
TRL = {  # loss_type: kind and aggregation
    "grpo": ("ppo", "seq-mean-token-mean"),
    "bnpo": ("ppo", "token-mean"),
    "dapo": ("ppo", "token-mean"),
    "dr_grpo": ("ppo", "seq-mean-token-sum-norm"),
    "luspo": ("gspo", "seq-mean-token-sum"),
    "cispo": ("cispo", "token-mean"),
    "sapo": ("sapo", "seq-mean-token-mean"),
    "vespo": ("vespo", "token-mean"),
}
VERL = {"vanilla": "ppo", "gspo": "gspo", "geo_mean": "gmpo", "cispo": "cispo", "sapo": "sapo", "gpg": "reinforce"}
SHAPE = (6, 8)
LOG_PROBS = jnp.log(jnp.array([[0.5, 0.2, 0.9], [0.1, 0.6, 0.3]]))
MASK = jnp.array([[1.0, 1.0, 1.0], [1.0, 1.0, 0.0]])


def padded(x):
    """An array of a golden case in the shape of the largest, so that operations are compiled once."""
    sizes = SHAPE[: np.ndim(x)]
    return jnp.asarray(np.pad(x, [(0, size - n) for size, n in zip(sizes, np.shape(x), strict=True)]), jnp.float32)


def of_case(case, log_prob=None):
    """The Samples of a golden case."""
    inputs = {name: padded(value) for name, value in case.inputs.items()}
    current = inputs["per_token_logps"] if log_prob is None else log_prob
    old = inputs.get("old_per_token_logps", jax.lax.stop_gradient(current))
    advantage = inputs["advantages"]
    advantage = advantage if advantage.ndim == 2 else jnp.broadcast_to(advantage[:, None], current.shape)
    return Samples.of(current, old, advantage, inputs["mask"]), inputs


def aggregate(values, mask, mode, budget=1.0, rows=None):
    """`rows`: those that hold an answer; by default those with a token that counts."""
    rows = (jnp.sum(mask, axis=1) > 0).astype(jnp.float32) if rows is None else rows
    shares = AGGREGATIONS[mode](mask, rows, budget)
    return jnp.sum(shares.weights * values) / shares.weight


def compare(case, loss):
    """Loss and gradient of a golden case against those of `loss`, a function of log-probs."""
    compare_arrays(case.inputs["per_token_logps"], loss, case.outputs["loss"], case.outputs["grad_logps"])


def compare_arrays(log_prob, loss, expected, gradients):
    value, gradient = jax.value_and_grad(loss)(padded(log_prob))
    np.testing.assert_allclose(value, expected, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(gradient, padded(gradients), rtol=1e-4, atol=1e-6)


OF_TRL = [name for name, case in GOLDEN.items() if case.hparams.get("loss_type") in TRL]


@pytest.mark.parametrize("name", OF_TRL)
def test_losses_are_trls(name):
    case, hparams = GOLDEN[name], GOLDEN[name].hparams
    kind, aggregation = TRL[hparams["loss_type"]]
    if hparams.get("importance_sampling_level") == "sequence":
        kind = "gspo"
    options = Options()
    if "epsilon_low" in hparams:
        options = Options(hparams["epsilon_low"], hparams["epsilon_high"], hparams.get("delta"))
    if kind == "cispo":  # TRL's bound is one of the ratio itself
        options = Options(clip_low=1.0, clip_high=hparams["epsilon_high"] - 1)
    budget, beta = hparams.get("max_completion_length"), hparams.get("beta", 0.0)

    def loss(log_prob):
        samples, inputs = of_case(case, log_prob)
        out = LOSSES[kind].function(samples, options)
        values, mask = out.values, samples.mask
        keep = jnp.ones_like(mask)
        if "off_policy_mask_threshold" in hparams:
            keep = policy_losses.near_policy(samples, samples.old, hparams["off_policy_mask_threshold"])
        if "top_entropy_quantile" in hparams:
            share = hparams["top_entropy_quantile"]
            of_batch = jnp.where(mask > 0, inputs["entropies"], jnp.nan)
            # TRL compares float64 with a float32 threshold, which the median itself may miss by its rounding.
            exact = np.asarray(case.inputs["entropies"])
            exact = np.pad(exact, [(0, size - n) for size, n in zip(SHAPE, exact.shape, strict=True)])
            below = np.asarray(inputs["entropies"], np.float64) > exact
            entropies = jnp.where(below, jnp.nextafter(inputs["entropies"], jnp.zeros_like(mask)), inputs["entropies"])
            keep = policy_losses.high_entropy(entropies, of_batch, share)
        values = values * keep
        if beta:
            estimate = KL["k3_ratio" if hparams.get("use_bias_correction_kl") else "k3"]
            kl = estimate.function(log_prob, inputs["ref_per_token_logps"], log_prob - samples.old)
            values += beta * kl
            if "kl" in case.outputs:
                np.testing.assert_allclose(
                    jax.lax.stop_gradient(aggregate(kl, mask, "token-mean")), case.outputs["kl"], rtol=1e-5
                )
        if "entropy_coef" in hparams:
            values -= hparams["entropy_coef"] * inputs["entropies"]
        return aggregate(values, mask, aggregation, budget)

    compare(case, loss)
    if "clip_ratio_low_mean" in case.outputs:
        samples, _ = of_case(case)
        out = LOSSES[kind].function(samples, options)
        share = "seq-mean-token-mean" if kind == "gspo" else "token-mean"  # TRL counts an answer's ratio once
        for side, flags in (("low", out.low), ("high", out.high), ("region", out.low + out.high)):
            value = aggregate(flags, samples.mask, share)
            np.testing.assert_allclose(value, case.outputs[f"clip_ratio_{side}_mean"], atol=1e-6)


def test_gmpo_is_trls():
    for name in ("gmpo_0", "gmpo_1"):
        options = Options(GOLDEN[name].hparams["epsilon_low"], GOLDEN[name].hparams["epsilon_high"])
        compare(GOLDEN[name], lambda x, name=name, options=options: of_golden(name, "gmpo", options, x)[0])


def of_golden(name, kind, options, log_prob, mode=None):
    """The loss of a case, and what the loss made of tokens."""
    samples, _ = of_case(GOLDEN[name], log_prob)
    out = LOSSES[kind].function(samples, options)
    budget = GOLDEN[name].inputs["mask"].shape[1]  # verl's
    return aggregate(out.values, samples.mask, mode or LOSSES[kind].aggregation, budget), out


OF_VERL = [name for name in GOLDEN if name.startswith("verl_")]


@pytest.mark.parametrize("name", OF_VERL)
def test_losses_are_verls(name):
    case, hparams = GOLDEN[name], GOLDEN[name].hparams
    kind = next(ours for verl, ours in VERL.items() if name.startswith(f"verl_{verl}_"))
    dual = hparams["clip_ratio_c"] if kind == "ppo" else None
    options = Options(
        hparams["clip_ratio_low"], hparams["clip_ratio_high"], dual, hparams["tau_pos"], hparams["tau_neg"]
    )
    mode = "seq-mean-token-mean" if kind == "gmpo" else hparams["loss_agg_mode"]  # verl's geo_mean reads no mode
    compare(case, lambda x: of_golden(name, kind, options, x, mode)[0])
    samples, _ = of_case(case)
    out = LOSSES[kind].function(samples, options)
    if kind == "ppo":
        held = aggregate(out.low + out.high, samples.mask, "token-mean")
        np.testing.assert_allclose(held, case.outputs["pg_clipfrac"], atol=1e-6)
        dual = aggregate(out.dual, samples.mask, "token-mean")
        np.testing.assert_allclose(dual, case.outputs["pg_clipfrac_lower"], atol=1e-6)
        np.testing.assert_allclose(
            aggregate(-samples.log_ratio(), samples.mask, "token-mean"), case.outputs["ppo_kl"], atol=1e-6
        )


OF_OPENRLHF = [name for name in GOLDEN if name.startswith("openrlhf_")]


@pytest.mark.parametrize("name", OF_OPENRLHF)
def test_losses_are_openrlhfs(name):
    hparams = GOLDEN[name].hparams
    kind = "gspo" if hparams.get("policy_loss_type") == "gspo" else "ppo"
    options = Options(hparams.get("clip_eps_low", 0.2), hparams.get("clip_eps_high", 0.2), hparams.get("dual_clip"))
    mode = "token-mean" if hparams.get("token_level_loss", kind == "ppo") else "seq-mean-token-mean"
    compare(GOLDEN[name], lambda x: of_golden(name, kind, options, x, mode)[0])


@pytest.mark.parametrize("name", [name for name in GOLDEN if name.startswith("kl_estimators")])
def test_estimates_of_the_kl_are_verls_and_openrlhfs(name):
    inputs = {key: padded(value) for key, value in GOLDEN[name].inputs.items()}
    for estimate in (policy_losses.k1, policy_losses.k2, policy_losses.k3):
        values = estimate(inputs["per_token_logps"], inputs["ref_per_token_logps"])
        for kind in (estimate.__name__, f"{estimate.__name__}_openrlhf"):
            np.testing.assert_allclose(values, padded(GOLDEN[name].outputs[kind]), rtol=1e-5, atol=1e-6)


def test_every_golden_case_of_losses_is_compared():
    seen = {*OF_TRL, *OF_VERL, *OF_OPENRLHF, "gmpo_0", "gmpo_1", "kl_estimators_0", "kl_estimators_1"}
    assert set(GOLDEN) == seen


@pytest.mark.parametrize(
    "name", [n for n in ADVANTAGES if n.startswith("verl_agg") and not n.startswith("verl_agg_token-sum")]
)
def test_aggregations_are_verls(name):
    case = ADVANTAGES[name]
    values, mask = (jnp.asarray(case.inputs[key], jnp.float32) for key in ("values", "mask"))
    value = aggregate(values, mask, case.hparams["loss_agg_mode"], values.shape[1])
    np.testing.assert_allclose(value, case.outputs["out"], rtol=1e-5)


def test_a_sum_without_a_divisor_is_not_offered():
    """Nothing that it could be divided by adds up over microbatches; the fixed budget is its mean over answers."""
    assert "token-sum" not in AGGREGATIONS


def defaults(kind, **values):
    return Options(**{**LOSSES[kind].defaults, **values})


A = jnp.array([[1.5, 1.5, 1.5], [-0.5, -0.5, -0.5]])


@pytest.mark.parametrize("kind", [kind for kind, row in LOSSES.items() if row.ratio])
def test_on_policy_the_loss_is_minus_the_weighted_sum_of_advantages(kind):
    """And its gradient is not 0, though the loss of centred advantages may be."""

    def loss(log_prob):
        samples = Samples.of(log_prob, jax.lax.stop_gradient(log_prob), A, MASK)
        return aggregate(LOSSES[kind].function(samples, defaults(kind)).values, MASK, LOSSES[kind].aggregation)

    value, gradient = jax.jit(jax.value_and_grad(loss))(LOG_PROBS)
    weights = MASK / 5 if LOSSES[kind].aggregation == "token-mean" else MASK / jnp.array([[6.0], [4.0]])
    about = {
        "cispo": LOG_PROBS,
        "vespo": LOG_PROBS,
        "sapo": 2 / jnp.where(A > 0, 1.0, 1.05),
    }  # what A is times, if not r
    weighted = -jnp.sum(weights * A * about.get(kind, 1))
    np.testing.assert_allclose(value, weighted, rtol=1e-6)
    scale = jnp.array([[3.0], [2.0]]) if kind == "ppo_sequence" else 1  # of a product each factor has the gradient
    np.testing.assert_allclose(gradient, -weights * A * scale, rtol=1e-5)


@pytest.mark.parametrize("kind", LOSSES)
def test_no_ratio_overflows_and_nothing_outside_of_the_mask_is_read(kind):
    far = jnp.array([[-900.0, 900.0, -30.0], [900.0, -1e-9, jnp.nan]])

    def loss(log_prob):
        samples = Samples.of(log_prob, jnp.zeros_like(far), A, MASK)
        return aggregate(LOSSES[kind].function(samples, defaults(kind)).values, MASK, LOSSES[kind].aggregation)

    value, gradient = jax.jit(jax.value_and_grad(loss))(far)
    assert np.isfinite(value)
    assert np.all(np.isfinite(gradient))
    assert gradient[1, 2] == 0


@pytest.mark.parametrize("kind", LOSSES)
def test_an_answer_without_tokens_counts_nothing(kind):
    """It changes neither the loss of the others nor, but for the fixed budget, what that is divided by."""

    @jax.jit
    def by_mode(samples):
        out = LOSSES[kind].function(samples, defaults(kind))
        rows = jnp.ones(len(samples.mask))
        return {mode: aggregate(out.values, samples.mask, mode, rows=rows) for mode in AGGREGATIONS}

    samples = Samples.of(LOG_PROBS, LOG_PROBS - 0.1, A, MASK.at[1].set(0))
    alone, both = by_mode(Samples(*(x[:1] for x in samples))), by_mode(samples)
    alone["seq-mean-token-sum-norm"] /= 2
    assert both == pytest.approx({mode: float(value) for mode, value in alone.items()}, rel=1e-6)


def test_where_nothing_counts_the_divisor_is_0():
    for mode, shares in AGGREGATIONS.items():
        weight = shares(jnp.zeros((2, 3)), jnp.ones(2), 3.0).weight
        assert (weight == 0) != (mode == "seq-mean-token-sum-norm")  # the budget is fixed: see objectives


def test_clips_hold_the_ratio_and_take_the_gradient():
    """Of r = 2 and 1/2: a good token that has risen and a bad one that has fallen teach nothing more; with a dual clip
    a bad one that has risen neither."""
    old = LOG_PROBS[:1] - jnp.log(jnp.array([[2.0, 0.5, 2.0]]))
    advantage, mask = jnp.array([[1.0, -1.0, -1.0]]), jnp.ones((1, 3))

    def loss(log_prob, options):
        return jnp.sum(LOSSES["ppo"].function(Samples.of(log_prob, old, advantage, mask), options).values)

    of = jax.jit(jax.value_and_grad(loss), static_argnums=1)
    value, gradient = of(LOG_PROBS[:1], Options(0.2, 0.3))
    np.testing.assert_allclose(value, -1.3 + 0.8 + 2, rtol=1e-6)
    np.testing.assert_allclose(gradient, [[0, 0, 2]], rtol=1e-6)
    value, gradient = of(LOG_PROBS[:1], Options(0.2, 0.3, dual_clip=1.5))
    np.testing.assert_allclose(value, -1.3 + 0.8 + 1.5, rtol=1e-6)
    np.testing.assert_allclose(gradient, [[0, 0, 0]], atol=1e-7)


LOGITS, OLD_LOGITS, REFERENCE = (jnp.array(x) for x in ([0.3, -1.0, 0.8], [1.0, -0.5, 0.0], [-0.2, 0.4, 0.5]))


def exact_kl(p, q):
    p, q = jax.nn.log_softmax(p), jax.nn.log_softmax(q)
    return jnp.sum(jnp.exp(p) * (p - q))


@pytest.mark.parametrize("kind", KL)
@pytest.mark.parametrize("on_policy", [True, False])
def test_the_expected_gradient_of_a_kl_is_that_of_the_divergence_that_it_follows(kind, on_policy):
    """The expectation is over the tokens of a sampler, each in turn with its probability."""
    sampler = LOGITS if on_policy else OLD_LOGITS

    def expected(logits):
        p, old, ref = (jax.nn.log_softmax(x) for x in (logits, sampler, REFERENCE))
        return jnp.sum(jnp.exp(old) * KL[kind].function(p, ref, p - old))

    true = {
        "KL(policy || reference)": jax.grad(lambda x: exact_kl(x, REFERENCE)),
        "KL(reference || policy)": jax.grad(lambda x: exact_kl(REFERENCE, x)),
    }
    gradient = jax.grad(expected)(LOGITS)
    same = {name: bool(np.allclose(gradient, of(LOGITS), rtol=1e-5)) for name, of in true.items()}
    holds = on_policy or not KL[kind].on_policy
    assert same == {name: name == KL[kind].follows and holds for name in true}


def test_k1_alone_teaches_nothing():
    """Its expected gradient is 0, which is why KL has no row for it."""
    p = jax.nn.softmax(LOGITS)
    gradient = jax.grad(lambda x: jnp.sum(p * policy_losses.k1(jax.nn.log_softmax(x), jax.nn.log_softmax(REFERENCE))))(
        LOGITS
    )
    np.testing.assert_allclose(gradient, 0, atol=1e-7)
    assert "k1" not in KL


@pytest.mark.parametrize("kind", KL)
def test_a_kl_far_from_the_reference_is_finite(kind):
    far = jnp.array([-900.0, 900.0])
    value, gradient = jax.jit(jax.value_and_grad(lambda x: jnp.sum(KL[kind].function(x, -far, x))))(far)
    assert np.isfinite(value)
    assert np.all(np.isfinite(gradient))


def test_weights_of_another_sampler_are_held_or_dropped():
    sampler, mask = jnp.log(jnp.array([[0.5, 0.1, 0.9], [0.1, 0.1, 0.3]])), MASK
    weigh = lambda **o: policy_losses.importance(LOG_PROBS, sampler, mask, **o)  # noqa: E731
    token = {"sequence": False, "bounds": (0.0, 1.5)}
    np.testing.assert_allclose(weigh(drop=False, **token), [[1, 1.5, 1], [1, 1.5, 0]], rtol=1e-5)
    np.testing.assert_allclose(weigh(drop=True, **token), [[1, 0, 1], [1, 0, 0]], rtol=1e-5)
    answers = {"sequence": True, "bounds": (0.0, 5.0)}
    np.testing.assert_allclose(weigh(drop=False, **answers), [[2, 2, 2], [5, 5, 0]], rtol=1e-5)
    np.testing.assert_allclose(weigh(drop=True, **answers), [[2, 2, 2], [0, 0, 0]], rtol=1e-5)


def test_bad_answers_that_the_policy_has_left_teach_nothing():
    sampler = LOG_PROBS + jnp.array([[0.5], [0.5]])
    samples = Samples.of(LOG_PROBS, sampler, A, MASK)
    np.testing.assert_array_equal(policy_losses.near_policy(samples, sampler, 0.4), [[1, 1, 1], [0, 0, 1]])
    np.testing.assert_array_equal(policy_losses.near_policy(samples, sampler, 0.6), np.ones((2, 3)))


PPO = goldens.load("ppo")


@pytest.mark.parametrize("name", [name for name in PPO if name.startswith("trl_ppo_loss")])
def test_the_loss_of_trls_ppo_trainer(name):
    inputs, clip = PPO[name].inputs, PPO[name].hparams["cliprange"]
    old, advantage, mask = padded(inputs["old_logprobs"]), padded(inputs["advantages"]), padded(~inputs["padding_mask"])

    def loss(log_prob):
        samples = Samples.of(log_prob, old, advantage, mask)
        return aggregate(LOSSES["ppo"].function(samples, Options(clip, clip)).values, mask, "token-mean")

    compare_arrays(inputs["new_logprobs"], loss, PPO[name].outputs["pg_loss"], PPO[name].outputs["grad_logprobs"])


def test_the_loss_of_trls_rloo_trainer():
    case = PPO["trl_rloo_loss_0"]
    sums, advantage, mask = (padded(case.inputs[key]) for key in ("old_sequence_logps", "advantages", "mask"))
    old = mask * (sums / jnp.maximum(jnp.sum(mask, axis=1), 1))[:, None]  # of the answer only the sum is known
    options = Options(case.hparams["epsilon_low"], case.hparams["epsilon_high"])

    def loss(log_prob):
        samples = Samples.of(log_prob, old, jnp.broadcast_to(advantage[:, None], mask.shape), mask)
        out = LOSSES["ppo_sequence"].function(samples, options)
        return aggregate(out.values, mask, LOSSES["ppo_sequence"].aggregation)

    compare(case, loss)


def test_entropies_are_verls():
    for name in ("verl_entropy_0_1.0", "verl_entropy_1_1.0"):
        logits, mask = PPO[name].inputs["logits"], padded(PPO[name].inputs["mask"])
        logits = np.pad(logits, [(0, SHAPE[0] - logits.shape[0]), (0, SHAPE[1] - logits.shape[1]), (0, 0)]).astype(
            np.float32
        )
        head = Head(jnp.eye(logits.shape[-1]), None, 0.0)
        out = log_probs(jnp.asarray(logits), head, jnp.zeros(SHAPE, jnp.int32), chunk=SHAPE[1])
        np.testing.assert_allclose(aggregate(out.entropy, mask, "token-mean"), PPO[name].outputs["entropy"], rtol=1e-5)
