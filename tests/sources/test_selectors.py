"""Selectors over arrays: ties, budgets of tokens, strata with weights, draws, diversity."""

import dataclasses

import numpy as np
import pytest

from research.errors import InputError
from research.sources import selectors
from research.sources.selectors import Budget, Pool


def pool(values, tokens=None, **fields):
    values = np.asarray(values, np.float64)
    tokens = np.ones(len(values), np.int64) if tokens is None else np.asarray(tokens, np.int64)
    return Pool(values, tokens, np.ones(len(values), bool), **fields)


def kept(*args):
    return np.flatnonzero(selectors.select(*args)[0]).tolist()


def test_top_bottom_and_middle():
    values = [5.0, 1.0, 4.0, 2.0, 3.0]
    assert kept(pool(values), "top", Budget(2, "records")) == [0, 2]
    assert kept(pool(values), "bottom", Budget(2, "records")) == [1, 3]
    assert kept(pool(values), "middle", Budget(3, "records")) == [2, 3, 4]
    assert kept(pool(values, center=1.0), "middle", Budget(2, "records")) == [0, 2]


def test_equal_scores_keep_the_order_of_the_data():
    values = np.zeros(100)
    values[50:] = 1
    _, rank = selectors.select(pool(values), "top", Budget(60, "records"))
    assert rank[50:].tolist() == list(range(50))
    assert rank[:50].tolist() == [*range(50, 60), *[-1] * 40]
    assert kept(pool(values), "bottom", Budget(10, "records")) == list(range(10))


def test_equal_records_are_not_equal_tokens():
    """Where long records have the high scores, half of the records are most of the tokens."""
    tokens = np.arange(1, 101)
    records, _ = selectors.select(pool(tokens, tokens), "top", Budget(0.5, "records"))
    of_tokens, _ = selectors.select(pool(tokens, tokens), "top", Budget(0.5, "tokens"))
    assert records.sum() == 50
    assert tokens[records].sum() / tokens.sum() > 0.74
    assert of_tokens.sum() == 29
    assert 0.49 < tokens[of_tokens].sum() / tokens.sum() <= 0.5
    for way in ("bottom", "middle", "random", "gumbel"):
        keep, _ = selectors.select(pool(tokens, tokens), way, Budget(2000, "tokens"))
        assert 1900 < tokens[keep].sum() <= 2000, way


def test_the_room_that_is_left_is_not_filled_up_with_short_records():
    assert kept(pool([3.0, 2.0, 1.0], [4, 5, 1]), "top", Budget(6, "tokens")) == [0]
    assert kept(pool([3.0, 2.0, 1.0], [9, 5, 1]), "top", Budget(6, "tokens")) == [0]  # one at least


def test_what_may_not_be_kept_takes_no_room():
    values = pool([4.0, np.nan, 3.0, 2.0, 1.0])
    values = dataclasses.replace(values, eligible=np.array([True, False, False, True, True]))
    assert kept(values, "top", Budget(2, "records")) == [0, 3]
    assert kept(values, "random", Budget(5, "records")) == [0, 3, 4]


def test_strata_have_parts_by_what_they_hold_or_by_weights():
    """Of 90 tokens of a and 10 of b, a tenth is 9 and 1; at equal weights 5 and 5, as a mixture draws them."""
    strata = np.repeat([0, 1], [90, 10])
    values = np.concatenate([np.linspace(0, 1, 90), np.linspace(5, 6, 10)])
    assert [x >= 90 for x in kept(pool(values), "top", Budget(0.1, "records"))] == [True] * 10
    counts = lambda *more: np.bincount(strata[kept(pool(values), "top", Budget(0.1, "records"), strata, *more)])  # noqa: E731
    assert counts().tolist() == [9, 1]
    assert counts([1.0, 1.0]).tolist() == [5, 5]
    assert counts([0.7, 0.3]).tolist() == [7, 3]
    none = dataclasses.replace(pool(values), eligible=strata == 0)
    with pytest.raises(InputError, match="stratum 1: no record"):
        selectors.select(none, "top", Budget(0.1, "records"), strata)


def test_gumbel_draws_by_the_weights_without_replacement():
    values, n = np.log([8.0, 4.0, 2.0, 1.0, 1.0]), 4000
    first = np.zeros(5)
    pairs = {}
    for seed in range(n):
        _, rank = selectors.select(pool(values, seed=(seed,)), "gumbel", Budget(2, "records"))
        first[np.argmax(rank == 0)] += 1
        pair = int(np.argmax(rank == 0)), int(np.argmax(rank == 1))
        pairs[pair] = pairs.get(pair, 0) + 1
    np.testing.assert_allclose(first / n, np.array([8, 4, 2, 1, 1]) / 16, atol=0.03)
    np.testing.assert_allclose(pairs[0, 1] / n, 8 / 16 * 4 / 8, atol=0.03)
    one = selectors.select(pool(values, seed=(7,)), "gumbel", Budget(2, "records"))[1]
    np.testing.assert_array_equal(one, selectors.select(pool(values, seed=(7,)), "gumbel", Budget(2, "records"))[1])


def test_kcenter_takes_one_of_each_cluster_before_a_second_of_any():
    rng = np.random.default_rng(0)
    centers = np.array([[0.0, 0.0], [9.0, 0.0], [0.0, 9.0], [9.0, 9.0]])
    points = np.repeat(centers, 50, axis=0) + rng.normal(size=(200, 2)) / 10
    assert sorted(i // 50 for i in kept(pool(points), "kcenter", Budget(4, "records"))) == [0, 1, 2, 3]
    order = selectors.kcenter(dataclasses.replace(pool(points), most=10))
    assert len(order) == len(set(order.tolist())) == 10
    assert sorted(selectors.kcenter(pool(np.zeros((3, 1)))).tolist()) == [0, 1, 2]
