"""What an entry of data.path names is found and read."""

import gzip
import json

import pytest

from research.errors import InputError
from research.sources.entries import TXT_DOCUMENT_BYTES, locate
from research.sources.records import Turn, check, parse

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


def test_records_are_counted_beforehand_where_that_is_cheap(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "x"}\n' * 7)
    (tmp_path / "b.jsonl").write_text('{"text": "x"}\n' * 3)
    (tmp_path / "c.txt").write_text("x\n")
    counts = {e: locate(e, count=5, seed=0).count() for e in (f"{tmp_path}/*.jsonl", "tasks:copy")}
    assert list(counts.values()) == [10, 5]
    assert locate(f"{tmp_path}/c.txt", count=5, seed=0).count() == 0
