"""Records split into disjoint files."""

import json

import pytest

from research.commands import split


def write(tmp_path, records):
    path = tmp_path / "x.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def read(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def run(tmp_path, parts, *more, data=None):
    data = data or tmp_path / "x.jsonl"
    return split.main([f"--data={data}", f"--output={tmp_path / 'out'}", f"--parts={parts}", "--overwrite", *more])


def test_every_record_is_in_one_part_by_chance(tmp_path):
    records = [{"text": f"text {i}", "label": i % 2, "id": i} for i in range(50)]
    write(tmp_path, [*records, {"text": " text 3", "label": 0, "id": 99}])  # the same text again
    assert run(tmp_path, "rest,weak:20,test:10") == 0
    parts = {name: read(tmp_path / f"out/{name}.jsonl") for name in ("weak", "test", "rest")}
    assert {name: len(part) for name, part in parts.items()} == {"weak": 20, "test": 10, "rest": 20}
    assert sorted((r for part in parts.values() for r in part), key=lambda r: r["id"]) == records
    assert parts["weak"] != records[:20]
    assert run(tmp_path, "weak:20,test:10,rest", "--seed=1") == 0
    assert read(tmp_path / "out/weak.jsonl") != parts["weak"]
    assert run(tmp_path, "weak:20,test:10,rest") == 0
    assert read(tmp_path / "out/weak.jsonl") == parts["weak"]


def test_columns_are_renamed_and_prompts_are_told_apart(tmp_path):
    write(tmp_path, [{"headline": "a", "y": 1}, {"headline": "b", "y": 0}])
    assert run(tmp_path, "all", '--fields={"text": "headline", "label": "y"}') == 0
    assert sorted(r["text"] + str(r["label"]) for r in read(tmp_path / "out/all.jsonl")) == ["a1", "b0"]
    write(tmp_path, [{"prompt": p, "response": "c"} for p in "aab"])
    assert run(tmp_path, "all") == 0
    assert len(read(tmp_path / "out/all.jsonl")) == 2


@pytest.mark.parametrize(
    ("parts", "words"),
    [
        ("a:3", ["asks for 3 records", "holds 2"]),
        ("a:2,b", ["asks for 2 records and more"]),
        ("a,b", ["only one part can get the rest"]),
        ("a:1,a:1", ["'a:1' isn't NAME:COUNT"]),
        ("a:0", ["'a:0'"]),
        ("a:x", ["'a:x'"]),
    ],
)
def test_what_is_wrong_is_named(tmp_path, capsys, parts, words):
    write(tmp_path, [{"text": "a"}, {"text": "b"}])
    assert run(tmp_path, parts) == 2
    error = capsys.readouterr().err
    for word in words:
        assert word in error
    assert not (tmp_path / "out").exists()


def test_a_faulty_line_is_named(tmp_path, capsys):
    write(tmp_path, [{"text": "a"}, {"text": 5}])
    assert run(tmp_path, "a:1") == 2
    assert "x.jsonl:2" in capsys.readouterr().err
    assert run(tmp_path, "a:1", data=tmp_path / "none.jsonl") == 2
    assert "--data" in capsys.readouterr().err


def test_what_is_there_is_replaced_only_where_that_is_asked_for(tmp_path, capsys):
    write(tmp_path, [{"text": "a"}, {"text": "b"}])
    (tmp_path / "b.jsonl").write_text("mine")
    argv = [f"--data={tmp_path / 'x.jsonl'}", f"--output={tmp_path}", "--parts=a:1,b"]
    assert split.main(argv) == 2
    assert "b.jsonl: is there already. Give --overwrite to replace it" in capsys.readouterr().err
    assert not (tmp_path / "a.jsonl").exists()
    assert (tmp_path / "b.jsonl").read_text() == "mine"
    assert split.main([*argv, "--overwrite"]) == 0
    assert len(read(tmp_path / "b.jsonl")) == 1
