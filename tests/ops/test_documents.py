"""Sums over documents that lie in rows, against loops."""

import jax.numpy as jnp
import numpy as np

from research.ops import documents

NUMBER = np.array([[0, 0, 2, 2, 2, 3, 1], [1, 1, 1, 3, 0, 0, 0]], np.int32)  # 3 is none
VALUES = np.arange(14, dtype=np.float32).reshape(2, 7) - 5


def by_loop(function, empty):
    return [
        [function(VALUES[b][NUMBER[b] == n]) if np.any(NUMBER[b] == n) else empty for n in range(3)] for b in range(2)
    ]


def test_sums_and_least():
    np.testing.assert_array_equal(documents.sums(VALUES, NUMBER, 3), by_loop(np.sum, 0))
    np.testing.assert_array_equal(documents.least(VALUES, NUMBER, 3), by_loop(np.min, np.inf))


def test_integers_wrap_around():
    large = jnp.full((1, 3), 2**31, jnp.uint32)
    np.testing.assert_array_equal(documents.sums(large, jnp.array([[0, 0, 1]]), 2), [[0, 2**31]])


def test_spread():
    spread = documents.spread(jnp.array([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]]), NUMBER)
    np.testing.assert_array_equal(spread, [[1, 1, 3, 3, 3, 0, 2], [5, 5, 5, 0, 4, 4, 4]])


def test_order_counts_within_each_document():
    counted = np.array([[0, 1, 1, 0, 1, 1, 1], [0, 1, 1, 1, 1, 1, 0]], np.float32)
    order = np.where((counted > 0) & (NUMBER < 3), documents.order(counted, NUMBER, 3), 0)
    np.testing.assert_array_equal(order, [[0, 1, 1, 0, 2, 0, 1], [0, 1, 2, 0, 1, 2, 0]])
