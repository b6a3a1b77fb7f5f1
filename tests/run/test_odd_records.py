"""Odd values in what runs and commands have written are errors with file and line."""

import json

import pytest

from research.errors import InputError
from research.run import metrics


@pytest.mark.parametrize(
    "line",
    [
        b'{"step": "5"}',
        b'{"step": 1.5}',
        b'{"step": -1}',
        b'{"step": 1e400}',
        b'{"step": 99999999999999999999}',
        b'{"step": true}',
        b'{"step": %s}' % (b"9" * 5000),
        b'{"step": 1, "x": "text"}',
        b'{"step": 1, "x": null}',
        b'{"step": 1, "x": [1]}',
        b'{"step": 1, "x": true}',
        b'{"step": 1, "x": %s}' % (b"9" * 400),
        b"[]",
        b"5",
        b"\xff\xfe",
        b"[" * 100_000,
        b"",
    ],
)
def test_a_line_of_metrics_that_is_no_record_is_named(tmp_path, line):
    (tmp_path / "metrics.jsonl").write_bytes(b'{"step": 0, "x": 1}\n' + line + b"\n")
    with pytest.raises(InputError, match=r"metrics\.jsonl:2: .*Delete the line"):
        metrics.read_metrics(str(tmp_path))


def test_numbers_that_are_not_finite_are_read_and_a_torn_line_is_left_out(tmp_path):
    lines = [{"step": 0, "x": "nan"}, {"step": 1, "x": "-inf"}, {"step": 2, "x": 3}]
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (tmp_path / "metrics.jsonl").write_text(text + '{"step": 3, "x')
    values = [record["x"] for record in metrics.read_metrics(str(tmp_path))]
    assert [str(value) for value in values] == ["nan", "-inf", "3"]


@pytest.mark.parametrize("line", ['{"step": 1}', '{"step": 1, "name": 5, "text": "a"}', '{"step": 1, "name": "a"}'])
def test_a_sample_without_texts_is_named(tmp_path, line):
    (tmp_path / "samples.jsonl").write_text(line + "\n")
    with pytest.raises(InputError, match=r"samples\.jsonl:1: "):
        metrics.read_samples(str(tmp_path))
