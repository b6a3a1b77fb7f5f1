"""A third opinion: polgrad 0.2.1 (PyPI, on torch) says the same of the losses, KLs and advantages that it has.

Not in the test dependencies: `pip install torch polgrad==0.2.1`, then `pytest -m slow tests/ops/test_polgrad.py`.
"""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from research.ops import policy_losses
from research.ops.policy_losses import AGGREGATIONS, KL, LOSSES, Options, Samples
from research.rollouts import advantages
from research.rollouts.advantages import AdvantageSpec

torch = pytest.importorskip("torch")
polgrad = pytest.importorskip("polgrad")
pytestmark = pytest.mark.slow

B, T, BUDGET = 6, 7, 9
RNG = np.random.default_rng(0)
MASK = (np.arange(T) < np.array([7, 3, 1, 5, 4, 6])[:, None]).astype(np.float32)
LOG_PROB, OLD, SAMPLER, REFERENCE = (
    (np.log(RNG.uniform(0.05, 0.95, (B, T))) if i == 0 else 0.3 * RNG.standard_normal((B, T))).astype(np.float32)
    for i in range(4)
)
OLD, SAMPLER, REFERENCE = OLD + LOG_PROB, SAMPLER + LOG_PROB, REFERENCE + LOG_PROB
ADVANTAGE = RNG.standard_normal((B, T)).astype(np.float32)
ANSWERS = np.repeat(ADVANTAGE[:, :1], T, axis=1)  # one advantage for each answer

NAMES = {
    "token-mean": "TOKEN_MEAN",
    "seq-mean-token-sum": "SEQ_MEAN_TOKEN_SUM",
    "seq-mean-token-mean": "SEQ_MEAN_TOKEN_MEAN",
    "seq-mean-token-sum-norm": "TOKEN_SUM_NORM",
}
KINDS = {  # ours: (surrogate, ratio, clips, advantages of each token)
    "reinforce": ("REINFORCE", "TOKEN", None, True),
    "ppo": ("PG_CLIP", "TOKEN", (0.1, 0.3, None), True),
    "ppo, dual": ("PG_CLIP", "TOKEN", (0.1, 0.2, 1.3), True),
    "gspo": ("PG_CLIP", "SEQUENCE", (0.05, 0.08, None), False),
    "gspo, of tokens": ("PG_CLIP", "SEQUENCE_TOKEN", (0.05, 0.08, None), True),
    "cispo": ("CISPO", "TOKEN", (0.2, 0.3, None), True),
}


def ours(kind, aggregation, advantage, options, extra):
    """The loss as a function of log-probs."""
    mask = jnp.asarray(MASK)

    def loss(log_prob):
        samples = Samples.of(log_prob, jnp.asarray(OLD), jnp.asarray(advantage), mask)
        values = LOSSES[kind].function(samples, options).values
        if extra in ("token", "sequence"):
            values *= policy_losses.importance(
                samples.old, jnp.asarray(SAMPLER), mask, sequence=extra == "sequence", bounds=(0.0, 1.2), drop=False
            )
        if extra in KL:
            values += 0.3 * mask * KL[extra].function(log_prob, jnp.asarray(REFERENCE), log_prob - samples.old)
        shares = AGGREGATIONS[aggregation](mask, jnp.ones(B), BUDGET)
        return jnp.sum(shares.weights * values) / shares.weight

    return jax.jit(jax.value_and_grad(loss))(jnp.asarray(LOG_PROB))


def of_polgrad(kind, aggregation, advantage, extra):
    surrogate, ratio, clips, _ = KINDS[kind]
    tensor = lambda x: torch.tensor(x, dtype=torch.float64)  # noqa: E731
    log_prob = tensor(LOG_PROB).requires_grad_()
    config = polgrad.PolicyLossConfig(
        ratio=polgrad.RatioKind[ratio],
        surrogate=polgrad.SurrogateKind[surrogate],
        clip=None if clips is None else polgrad.ClipConfig(*clips),
        aggregation=polgrad.Aggregation[NAMES[aggregation]],
        norm_len=BUDGET,
        is_correction=polgrad.ISCorrectionConfig(1.2, extra) if extra in ("token", "sequence") else None,
        kl=polgrad.KLLossConfig(polgrad.KLEstimator[extra.upper()], 0.3) if extra in KL else None,
    )
    result = polgrad.policy_loss(
        config,
        logprobs=log_prob,
        old_logprobs=tensor(OLD),
        advantages=tensor(advantage),
        response_mask=torch.tensor(MASK > 0),
        ref_logprobs=tensor(REFERENCE),
        rollout_logprobs=tensor(SAMPLER),
    )
    result.loss.backward()
    return result.loss.item(), log_prob.grad.numpy()


# Where tokens of an answer weigh differently, GSPO and GSPO-token, which ours is, differ.
CASES = [
    case
    for case in itertools.product(KINDS, AGGREGATIONS, ("", "token", "sequence", "k2", "k3"))
    if (case[0], case[2]) != ("gspo", "token")
]


@pytest.mark.parametrize(("kind", "aggregation", "extra"), CASES)
def test_losses_are_polgrads(kind, aggregation, extra):
    *_, clips, of_tokens = KINDS[kind]
    advantage, name = ADVANTAGE if of_tokens else ANSWERS, kind.partition(",")[0]
    options = Options() if clips is None else Options(*clips)
    value, gradient = ours(name, aggregation, advantage, options, extra)
    loss, expected = of_polgrad(kind, aggregation, advantage, extra)
    np.testing.assert_allclose(value, loss, rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(gradient, expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("kind", ["k1", "k2", "k3"])
def test_estimates_of_the_kl_are_polgrads(kind):
    values = getattr(policy_losses, kind)(jnp.asarray(LOG_PROB), jnp.asarray(REFERENCE)) * MASK
    tensors = torch.tensor(LOG_PROB), torch.tensor(REFERENCE)
    expected = polgrad.kl_estimate(*tensors, polgrad.KLEstimator[kind.upper()], response_mask=torch.tensor(MASK > 0))
    np.testing.assert_allclose(values, expected, rtol=1e-4, atol=1e-6)


def test_advantages_are_polgrads():
    rewards = RNG.standard_normal((5, 4)).astype(np.float32)
    flat, groups = torch.tensor(rewards).ravel(), torch.arange(5).repeat_interleave(4)
    of = lambda **options: advantages.advantages(AdvantageSpec(**options), rewards[..., None], np.ones(1)).ravel()  # noqa: E731
    config = polgrad.GroupNormConfig(center=True, scale="std", eps=1e-4)
    np.testing.assert_allclose(of(), polgrad.grpo_advantages(flat, groups, config), rtol=1e-4)
    config = polgrad.GroupNormConfig(center=True, scale="none")
    np.testing.assert_allclose(of(scale="none"), polgrad.grpo_advantages(flat, groups, config), rtol=1e-4, atol=1e-6)
    leave_one_out = polgrad.rloo_advantages(flat, groups)
    np.testing.assert_allclose(of(kind="leave_one_out", scale="none"), leave_one_out, rtol=1e-4, atol=1e-6)
    whitened = advantages.whiten(jnp.asarray(ADVANTAGE), jnp.asarray(MASK))
    expected = polgrad.whiten(torch.tensor(ADVANTAGE), torch.tensor(MASK > 0), shift_mean=True)
    np.testing.assert_allclose(whitened * MASK, expected * MASK, rtol=1e-4, atol=1e-5)
