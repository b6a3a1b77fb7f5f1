"""Files are whole or absent, and a killed output goes on where it was."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest

from research import files
from research.errors import InputError


def test_cache_root_follows_argument_then_environment(monkeypatch, tmp_path):
    monkeypatch.setenv("UNDERSTUDY_CACHE", str(tmp_path / "env"))
    assert files.cache_root() == tmp_path / "env"
    assert files.cache_root(str(tmp_path / "arg")) == tmp_path / "arg"
    monkeypatch.delenv("UNDERSTUDY_CACHE")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert files.cache_root() == tmp_path / ".cache/understudy"


def test_read_json_names_file_and_remedy(tmp_path):
    path = tmp_path / "x.json"
    assert files.read_json(path, {}) == {}
    assert files.read_json(path, None) is None
    with pytest.raises(InputError, match=r"x\.json: can't be read"):
        files.read_json(path)
    path.write_text("{")
    with pytest.raises(InputError, match=r"data\.y: '.*x\.json' is no JSON .*Copy it anew\."):
        files.read_json(path, {}, name="data.y", remedy="Copy it anew.")
    path.write_text("[1]")
    with pytest.raises(InputError, match=r"x\.json: is no JSON object, but '\[1\]'"):
        files.read_json(path, None)
    files.write_json(path, {"a": "ü"})
    assert files.read_json(path) == {"a": "ü"}
    assert os.listdir(tmp_path) == ["x.json"]


def test_a_failed_write_leaves_the_old_file(tmp_path):
    path = tmp_path / "x.json"
    files.write_json(path, {"old": 1})
    with pytest.raises(TypeError):
        files.write_json(path, {"new": object()})
    with pytest.raises(ZeroDivisionError), files.replacing(path) as file:
        file.write(b"half" + bytes(1 // 0))
    assert files.read_json(path) == {"old": 1}
    assert os.listdir(tmp_path) == ["x.json"]


def test_a_killed_write_leaves_the_old_file(tmp_path):
    path = tmp_path / "x.json"
    files.write_json(path, {"n": 0})
    code = f"""
from research import files
n = 0
while True:
    n += 1
    files.write_json({str(path)!r}, {{"n": n, "pad": "x" * 100_000}})
"""
    process = subprocess.Popen([sys.executable, "-c", code])
    deadline = time.monotonic() + 30
    while files.read_json(path)["n"] < 3 and time.monotonic() < deadline:
        assert process.poll() is None
    process.send_signal(signal.SIGKILL)
    process.wait()
    record = json.loads(path.read_text())
    assert record["n"] >= 3
    assert len(record["pad"]) == 100_000


def test_whole_folder_appears_when_complete(tmp_path):
    (tmp_path / "out.partial").mkdir()
    (tmp_path / "out.partial" / "old").touch()
    with pytest.raises(ZeroDivisionError), files.whole_folder(tmp_path / "out"):
        _ = 1 // 0
    assert not (tmp_path / "out").exists()
    with files.whole_folder(tmp_path / "out") as folder:
        (folder / "new").touch()
    assert os.listdir(tmp_path) == ["out"]
    assert os.listdir(tmp_path / "out") == ["new"]


def test_check_output(tmp_path):
    files.check_output(tmp_path / "x")
    (tmp_path / "x").touch()
    with pytest.raises(InputError, match=r"--output = .*x: is there already"):
        files.check_output(tmp_path / "x")
    files.check_output(tmp_path / "x", overwrite=True)
    with pytest.raises(InputError, match=r"there is no folder .*none"):
        files.check_output(tmp_path / "none" / "x")


def test_resumable_lines_go_on_after_a_torn_one(tmp_path):
    output = tmp_path / "out.jsonl"
    with files.ResumableLines(output, {"seed": 1}) as lines:
        assert lines.done == 0
        lines.append([b"one\n", b"two\n"])
    with open(tmp_path / "out.jsonl.partial", "ab") as file:
        file.write(b"tor")
    with pytest.raises(InputError, match=r"out\.jsonl\.partial: was begun by another command: seed was 1, and is 2"):
        files.ResumableLines(output, {"seed": 2})
    with pytest.raises(InputError, match="another command: --seed was 1"):
        files.ResumableLines(output, {"seed": 2}, {"seed": "--seed was {}"})
    with files.ResumableLines(output, {"seed": 1}) as lines:
        assert lines.done == 2
        lines.append([b"three\n"])
        lines.finish()
    assert output.read_text() == "one\ntwo\nthree\n"
    assert os.listdir(tmp_path) == ["out.jsonl"]


def test_resumable_lines_may_be_selected_at_the_end(tmp_path):
    with files.ResumableLines(tmp_path / "out", {}) as lines:
        lines.append([b"a\n", b"b\r\n", b"c\n"])
        lines.finish(lambda lines: lines[1:])
    assert (tmp_path / "out").read_bytes() == b"b\r\nc\n"
    assert os.listdir(tmp_path) == ["out"]


def test_resumable_lines_where_nothing_can_be_written(tmp_path):
    with pytest.raises(InputError, match="can't be written"):
        files.ResumableLines(tmp_path / "none" / "out", {})


def test_whole_lines(tmp_path):
    path = tmp_path / "x"
    path.write_bytes(b"a\n\nb")
    assert files.whole_lines(path) == 2
    assert path.read_bytes() == b"a\n\n"
    for group, left in ((2, b"a\nb\nc\nd\n"), (3, b"a\nb\nc\n"), (7, b"")):
        path.write_bytes(b"a\nb\nc\nd\ne\nf")
        assert files.whole_lines(path, group) == left.count(b"\n")
        assert path.read_bytes() == left


def test_json_past_the_limits_of_its_reader_is_named(tmp_path):
    for value in ("9" * 5000, "[" * 100_000 + "]" * 100_000):
        (tmp_path / "x.json").write_text(f'{{"a": {value}}}')
        with pytest.raises(InputError, match=r"x\.json: is no JSON"):
            files.read_json(tmp_path / "x.json")
