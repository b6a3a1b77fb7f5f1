"""Losses of reward models against those that others published, and against their formulas; what a row compares."""

import functools
import itertools

import goldens
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from research.ops import rewards

GOLDENS = goldens.load("reward")


@functools.partial(jax.jit, static_argnames="coefficient")
@functools.partial(jax.value_and_grad, argnums=(0, 1))
def mean_loss(chosen, rejected, margin, coefficient):
    each = rewards.bradley_terry(chosen, rejected, margin) + coefficient * rewards.centering(chosen, rejected)
    return jnp.mean(each)


@pytest.mark.parametrize("name", [name for name in GOLDENS if name != "reward_llama"])
def test_losses_of_pairs_are_those_of_trl_and_openrlhf(name):
    case = GOLDENS[name]
    coefficient = case.hparams.get("center_rewards_coefficient") or 0.0
    with jax.enable_x64(True):
        pair = [jnp.asarray(case.inputs[side], jnp.float64) for side in ("chosen", "rejected")]
        margin = jnp.asarray(case.inputs["margin"], jnp.float64) if "margin" in case.inputs else jnp.zeros_like(pair[0])
        margin = jnp.zeros_like(margin) if name.startswith("LogExp") else margin  # which knows of none
        value, gradients = mean_loss(*pair, margin, coefficient)
    tight = {"rtol": 1e-9, "atol": 1e-12}
    np.testing.assert_allclose(value, case.outputs["loss"], **tight)
    for side, gradient in zip(("grad_chosen", "grad_rejected"), gradients, strict=True):
        if side in case.outputs:
            np.testing.assert_allclose(gradient, case.outputs[side], **tight)


def test_smoothed_labels_are_the_loss_of_swapped_answers():
    chosen, rejected, margin = np.array([1.0, -2.0]), np.array([0.5, 3.0]), np.array([0.0, 0.7])
    smoothed = rewards.bradley_terry(chosen, rejected, margin, label_smoothing=0.1)
    both = rewards.bradley_terry(chosen, rejected, margin), rewards.bradley_terry(rejected, chosen, margin)
    np.testing.assert_allclose(smoothed, 0.9 * both[0] + 0.1 * both[1], rtol=1e-6)
    p = 1 / (1 + np.exp(margin - chosen + rejected))
    flipped = rewards.bradley_terry(chosen, rejected, margin, flipped=0.1)
    np.testing.assert_allclose(flipped, -np.log(0.9 * p + 0.1 * (1 - p)), rtol=1e-6)
    equal = rewards.bradley_terry(jnp.ones(1), jnp.ones(1), label_smoothing=0.3)
    np.testing.assert_allclose(equal, np.log(2), rtol=1e-6)


# A row of documents: (length, pair, side), in which a list of 4 has two answers of one rank; and a row without pairs.
ROWS = [
    [(3, 1, 0), (4, 1, 1), (2, 2, 0), (3, 2, 1), (2, 2, 1), (3, 2, 2), (2, 0, -1)],
    [(5, 0, -1), (4, 3, 0), (2, 3, 0)],
]


def table(rows=ROWS, length=26, seed=0):
    names = ("tokens", "segment_ids", "positions", "pair", "side")
    batch = {name: np.full((len(rows), length), -1 if name == "side" else 0, np.int32) for name in names}
    for row, documents in enumerate(rows):
        start = 0
        for number, (size, pair, side) in enumerate(documents, start=1):
            here = np.s_[row, start : start + size]
            values = np.random.default_rng(seed + 10 * row + number).integers(1, 50, size)
            for name, value in zip(names, (values, number, np.arange(size), pair, side), strict=True):
                batch[name][here] = value
            start += size
    return batch


def test_answers_are_found_at_the_last_token_of_each_document():
    batch = table()
    answers = found(batch)
    assert answers.at.shape == (2, 13)
    for row, documents in enumerate(ROWS):
        sizes = [size for size, _, _ in documents]
        assert np.flatnonzero(answers.real[row]).tolist() == list(range(len(documents)))
        assert answers.lengths[row].tolist() == sizes + [0] * (13 - len(sizes))
        ends = (np.cumsum(sizes) - 1).tolist()
        values = answers.read(jnp.arange(26.0)[None, :, None] * jnp.ones((2, 1, 3)))[row]
        assert values[: len(ends), 2].tolist() == ends
        assert not values[len(ends) :].any()
    # One document has its hash wherever it stands, and another has another.
    moved = found({name: np.roll(value, 2, axis=1) for name, value in batch.items()})
    assert set(np.ravel(moved.hashes)) == set(np.ravel(answers.hashes))
    assert len(set(np.ravel(answers.hashes))) == 11


@jax.jit
def found(batch):
    return rewards.find_answers(**batch)


def lists(rows):
    """Of each row its comparisons: {pair: [(number of the answer, rank)]}."""
    return [
        {p: [(i, side) for i, (_, pair, side) in enumerate(row) if pair == p] for p in {p for _, p, _ in row} - {0}}
        for row in rows
    ]


def test_pairs_and_rankings_of_a_list():
    answers = found(table())
    values = jnp.asarray(np.random.default_rng(1).normal(size=(2, 13, 2)), jnp.float32)

    @jax.jit
    def measure(answers, values):
        def ranking(values):
            each = rewards.plackett_luce(values, answers.not_better())
            return jnp.sum(each), each

        gradient, ranked = jax.grad(ranking, has_aux=True)(values)
        return answers.pair_weights(), answers.decided(), ranked, gradient

    weights, decided, ranked, gradient = measure(answers, values)
    wanted_weights, wanted = np.zeros((2, 13, 13)), np.zeros((2, 13, 2))
    for row, comparisons in enumerate(lists(ROWS)):
        for answered in comparisons.values():
            pairs = [(i, j) for (i, a), (j, b) in itertools.product(answered, repeat=2) if a < b]
            for i, j in pairs:
                wanted_weights[row, i, j] = 1 / len(pairs)
            for i, rank in answered:
                rest = np.exp([values[row, j] for j, other in answered if other >= rank]).sum(0)
                wanted[row, i] = np.log(rest) - values[row, i]
    np.testing.assert_allclose(weights, wanted_weights, rtol=1e-6)
    np.testing.assert_allclose(ranked, wanted, rtol=1e-5, atol=1e-6)
    assert decided.sum() == 6  # not of the two answers of one rank
    assert np.isfinite(gradient).all()
    # A ranking of two is the pair's loss.
    pair = rewards.bradley_terry(values[0, 0], values[0, 1])
    np.testing.assert_allclose(ranked[0, 0] + ranked[0, 1], pair, rtol=1e-5)


def test_members_of_an_ensemble_learn_from_their_own_share():
    rows = [[(3, 1, 0), (4, 1, 1), (2, 2, 0), (3, 2, 1), (2, 0, -1)]] * 150
    answers = found(table(rows, 14))
    members = jax.jit(lambda answers: answers.members(3, 0.7))
    drawn = np.asarray(members(answers))[:, :5]
    np.testing.assert_allclose(drawn.reshape(-1, 3).mean(0), 0.7, atol=0.07)
    np.testing.assert_array_equal(drawn[:, 0], drawn[:, 1])  # a comparison goes whole
    np.testing.assert_array_equal(drawn[:, 2], drawn[:, 3])
    assert abs(np.corrcoef(drawn[:, 0].T)[0, 1]) < 0.25  # each member has its own
    again = found({name: value[::-1] for name, value in table(rows, 14).items()})
    np.testing.assert_array_equal(members(again)[::-1, :5], drawn)
    assert np.all(answers.members(3, 1.0) == 1)


def test_calibration_by_bins():
    rng = np.random.default_rng(0)
    difference, weights = rng.normal(size=500) * 2, rng.random(500)
    confidence, correct = 1 / (1 + np.exp(-np.abs(difference))), difference > 0
    error = 0.0
    for low in np.arange(0.5, 1.0, 0.05):
        here = (confidence >= low) & (confidence < low + 0.05)
        gap = np.average(confidence[here], weights=weights[here]) - np.average(correct[here], weights=weights[here])
        error += abs(gap) * weights[here].sum() / weights.sum()
    sums = rewards.calibration_sums(jnp.asarray(difference), jnp.asarray(weights))
    np.testing.assert_allclose(np.abs(sums).sum() / weights.sum(), error, rtol=1e-4)
    assert error > 0.05


def test_agreement_and_equal_rewards():
    votes = jnp.asarray([[1.0, 2.0, 0.5], [1.0, -2.0, 0.5], [-1.0, -2.0, -3.0], [1.0, -1.0, 1.0]])
    np.testing.assert_allclose(rewards.agreement(votes), [1, 1 / 3, 1, 1 / 3], rtol=1e-6)
    assert rewards.right(jnp.asarray([0.0, 2.0, -1.0])).tolist() == [0.5, 1.0, 0.0]
