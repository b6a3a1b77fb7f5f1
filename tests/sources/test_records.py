import gzip
import json
from collections import Counter

import pytest

from research.errors import InputError
from research.sources.records import (
    CONFIG_SETTINGS,
    TXT_DOCUMENT_BYTES,
    BadRecord,
    Turn,
    check,
    detect_format,
    locate,
    parse,
)
from research.sources.store import read_examples

PAIRS = [{"prompt": f"p{i}", "response": f"r{i}"} for i in range(3)]


def read(entry, count=5, seed=0):
    return [(where, parse(raw)) for where, raw in locate(str(entry), count=count, seed=seed).read()]


def lines(records):
    return "".join(json.dumps(record) + "\n" for record in records)


def test_jsonl_json_and_gz(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(b"\xef\xbb\xbf" + lines(PAIRS).replace("\n", "\n\n", 1).encode())
    (tmp_path / "b.json").write_text(json.dumps(PAIRS))
    with gzip.open(tmp_path / "c.jsonl.gz", "wt") as file:
        file.write(lines(PAIRS))
    a, b, c = (read(tmp_path / name) for name in ("a.jsonl", "b.json", "c.jsonl.gz"))
    assert [record for _, record in a] == [record for _, record in b] == [record for _, record in c] == PAIRS
    assert a[1][0] == f"{tmp_path}/a.jsonl:3", "blank lines count"
    assert b[2][0] == f"{tmp_path}/b.json: record 3"


def test_folder_and_glob(tmp_path):
    (tmp_path / "sub").mkdir()
    (tmp_path / "b.jsonl").write_text(lines(PAIRS[:1]))
    (tmp_path / "sub" / "c.jsonl").write_text(lines(PAIRS[1:]))
    (tmp_path / "notes.md").write_text("not data")
    assert [r["prompt"] for _, r in read(tmp_path)] == ["p0", "p1", "p2"]
    assert [r["prompt"] for _, r in read(f"{tmp_path}/**/c*.jsonl")] == ["p1", "p2"]


def test_parquet(tmp_path):
    pa = pytest.importorskip("pyarrow")
    import pyarrow.parquet

    messages = [[{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]]
    pyarrow.parquet.write_table(pa.table({"messages": messages}), tmp_path / "a.parquet")
    ((where, record),) = read(tmp_path / "a.parquet")
    assert where.endswith("a.parquet: row 1")
    assert check(record, "messages", {}) == [Turn("user", "q"), Turn("assistant", "a")]
    (tmp_path / "a.parquet").write_bytes(b"PAR1 no")
    with pytest.raises(InputError, match=r"a\.parquet: not a parquet file"):
        read(tmp_path / "a.parquet")


def test_saved_dataset_and_hub_name(tmp_path):
    datasets = pytest.importorskip("datasets")
    made = datasets.Dataset.from_list(PAIRS)
    made.save_to_disk(str(tmp_path / "one"))
    assert [record for _, record in read(tmp_path / "one")] == PAIRS
    datasets.DatasetDict({"train": made}).save_to_disk(str(tmp_path / "splits"))
    with pytest.raises(InputError, match=r"several splits. Give one of: .*splits/train"):
        read(tmp_path / "splits")
    assert [record for _, record in read(tmp_path / "splits" / "train")] == PAIRS
    (tmp_path / "repo").mkdir()
    (tmp_path / "repo" / "test.jsonl").write_text(lines(PAIRS))
    assert [record for _, record in read(f"hf:{tmp_path}/repo:test")] == PAIRS
    assert [record for _, record in read(f"hf:{tmp_path}/repo:default:test[:2]")] == PAIRS[:2]
    with pytest.raises(InputError, match=r"could not be loaded .*hf:NAME:SPLIT"):
        read(f"hf:{tmp_path}/repo:dev")


def test_txt_is_cut_at_blank_lines_and_loses_nothing(tmp_path):
    (tmp_path / "short.txt").write_text("one\n\ntwo\n")
    assert [r["text"] for _, r in read(tmp_path / "short.txt")] == [b"one\n\ntwo\n"]
    paragraph = "word " * 200 + "\n\n"
    (tmp_path / "long.txt").write_text(paragraph * 60)
    found = read(tmp_path / "long.txt")
    assert b"".join(r["text"] for _, r in found).decode() == paragraph * 60
    assert len(found) == 4
    assert all(r["text"].endswith(b"\n\n") and len(r["text"]) < 2 * TXT_DOCUMENT_BYTES for _, r in found)
    assert found[1][0] == f"{tmp_path}/long.txt:35"


def test_generated_sources():
    records = [record for _, record in read("tasks:sort_numbers", count=4, seed=1)]
    assert len(records) == 4
    assert {"prompt", "response", "task"} <= set(records[0])
    assert records == [record for _, record in read("tasks:sort_numbers", count=4, seed=1)]
    assert records != [record for _, record in read("tasks:sort_numbers", count=4, seed=2)]
    assert locate("tasks:copy", count=4, seed=1).identity != locate("tasks:copy", count=4, seed=2).identity


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ("traim.jsonl", "Did you mean 'train.jsonl'?"),
        ("nowhere/sub/x.jsonl", "There is no folder"),
        ("empty", "holds no file of a known kind"),
        ("x*.jsonl", "no file matches"),
        ("table.csv", "is of no known kind. Use one of .jsonl"),
    ],
)
def test_missing_files_name_the_nearest(tmp_path, entry, message):
    (tmp_path / "train.jsonl").write_text(lines(PAIRS))
    (tmp_path / "table.csv").write_text("a,b")
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError) as e:
        read(tmp_path / entry)
    assert message in str(e.value)
    assert entry in str(e.value)


def test_other_bad_entries(tmp_path):
    with pytest.raises(InputError, match="Did you mean 'python_docs'"):
        read("builtin:python_doc")
    with pytest.raises(InputError, match="hf:NAME:SPLIT"):
        read("hf:a:b:c:d")
    (tmp_path / "cut.jsonl.gz").write_bytes(gzip.compress(lines(PAIRS * 1000).encode())[:-20])
    with pytest.raises(InputError, match=r"cut\.jsonl\.gz: can't be read, it may be cut short"):
        read(tmp_path / "cut.jsonl.gz")
    (tmp_path / "x.json").write_text('[{"text": "a"},\n {"text": }]')
    with pytest.raises(InputError, match=r"x\.json:2: invalid JSON"):
        read(tmp_path / "x.json")
    (tmp_path / "x.json").write_text('{"text": "a"}')
    with pytest.raises(InputError, match=r"x\.json: holds an object .*not a list"):
        read(tmp_path / "x.json")


@pytest.mark.parametrize(
    ("raw", "reason", "message"),
    [
        (b'{"text": "a"', "invalid JSON", "Expecting ',' delimiter at column 13"),
        (b'{"text": "\xff"}', "invalid UTF-8", "at byte 10"),
        (b'["a"]', "not an object", "holds a list"),
    ],
)
def test_lines_that_are_no_records(raw, reason, message):
    with pytest.raises(BadRecord) as e:
        parse(raw)
    assert e.value.reason == reason
    assert message in str(e.value)


def conversation(*roles):
    return {"messages": [{"role": role, "content": "x"} for role in roles]}


@pytest.mark.parametrize(
    ("format", "record", "reason", "message"),
    [
        (
            "text",
            {"txet": "a"},
            "missing field",
            "no field 'text'. Did you mean 'txet'? Name the column in data.fields: {",
        ),
        ("text", {"text": " \n"}, "empty text", "is an empty text"),
        ("text", {"text": None}, "wrong type", "must be text, but is null"),
        ("text", {"text": "\ud800"}, "invalid UTF-8", "surrogates"),
        ("text", {"text": b"\xff"}, "invalid UTF-8", "not valid UTF-8"),
        ("prompt_response", {"prompt": "a", "response": 7}, "wrong type", "but is a number (7). Write it in quotes"),
        ("prompt_response", {"prompt": "a", "response": ""}, "empty response", "Fill or drop"),
        ("prompt_response", {"prompt": "", "response": "a"}, "empty prompt", "'prompt'"),
        ("messages", {"messages": "hi"}, "wrong type", "must be a list of objects"),
        ("messages", {"messages": []}, "no assistant turn at the end", "0 messages"),
        ("messages", conversation("user", "asistant"), "unknown role", "message 2 has role 'asistant'. Did you mean"),
        ("messages", conversation("assistant"), "roles out of order", "comes first; allowed there: system or user"),
        ("messages", conversation("user", "user"), "roles out of order", "message 2, of role 'user', follows 'user'"),
        ("messages", conversation("user", "system"), "roles out of order", "'system', follows 'user'"),
        ("messages", conversation("user"), "no assistant turn at the end", "must end with an assistant turn"),
        (
            "messages",
            {"messages": [{"role": "user", "content": "x"}, {"role": "assistant", "content": ""}]},
            "empty response",
            "'content'",
        ),
        ("messages", {"messages": [{"role": "user"}]}, "missing field", "no field 'content'"),
    ],
)
def test_bad_records(format, record, reason, message):
    with pytest.raises(BadRecord) as e:
        check(record, format, {})
    assert e.value.reason == reason
    assert message in str(e.value.at("", **CONFIG_SETTINGS))
    assert "data." not in str(e.value)  # not every command has the config's fields


def test_formats_are_detected_under_renamed_columns():
    assert detect_format({"text": "", "prompt": "", "response": ""}, {}) == "prompt_response"
    assert detect_format({"messages": [], "prompt": ""}, {}) == "messages"
    fields = {"prompt": "question", "response": "answer"}
    assert detect_format({"question": "", "answer": "", "id": 1}, fields) == "prompt_response"
    turns = [Turn("user", "a"), Turn("assistant", "b")]
    assert check({"question": "a", "answer": "b"}, "prompt_response", fields) == turns
    with pytest.raises(BadRecord, match=r"has the fields 'question', 'answer', but needs .* Rename its columns.") as e:
        detect_format({"question": "", "answer": ""}, {})
    said = {name: str(e.value.at("x:1", fields=name)) for name in ("data.fields", "--fields")}
    for name, text in said.items():
        assert text.startswith("x:1: has the fields 'question', 'answer', but needs ")
        assert text.endswith(f'Name its columns, as in {name}={{"prompt": "question", "response": "answer"}}.')


DEEP = "[" * 100_000 + "]" * 100_000
LONG = "9" * 5000


@pytest.mark.parametrize(
    ("value", "reason"),
    [(DEEP, "nested too deep"), ('{"a":' * 150 + "1" + "}" * 150, "nested too deep"), (LONG, "number too long")],
    ids=["100,000 deep", "150 deep", "5,000 digits"],
)
@pytest.mark.parametrize("suffix", [".jsonl", ".json"])
def test_what_passes_the_limits_of_json_is_a_bad_record_like_any_other(value, reason, suffix, tmp_path):
    rows = ['{"text": "a, [b"}', f'{{"text": "x", "n": {value}}}', '{"text": "c\\"]"}']
    text = "\n".join(rows) if suffix == ".jsonl" else f"[{', '.join(rows)}]\n"
    (tmp_path / f"x{suffix}").write_text(text)
    origin = locate(str(tmp_path / f"x{suffix}"), count=0, seed=0)
    counts = Counter()
    good = list(read_examples(origin, "auto", {}, "skip", counts))
    assert [example.record["text"] for example in good] == ["a, [b", 'c"]']
    assert counts == {"records": 3, f"bad: {reason}": 1}
    place = ":2: " if suffix == ".jsonl" else ": record 2: "
    with pytest.raises(InputError, match=rf"x\{suffix}{place}holds .* Or set data.on_bad_record='skip'"):
        list(read_examples(origin, "auto", {}, "error", Counter()))


def test_a_json_file_that_is_no_list_at_all(tmp_path):
    (tmp_path / "x.json").write_text(f'{{"text": {DEEP}}}')
    with pytest.raises(InputError, match=r"x\.json: holds an object that can't be read, not a list"):
        read(tmp_path / "x.json")
    (tmp_path / "y.json").write_text(f"[{LONG}, [], {{}}]")
    with pytest.raises(BadRecord, match=r"more than 4,300 digits"):
        read(tmp_path / "y.json")


@pytest.mark.parametrize(
    ("value", "remedy"),
    [
        (None, "is null. Write a text, or drop the record."),
        (["a"], "is a list (['a']). Write its text alone, or drop the record."),
        ({"a": 1}, "is an object ({'a': 1}). Write its text alone, or drop the record."),
        (True, "is a boolean (True). Write it in quotes."),
    ],
)
def test_remedies_fit_the_value(value, remedy):
    for format, record in (
        ("text", {"text": value}),
        ("prompt_response", {"prompt": "a", "response": value}),
    ):
        with pytest.raises(BadRecord) as error:
            check(record, format, {})
        assert remedy in str(error.value)
