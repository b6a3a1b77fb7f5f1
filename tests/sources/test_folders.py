"""Folders and globs of data: which files are read, in which order, and what is said of them."""

import json
import os

import pytest

from research.errors import InputError
from research.sources.entries import locate
from research.sources.records import parse


def write(path, *texts):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))


def read(entry):
    origin = locate(str(entry), count=0, seed=0)
    return [parse(raw)["text"] for _, raw in origin.read()], origin


def test_names_with_a_dot_in_front_are_left_out_at_every_level(tmp_path):
    write(tmp_path / "a.jsonl", "a")
    write(tmp_path / "sub/b.jsonl", "b")
    write(tmp_path / ".ipynb_checkpoints/a-checkpoint.jsonl", "stale")
    write(tmp_path / "sub/.cache/deep/c.jsonl", "stale")
    (tmp_path / "._a.jsonl").write_bytes(b"\x00\x05\x16\x07 no text")
    (tmp_path / "sub/.DS_Store").write_bytes(b"\x00")
    texts, origin = read(tmp_path)
    assert texts == ["a", "b"]
    assert origin.summary == "2 .jsonl files"
    assert [stamp[0] for stamp in origin.identity] == [str(tmp_path / "a.jsonl"), str(tmp_path / "sub/b.jsonl")]
    write(tmp_path / ".data/only.jsonl", "asked for")
    assert read(tmp_path / ".data")[0] == ["asked for"], "a folder that is named itself is read"


def test_text_and_code_are_read_where_they_are_asked_for_a_file_a_document(tmp_path):
    for name, text in {"b.py": "x = 1\n\ny = 2\n", "sub/a.py": "z", "__init__.py": "\n", "README.md": "read"}.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    texts, origin = read(f"{tmp_path}/**/*.py")
    assert texts == [b"x = 1\n\ny = 2\n", b"z"]
    assert origin.summary == "3 .py files"
    assert read(tmp_path / "README.md")[0] == [b"read"]
    with pytest.raises(
        InputError, match=r"no file of a known kind .* Ask for other text by a pattern: '.*/\*\*/\*\.py'"
    ):
        read(tmp_path)
    write(tmp_path / "a.jsonl", "a")
    texts, origin = read(tmp_path)
    assert (texts, origin.summary) == (["a"], "1 .jsonl file, left out: 1 .md, 3 .py")
    with pytest.raises(InputError, match=r"several kinds: 1 \.jsonl"):
        read(f"{tmp_path}/**/*")


def test_links_are_followed_and_each_real_file_is_read_once(tmp_path):
    data, other = tmp_path / "data", tmp_path / "other"
    write(data / "a.jsonl", "a")
    write(data / "sub/b.jsonl", "b")
    write(other / "c.jsonl", "c")
    (data / "elsewhere").symlink_to(other)
    (data / "sub/loop").symlink_to(data)
    (data / "again.jsonl").symlink_to(data / "sub/b.jsonl")
    (other / "back").symlink_to(data / "sub")
    texts, origin = read(data)
    assert texts == ["a", "b", "c"]
    assert origin.summary == "3 .jsonl files"
    assert sorted(read(f"{data}/**/*.jsonl")[0]) == ["a", "b", "c"]


def test_a_link_that_leads_nowhere_and_what_is_no_file_are_named(tmp_path):
    write(tmp_path / "data/a.jsonl", "a")
    (tmp_path / "data/lost.jsonl").symlink_to(tmp_path / "gone.jsonl")
    with pytest.raises(InputError, match=r"lost\.jsonl' is a link that leads nowhere"):
        read(tmp_path / "data")
    (tmp_path / "self.jsonl").symlink_to(tmp_path / "self.jsonl")
    with pytest.raises(InputError, match=r"self\.jsonl' is a link that leads nowhere"):
        read(tmp_path / "self.jsonl")
    os.mkfifo(tmp_path / "pipe.jsonl")
    with pytest.raises(InputError, match=r"pipe\.jsonl' is neither a file nor a folder"):
        read(tmp_path / "pipe.jsonl")


def test_a_folder_of_several_kinds_is_refused_and_the_remedy_works(tmp_path):
    write(tmp_path / "a.jsonl", "a")
    write(tmp_path / "sub/b.jsonl", "b")
    (tmp_path / "README.txt").write_text("about the data")
    for entry in (tmp_path, f"{tmp_path}/*"):
        with pytest.raises(InputError, match=r"several kinds: 2 \.jsonl \(a\.jsonl\) and 1 \.txt|1 \.jsonl .* and 1"):
            read(entry)
    with pytest.raises(InputError) as error:
        read(tmp_path)
    assert f"'{tmp_path}/**/*.jsonl'" in str(error.value)
    assert read(f"{tmp_path}/**/*.jsonl")[0] == ["a", "b"]


def test_what_was_read_and_what_was_left_out_is_said(tmp_path):
    write(tmp_path / "a.jsonl", "a")
    write(tmp_path / "b.jsonl", "b")
    for name in ("x.csv", "y.csv", "LICENSE"):
        (tmp_path / name).write_text("x")
    assert read(tmp_path)[1].summary == "2 .jsonl files, left out: 1 without a suffix, 2 .csv"
    assert read(tmp_path / "a.jsonl")[1].summary == ""
    assert read(f"{tmp_path}/a*.jsonl")[1].summary == "1 .jsonl file"
