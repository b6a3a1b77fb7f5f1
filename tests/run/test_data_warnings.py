"""What a run says of its data at the start."""

import pytest

from research.run import record


def report(**train):
    counts = {"examples": 90, "nothing_supervised": 0, "too_long_dropped": 0, "length_99": 321} | train
    return {
        "sources": [{"name": "a", "records": 100, "bad": {}}],
        "train": counts,
        "held_out": counts | {"examples": 0},
    }


@pytest.mark.parametrize(("dropped", "warned"), [(4, False), (10, True)])
def test_what_is_too_long_is_a_warning_beyond_5_percent(dropped, warned):
    counts = report(examples=100 - dropped, too_long_dropped=dropped)
    counts["held_out"] = counts["train"] | {"too_long_dropped": 0}
    lines = record.data_warnings(counts, 64)
    assert lines == warned * [
        "train: 10 of 100 examples (10.0%) are longer than seq_len = 64 and dropped; 99 % have at most 321 tokens. "
        "Raise seq_len, or set data.on_long='truncate'."
    ]


def test_what_is_truncated_bad_or_of_no_use_is_a_warning_too():
    counts = report(too_long_dropped=0, too_long_truncated=45, nothing_supervised=10)
    counts["held_out"] = {"examples": 5, "nothing_supervised": 0, "length_99": 3}
    counts["sources"][0]["bad"] = {"empty text": 6, "invalid JSON": 5}
    assert record.data_warnings(counts, 64) == [
        "a: 6 of 100 records (6.0%) skipped: empty text",
        "train: 45 of 100 examples (45.0%) are longer than seq_len = 64 and truncated; 99 % have at most 321 tokens. "
        "Raise seq_len.",
        "train: 10 of 100 examples (10.0%) are dropped, since nothing of them is to be learned within seq_len. Raise "
        "seq_len, or shorten the prompts.",
    ]
