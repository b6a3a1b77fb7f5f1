"""Rows are drawn by chances that change, and each row of a part comes once an epoch all the same."""

import json

import numpy as np
import pytest

from research.sources import adaptive, dataset
from research.sources.spec import DataSpec
from research.sources.tokenizers import TokenizerSpec


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    """Two sources of 12 and 7 rows, whose first letters tell which row it is."""
    folder = tmp_path_factory.mktemp("parts")
    for name, count in (("a", 12), ("b", 7)):
        lines = (json.dumps({"text": f"{name}{chr(97 + i)}"}) + "\n" for i in range(count))
        (folder / f"{name}.jsonl").write_text("".join(lines))
    sources = {name: {"path": f"{folder}/{name}.jsonl", "weight": 1.0} for name in "ab"}
    spec = DataSpec(path="", sources=sources, eval_fraction=0.0, pack=False, seq_len=8)
    return dataset.load(spec, TokenizerSpec(kind="byte")).train


def rows(batch):
    return [bytes(int(t) for t in row[1:3]).decode() for row in batch["tokens"]]


def draw(source, chances, steps, state=None):
    state, seen = state or source.init(), []
    for _ in range(steps):
        batch, state = source.next({**state, adaptive.CHANCES: chances})
        seen += rows(batch)
    return seen, state


def test_rows_come_by_the_chances_and_once_an_epoch(parts):
    source = adaptive.make_source(parts, batch_size=6, seed=3, shuffle=True)
    seen, state = draw(source, [0.8, 0.2], 100)
    share = np.mean([row[0] == "a" for row in seen])
    assert 0.74 < share < 0.86
    of_a = [row for row in seen if row[0] == "a"]
    assert sorted(of_a[:12]) == sorted(of_a[12:24]) == [f"a{chr(97 + i)}" for i in range(12)]
    assert of_a[:12] != of_a[12:24]
    assert state["row"] == 600 == sum(state["drawn"])
    assert {row[0] for row in draw(source, [0.0, 1.0], 5, state)[0]} == {"b"}


def test_a_batch_depends_on_the_state_alone_and_each_process_has_its_rows(parts):
    source = adaptive.make_source(parts, batch_size=6, seed=3, shuffle=True)
    whole, state = draw(source, [0.5, 0.5], 4)
    after, _ = draw(source, [0.3, 0.7], 2, json.loads(json.dumps(state)))
    again, _ = draw(source, [0.3, 0.7], 2, state)
    assert after == again
    halves = [
        adaptive.make_source(parts, batch_size=6, seed=3, shuffle=True, mine=own) for own in ([0, 1, 2], [3, 4, 5])
    ]
    first, second = (draw(half, [0.5, 0.5], 4)[0] for half in halves)
    assert [row for i in range(4) for part in (first, second) for row in part[3 * i : 3 * i + 3]] == whole
