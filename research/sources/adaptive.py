"""A source of batches whose rows are drawn from several parts by chances that change while a run goes on."""

from collections.abc import Sequence

import numpy as np

from research.sources import fields, mixture
from research.sources.rows import Rows
from research.sources.types import Source, State

CHANCES = "chances"  # in the source's state: of each part, by which the next batch is drawn


def make_source(
    train: Sequence[tuple[Rows, float]], *, batch_size: int, seed: int, shuffle: bool, mine: Sequence[int] | None = None
) -> Source:
    """Returns a source of endless batches. Its state has the chances, which whoever asks for a batch sets; how many
    rows were drawn; and how many of each part. A batch depends on (seed, state) alone.

    Args: see dataset.make_source. The weights of the parts aren't looked at.
    """
    spec = train[0][0].spec(batch_size)
    sizes, rows = fields.sizes(spec), [each for each, _ in train]
    wanted = np.arange(batch_size) if mine is None else np.asarray(mine)
    seeds = [int(np.random.SeedSequence([seed, part]).generate_state(1)[0]) for part in range(len(rows))]
    orders = [
        mixture.row_order([len(each)], [1.0], own if shuffle else None) for each, own in zip(rows, seeds, strict=True)
    ]

    def init() -> State:
        return {"row": 0, CHANCES: [1 / len(rows)] * len(rows), "drawn": [0] * len(rows)}

    def next_batch(state: State) -> tuple[dict[str, np.ndarray], State]:
        chances = np.asarray(state[CHANCES], np.float64)
        rng = np.random.default_rng([seed, state["row"]])
        part = rng.choice(len(rows), size=batch_size, p=chances / chances.sum())
        place, drawn = np.zeros(batch_size, np.int64), list(state["drawn"])
        for k in range(len(rows)):
            own = part == k
            place[own] = drawn[k] + np.arange(own.sum())
            drawn[k] += int(own.sum())
        batch = fields.empty(spec, len(wanted), sizes)
        for k in np.unique(part[wanted]):
            own = np.flatnonzero(part[wanted] == k)
            numbers = np.array([orders[k](int(i))[1] for i in place[wanted][own]])
            for name, value in rows[k].batch(numbers).items():
                batch[name][own] = value
        return batch, {**state, "row": state["row"] + batch_size, "drawn": drawn}

    return Source(spec, init, next_batch)
