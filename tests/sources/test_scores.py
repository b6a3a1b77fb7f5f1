"""Files of scores: what is written is read, and what is no such file is refused."""

import numpy as np
import pytest

from research.errors import InputError
from research.sources import scores


def test_a_row_comes_back_by_columns(tmp_path):
    rows = [
        scores.row(("a.jsonl", 0), scores.digest({"text": "x"}), (5, 4), {"ifd": 0.5, "ifd_above_1": False}),
        scores.row(("b.jsonl", 3), "00000000000000ff", (9, 9), {"ifd": float("nan"), "ifd_above_1": np.bool_(True)}),
    ]
    (tmp_path / "scores.jsonl").write_bytes(b"".join(rows))
    table = scores.read(tmp_path / "scores.jsonl")
    assert [table.files[i] for i in table.file] == ["a.jsonl", "b.jsonl"]
    assert table.number.tolist() == [0, 3]
    assert table.tokens.tolist() == [5, 9]
    assert table.supervised.tolist() == [4, 9]
    assert table.digest[1] == 255
    assert f"{table.digest[0]:016x}" == scores.digest({"text": "x", "id": 7})
    np.testing.assert_array_equal(table.columns["ifd"], [0.5, np.nan])
    assert table.column("ifd_above_1", "--by").tolist() == [0, 1]
    with pytest.raises(InputError, match=r"--by = idf: there is no such score. Did you mean 'ifd'"):
        table.column("idf", "--by")


def test_records_are_numbered_within_their_files():
    numbers = scores.Numbers()
    places = ["a.jsonl:1", "a.jsonl:3", "b: c.json: record 1", "b: c.json: record 2", "d.md", "e.md"]
    expected = [("a.jsonl", 0), ("a.jsonl", 1), ("b: c.json", 0), ("b: c.json", 1), ("d.md", 0), ("e.md", 0)]
    assert [numbers.next(where) for where in places] == expected


@pytest.mark.parametrize(
    ("line", "fault"),
    [
        ('{"text": "x"}', ":2: is no row of scores"),
        ('{"file": "a", "number": 1, "digest": "00000000000000ff", "tokens": 1, "supervised": 1}', "other scores"),
        (
            '{"file": "a", "number": 1, "digest": "00000000000000ff", "tokens": 1, "supervised": 1, "x": "y"}',
            "no score",
        ),
        (scores.row(("a", 0), "00000000000000fe", (1, 1), {"x": 2}).decode(), "two rows for record 0 of a"),
        (scores.row(("a", 2**70), "00000000000000fe", (1, 1), {"x": 2}).decode(), ":2: is no row of scores"),
        (
            scores.row(("a", 1), "00000000000000fe", (1, 1), {"x": 2}).decode().replace('"x": 2', '"x": 3'),
            ":2: isn't what was written: it is damaged",
        ),
    ],
)
def test_what_is_no_row_is_named(tmp_path, line, fault):
    first = scores.row(("a", 0), "00000000000000ff", (1, 1), {"x": 1}).decode()
    (tmp_path / "s.jsonl").write_text(first + line + "\n")
    with pytest.raises(InputError, match=fault):
        scores.read(tmp_path / "s.jsonl")


def test_rows_that_are_gone_are_noticed(tmp_path):
    rows = [scores.row((file, i), "00000000000000ff", (1, 1), {"x": i}, 3) for file in "ab" for i in range(3)]
    path = tmp_path / "s.jsonl"
    path.write_bytes(b"".join(rows[::-1]))
    assert len(scores.read(path)) == 6
    for left in (rows[:5], rows[:1] + rows[2:]):
        path.write_bytes(b"".join(left))
        with pytest.raises(InputError, match=r"has 2 rows of [ab], and had 3: it is damaged"):
            scores.read(path)
    path.write_bytes(rows[0] + scores.row(("a", 1), "00000000000000ff", (1, 1), {"x": 1}, 2))
    with pytest.raises(InputError, match=r"s\.jsonl:2: says that a has 2 records"):
        scores.read(path)
