"""What is selected of a batch, and the weights of sources, are those of the methods' authors."""

import goldens
import jax
import jax.numpy as jnp
import numpy as np

from research.ops import domains as domains_lib
from research.ops.head import Head
from research.ops.losses import target_log_probs
from research.ops.top_share import top_share

CASES = goldens.load("data_selection")


def test_rho_loss_of_its_authors():
    case = CASES["rho_loss"]
    logits, labels = jnp.asarray(case.inputs["logits"], jnp.float32), jnp.asarray(case.inputs["labels"], jnp.int32)
    head = Head(jnp.eye(logits.shape[-1], dtype=jnp.float32), None, 0.0)
    loss = -target_log_probs(logits[None], head, labels[None], frozen=True).target[0]
    np.testing.assert_allclose(loss, case.outputs["model_loss"], rtol=1e-5)
    reducible = loss - case.inputs["irreducible_losses"][case.inputs["global_index"]]
    np.testing.assert_allclose(reducible, case.outputs["reducible_loss"], rtol=1e-4, atol=1e-6)
    share = case.hparams["selected_batch_size"] / len(loss)
    values = jnp.asarray(reducible, jnp.float32).reshape(4, 5)
    chosen = np.flatnonzero(top_share(values, jnp.ones((4, 5), bool), share))
    assert sorted(chosen) == sorted(case.outputs["selected"].tolist())


def test_domain_weights_of_doremi():
    case = CASES["doremi"]
    h, x = case.hparams, case.inputs
    S = len(x["initial_weights"])
    domains = domains_lib.Domains(
        jnp.asarray(x["initial_weights"], jnp.float32),
        jnp.full(S, h["initial_perdomain_scores"], jnp.float32),
        jnp.zeros(S),
        jnp.zeros(()),
    )
    step = jax.jit(lambda *args: domains_lib.next_domains(*args, eta=h["reweight_eta"], epsilon=h["reweight_eps"]))
    for excess, mask, ids, expected in zip(
        x["excess_loss"], x["token_mask"], x["domain_ids"], case.outputs["weights"], strict=True
    ):
        source = jnp.broadcast_to(jnp.asarray(ids, jnp.int32)[:, None], excess.shape)
        counted = jnp.asarray(mask, jnp.float32)
        above = jnp.maximum(jnp.asarray(excess, jnp.float32), 0) * counted
        sums = (jnp.sum(domains_lib.by_source(each, source, S), axis=0) for each in (above, counted))
        domains = step(domains, *sums)
        np.testing.assert_allclose(domains.weights, expected, rtol=1e-5)
    np.testing.assert_allclose(domains.average, case.outputs["weights"].mean(axis=0), rtol=1e-5)


def test_of_equal_values_the_first_are_taken_and_the_number_is_exact():
    values = jnp.asarray([[1.0, 2.0, 2.0, 2.0], [2.0, 0.0, 5.0, 2.0]])
    counted = jnp.ones((2, 4), bool).at[1, 2].set(False)
    chosen = top_share(values, counted, 3 / 7)
    np.testing.assert_array_equal(chosen, [[False, True, True, True], [False] * 4])
    assert int(jnp.sum(top_share(values, counted, 1e-6))) == 1
    np.testing.assert_array_equal(top_share(values, counted, 1.0), counted)
    assert not top_share(values, jnp.zeros((2, 4), bool), 0.5).any()


def test_exp3_draws_the_harder_source_more_often_and_none_never():
    """By hand, in numpy: the chance of a source that isn't drawn stays above epsilon."""
    K, smoothing = 3, 0.5
    step = jax.jit(lambda *args: domains_lib.next_arms(*args, smoothing=smoothing))
    arms, rewards, epsilon, chances = domains_lib.first_arms(K), np.zeros(K), 1 / K, np.full(K, 1 / K)
    for t in range(1, 40):
        tokens = np.array([10.0, 0.0 if t % 2 else 5.0, 20.0])
        losses = np.array([5.0, 0.1, 1.0]) * tokens
        seen = tokens > 0
        rewards[seen] = smoothing * rewards[seen] + (1 - smoothing) * losses[seen] / tokens[seen] / chances[seen]
        before, epsilon = epsilon, min(1 / K, np.sqrt(np.log(K) / (K * t)))
        chances = (1 - K * epsilon) * np.exp(before * rewards) / np.exp(before * rewards).sum() + epsilon
        sums = (jnp.asarray(x, jnp.float32) for x in (losses, tokens))
        arms = step(arms, *sums)
        np.testing.assert_allclose(arms.weights, chances, rtol=1e-4)
        np.testing.assert_allclose(chances.sum(), 1, rtol=1e-9)
    assert chances[0] > chances[2] > chances[1] >= epsilon
