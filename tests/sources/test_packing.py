import time

import numpy as np
import pytest

from research.sources.packing import best_fit_decreasing, cut


def naive(lengths, capacity):
    rooms = []
    for length in sorted(lengths, reverse=True):
        fits = [i for i, room in enumerate(rooms) if room >= length]
        if fits:
            rooms[min(fits, key=lambda i: rooms[i])] -= length
        else:
            rooms.append(capacity - length)
    return sorted(rooms)


@pytest.mark.parametrize("seed", range(20))
def test_is_best_fit_decreasing(seed):
    rng = np.random.default_rng(seed)
    capacity = int(rng.integers(1, 60))
    lengths = rng.integers(1, capacity + 1, rng.integers(1, 200))
    bins = best_fit_decreasing(lengths, capacity)
    assert sorted(capacity - np.bincount(bins, weights=lengths).astype(int)) == naive(lengths.tolist(), capacity)
    _, first = np.unique(bins, return_index=True)
    assert (np.diff(first) > 0).all(), "bins are numbered by their first item"


def test_no_items():
    assert best_fit_decreasing(np.zeros(0, np.int64), 8).shape == (0,)


def test_a_million_items_take_about_a_second():
    lengths = np.clip(np.random.default_rng(0).lognormal(5, 1, 1_000_000).astype(np.int64), 1, 2048)
    start = time.perf_counter()
    bins = best_fit_decreasing(lengths, 2048)
    assert time.perf_counter() - start < 10  # 0.35 s on an idle core; a loop over the items takes longer than this
    assert np.bincount(bins, weights=lengths).max() <= 2048
    assert lengths.sum() / ((bins.max() + 1) * 2048) > 0.999


def test_cut_covers_every_token_once():
    starts, lengths = cut(np.array([0, 10, 14]), np.array([10, 4, 9]), 4)
    assert starts.tolist() == [0, 4, 8, 10, 14, 18, 22]
    assert lengths.tolist() == [4, 4, 2, 4, 4, 4, 1]
