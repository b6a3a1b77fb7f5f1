"""The order in which rows are drawn."""

import grain
import pytest

from research.sources import mixture

PLACES = [*range(250), 2**16 - 1, 2**16, 70_000, 10**6]


@pytest.mark.parametrize("seed", [None, 0, 3])
@pytest.mark.parametrize("n_rows", [1, 2, 100])
def test_one_part_of_few_rows_is_drawn_as_grain_draws_it(n_rows, seed):
    order = mixture.row_order([n_rows], [1.0], seed)
    expected = grain.MapDataset.mix([mixture._part_order(grain, 0, n_rows, seed)], [1.0])
    assert [order(place) for place in PLACES] == [tuple(expected[place]) for place in PLACES]
    epoch = [row for _, row in map(order, range(n_rows))]
    assert sorted(epoch) == list(range(n_rows))


def test_parts_are_drawn_in_proportion_to_their_weights():
    order = mixture.row_order([50, 7], [0.75, 0.25], 0)
    parts = [order(place)[0] for place in range(400)]
    assert parts.count(0) == 300
