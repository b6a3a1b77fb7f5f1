"""Odd values in records and in what commands wrote: errors with file and line, and nothing raw on a terminal."""

import json
import os

import numpy as np
import pytest

from research import cli, errors, files
from research.errors import InputError
from research.sources import records, selected
from research.studies import lifecycle, pgr

ODD = ["5", "[]", "{", '{"a": 1, "a": 2}', "9" * 5000, "[" * 100_000, b"\xff\xfe", '{"a": NaN'.encode("utf-16")]


@pytest.mark.parametrize("line", ODD, ids=range(len(ODD)))
def test_a_line_that_is_no_object_is_named(tmp_path, line):
    line = line if isinstance(line, bytes) else line.encode()
    with pytest.raises(records.BadRecord):
        records.parse(line)
    (tmp_path / "x.jsonl").write_bytes(b'{"a": 1}\n' + line.replace(b"\n", b"") + b"\n")
    with pytest.raises(InputError, match=r"x\.jsonl:2: is no JSON.* Mend it\."):
        list(files.read_json_lines(tmp_path / "x.jsonl", "Mend it."))
    (tmp_path / "x.json").write_bytes(line)
    with pytest.raises(InputError, match=r"x\.json: is no JSON"):
        files.read_json(tmp_path / "x.json")


def test_what_is_no_file_or_too_large_is_not_opened(tmp_path, monkeypatch):
    os.mkfifo(tmp_path / "pipe.json")
    with pytest.raises(InputError, match=r"pipe\.json: is no file, but a device or a pipe"):
        files.read_json(tmp_path / "pipe.json", {})
    (tmp_path / "x.json").write_text('{"a": 1}')
    monkeypatch.setattr(files, "_MOST_JSON", 7)
    with pytest.raises(InputError, match=r"x\.json: has 8 bytes, and 7 is the most"):
        files.read_json(tmp_path / "x.json", {})
    assert files.read_json(tmp_path / "none.json", {}) == {}


def test_a_name_twice_is_said():
    with pytest.raises(records.BadRecord, match="'prompt' is there twice"):
        records.parse(b'{"prompt": "a", "response": "b", "prompt": "c"}')
    with pytest.raises(records.BadRecord, match="'role' is there twice"):
        records.parse(b'{"messages": [{"role": "user", "role": "assistant"}]}')


ROW = {"file": "a.jsonl", "number": 0, "digest": "0" * 16, "rank": 0}


@pytest.mark.parametrize(
    "change",
    [
        {"number": 1.5},
        {"number": -1},
        {"number": 10**30},
        {"number": True},
        {"digest": "f" * 17},
        {"digest": 5},
        {"rank": "0"},
        {"rank": None},
    ],
)
def test_a_row_of_a_selection_that_can_not_be_is_named(tmp_path, change):
    head = {selected._HEAD: {"records": 1, "tokens": 1, "files": {"a.jsonl": 1}, "ordered": False}}
    lines = [head, {**ROW, **change}]
    (tmp_path / "kept.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    with pytest.raises(InputError, match=r"data\.select = .*kept\.jsonl:2: is no row of a selection"):
        selected.read(str(tmp_path / "kept.jsonl"), "data.select")
    (tmp_path / "kept.jsonl").write_text("".join(json.dumps(line) + "\n" for line in [head, ROW]))
    kept = selected.read(str(tmp_path / "kept.jsonl"), "data.select")
    assert np.array_equal(kept.by_file["a.jsonl"].number, [0])


@pytest.mark.parametrize(
    "line", ['{"gold": 1e999, "probs": [1]}', '{"gold": 0, "probs": [[1], 2]}', "[" * 99_999, b"\xff"]
)
def test_predictions_that_can_not_be_are_named(tmp_path, line):
    (tmp_path / "p.jsonl").write_bytes(line if isinstance(line, bytes) else line.encode())
    with pytest.raises(InputError, match=r"p\.jsonl:1: "):
        pgr.read_predictions(str(tmp_path / "p.jsonl"))


def test_answers_that_can_not_be_are_named(tmp_path):
    (tmp_path / lifecycle.ANSWERS_FILE).write_text('{"a": 1}\nx\n')
    with pytest.raises(InputError, match=rf"{lifecycle.ANSWERS_FILE}:2: is no JSON"):
        lifecycle.read_answers(str(tmp_path))


def test_nothing_moves_the_cursor(tmp_path, capsys):
    text = "a\x1b[2J\x9b1m\rb\x00\u202ec\td\n"
    assert errors.printable(text) == "a\\x1b[2J\\x9b1m\\rb\\x00\\u202ec\td\n"
    assert cli.main(["split", f"--data={tmp_path}/x\x1b[2J.jsonl", f"--output={tmp_path}", "--parts=a"]) == 2
    assert "\x1b" not in capsys.readouterr().err
    (tmp_path / "x.jsonl").write_text(json.dumps({"prompt\x1b[2J": "a"}) + "\n")
    assert cli.main(["split", f"--data={tmp_path}/x.jsonl", f"--output={tmp_path}", "--parts=a"]) == 2
    assert "\x1b" not in capsys.readouterr().err


def test_the_nearest_of_what_is_no_text_or_very_long():
    assert "Known: a, b." in errors.did_you_mean(5, ["a", "b"])
    assert "Known: a, b." in errors.did_you_mean("x" * 10**7, ["a", "b"])
