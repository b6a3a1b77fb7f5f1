"""understudy select, and what a run reads of its selection with data.select."""

import json

import numpy as np
import pytest

from research.commands import select
from research.errors import InputError
from research.sources import dataset, scores, selected
from research.sources.spec import DataSpec
from research.sources.tokenizers import TokenizerSpec

WORDS = "abcdefghijklmnopqrstuvwxyz"


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    """Two files of records and their scores: a.jsonl has 20 of 5 to 24 letters, b.jsonl 10 of 5."""
    folder = tmp_path_factory.mktemp("corpus")
    rng = np.random.default_rng(0)
    rows = []
    for name, lengths in (("a", range(5, 25)), ("b", [5] * 10)):
        path, lines = folder / f"{name}.jsonl", []
        for number, length in enumerate(lengths):
            record = {"text": "".join(rng.choice(list(WORDS), length))}
            lines.append(json.dumps(record) + "\n")
            place, count = (str(path), number), length + 2
            values = {"loss": length / 10 + (name == "b"), "loud": number % 2 == 0, "flat": 1.0}
            values["holey"] = None if number == 3 else float(number)
            rows.append(scores.row(place, scores.digest(record), (count, count), values))
        path.write_text("".join(lines))
    (folder / "scores.jsonl").write_bytes(b"".join(rows))
    return folder


def run(corpus, tmp_path, *flags, output="kept.jsonl"):
    return select.main([f"--scores={corpus}/scores.jsonl", f"--output={tmp_path}/{output}", "--overwrite", *flags])


def kept(tmp_path, output="kept.jsonl"):
    head, *rows = map(json.loads, (tmp_path / output).read_text().splitlines())
    return head["selection"], [(row["file"][-7], row["number"]) for row in rows]


def test_a_list_is_written_with_what_was_asked_for_and_a_report(corpus, tmp_path, capsys):
    assert run(corpus, tmp_path, "--by=loss", "--keep=top", "--tokens=100", f"--report={tmp_path}/report.json") == 0
    head, rows = kept(tmp_path)
    assert rows == [("a", i) for i in (16, 17, 18, 19)]
    assert (head["records"], head["tokens"], head["ordered"]) == (4, 98, False)
    assert {"by": ["loss"], "keep": "top", "amount": 100.0}.items() <= head.items()
    assert {name[-7:]: n for name, n in head["files"].items()} == {"a.jsonl": 20, "b.jsonl": 10}
    report = json.loads((tmp_path / "report.json").read_text())
    assert (report["kept"]["records"], report["dropped"]["records"]) == (4, 26)
    assert sum(report["histogram"]["kept"]) == 4
    assert sum(report["histogram"]["dropped"]) == 26
    highest = report["examples"]["kept, highest"][0]
    assert (highest["number"], len(highest["text"])) == (19, 24)
    shown = capsys.readouterr().out
    assert "kept, highest:" in shown
    assert highest["text"] in shown
    assert "4" in shown.splitlines()[1]


def test_files_and_values_are_strata_with_weights(corpus, tmp_path, capsys):
    assert run(corpus, tmp_path, "--by=loss", "--keep=top", "--records=10", "--stratify=file") == 0
    assert [name for name, _ in kept(tmp_path)[1]] == ["a"] * 6 + ["b"] * 3
    weights = json.dumps({f"{corpus}/a.jsonl": 1, f"{corpus}/b.jsonl": 3})
    flags = ("--by=loss", "--keep=top", "--tokens=80", "--stratify=file", f"--weights={weights}")
    assert run(corpus, tmp_path, *flags) == 0
    assert [name for name, _ in kept(tmp_path)[1]] == ["a"] + ["b"] * 8  # 20 tokens of a, 60 of b
    assert run(corpus, tmp_path, "--by=loss", "--keep=top", "--records=2", "--stratify=loud") == 0
    assert kept(tmp_path)[1] == [("a", 18), ("a", 19)]


def test_bounds_drops_missing_scores_and_ties(corpus, tmp_path, capsys):
    assert run(corpus, tmp_path, "--by=loss", "--keep=top", "--max=0.9", "--drop=loud") == 0
    assert kept(tmp_path)[1] == [("a", 1), ("a", 3)]
    assert run(corpus, tmp_path, "--by=holey", "--keep=bottom", "--records=8") == 0
    assert kept(tmp_path)[1] == [(name, i) for name in "ab" for i in (0, 1, 2, 4)]
    assert run(corpus, tmp_path, "--by=flat", "--keep=top", "--records=3") == 0
    assert kept(tmp_path)[1] == [("a", 0), ("a", 1), ("a", 2)]
    assert "2 records have no score" in capsys.readouterr().out


def test_draws_depend_on_the_seed(corpus, tmp_path, capsys):
    drawn = []
    for seed in (0, 0, 1):
        assert run(corpus, tmp_path, "--keep=random", "--tokens=0.3", f"--seed={seed}") == 0
        drawn.append(kept(tmp_path))
    assert drawn[0] == drawn[1] != drawn[2]
    assert 0.2 < drawn[0][0]["tokens"] / 470 <= 0.3


def test_records_are_written_whole_where_that_is_asked_for(corpus, tmp_path, capsys):
    assert run(corpus, tmp_path, "--by=loss", "--keep=top", "--records=2", "--write=records", "--stratify=file") == 0
    lines = [json.loads(line) for line in (tmp_path / "kept.jsonl").read_text().splitlines()]
    assert [len(line["text"]) for line in lines] == [24, 5]


def test_a_report_says_where_the_data_is_another_by_now(corpus, tmp_path, capsys):
    data, rows = tmp_path / "c.jsonl", []
    for number in range(3):
        place = (str(data), number)
        rows.append(
            scores.row(place, scores.digest({"text": f"old {number}"}), (5, 5), {"x": (-1) ** number * 1.7e308})
        )
    (tmp_path / "scores.jsonl").write_bytes(b"".join(rows))
    data.write_text('{"text": "old 0"}\n{"text": "new"}\n{"text": \n')
    assert run(tmp_path, tmp_path, "--by=x", "--keep=top", "--records=2") == 0
    shown = capsys.readouterr().out
    assert "old 0" in shown
    assert shown.count("(another record by now)") == 4  # of two records, at each end
    assert run(tmp_path, tmp_path, "--by=x", "--keep=top", "--records=3", "--write=records") == 2
    assert run(tmp_path, tmp_path, "--by=x", "--keep=top", "--records=3", "--stratify=x") == 0
    data.unlink()
    capsys.readouterr()
    assert run(tmp_path, tmp_path, "--by=x", "--keep=top", "--records=2", "--write=records") == 2
    assert "--scores: was made of" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--by=los", "--keep=top", "--tokens=9"], "--by = los: there is no such score. Did you mean 'loss'?"),
        (["--keep=top", "--tokens=9"], "--keep = top: needs a score"),
        (["--by=loss", "--keep=random", "--tokens=9"], "random looks at no score"),
        (["--by=loss", "--keep=top", "--tokens=9", "--records=1"], "Leave one out"),
        (["--by=loss", "--keep=top"], "all records would be kept"),
        (["--by=loss", "--keep=top", "--records=1"], "--records = 1: is a share, and all records would be kept"),
        (["--by=loss", "--keep=top", "--tokens=9", "--center=0.3"], "--center: is of --keep=middle"),
        (["--by=loss", "--keep=top", "--tokens=9", "--seed=3"], "draws nothing by chance"),
        (["--by=loss", "--keep=top", "--max=0"], "no record may be kept"),
        (["--by=loss,flat", "--keep=top", "--tokens=9"], "several are coordinates of kcenter"),
        (["--by=loss", "--keep=top", "--tokens=9", "--stratify=file", '--weights={"x": 1}'], "no stratum 'x'"),
        (["--by=loss", "--keep=top", "--max=0.9", "--stratify=file"], "no record may be kept"),
        (["--by=loss", "--keep=top", "--records=1", "--ordered", "--write=records"], "--ordered: is of a list"),
        (["--by=loss", "--keep=top", "--records=2", "--report={folder}/kept.jsonl"], "is --output too"),
        (["--by=loss", "--keep=top", "--records=2", "--report={corpus}/a.jsonl"], "is read by this command"),
    ],
)
def test_flags_that_cannot_work(corpus, tmp_path, flags, words, capsys):
    before = (corpus / "a.jsonl").read_bytes()
    assert (
        run(
            corpus,
            tmp_path,
            *(each.replace("{folder}", str(tmp_path)).replace("{corpus}", str(corpus)) for each in flags),
        )
        == 2
    )
    assert (corpus / "a.jsonl").read_bytes() == before
    assert words in capsys.readouterr().err
    assert not (tmp_path / "kept.jsonl").exists()


def spec(**fields):
    return DataSpec(**{"eval_fraction": 0.0, "shuffle": False, "pack": False, "seq_len": 32, **fields})


def load(**fields):
    return dataset.load(spec(**fields), TokenizerSpec(kind="byte"))


def texts(data):
    rows = [row for part, _ in data.train for row in part.batch(np.arange(len(part)))["tokens"]]
    return [bytes(int(t) for t in row if t < 256).decode().strip("\0") for row in rows]


def lines(path, numbers):
    own = path.read_text().splitlines()
    return [json.loads(own[i])["text"] for i in numbers]


def test_a_run_reads_what_was_selected_and_evaluates_on_all(corpus, tmp_path, monkeypatch):
    assert run(corpus, tmp_path, "--by=loss", "--keep=top", "--tokens=100", "--min=1") == 0
    data = load(path=f"{corpus}/a.jsonl", select=f"{tmp_path}/kept.jsonl", eval_path=f"{corpus}/b.jsonl")
    assert texts(data) == lines(corpus / "a.jsonl", range(16, 20))
    assert len(data.held_out) == 10
    monkeypatch.chdir(corpus)  # the same file by another name
    assert texts(load(path="a.jsonl", select=f"{tmp_path}/kept.jsonl")) == lines(corpus / "a.jsonl", range(16, 20))


def test_a_mixture_keeps_its_weights_whatever_is_left_of_its_parts(corpus, tmp_path):
    assert run(corpus, tmp_path, "--by=loss", "--keep=top", "--records=9", "--stratify=file") == 0
    path = f"0.25*{corpus}/a.jsonl,0.75*{corpus}/b.jsonl"
    data = load(path=path, select=f"{tmp_path}/kept.jsonl")
    assert [(len(rows), weight) for rows, weight in data.train] == [(6, 0.25), (3, 0.75)]
    source = dataset.make_source(data.train, batch_size=64, seed=0)
    batch, _ = source.next(source.init())
    short = (batch["segment_ids"] > 0).sum(axis=1) == 7
    assert 40 <= short.sum() <= 56
    named = load(
        path="",
        sources={
            "a": {"path": f"{corpus}/a.jsonl", "select": f"{tmp_path}/kept.jsonl"},
            "b": {"path": f"{corpus}/b.jsonl"},
        },
    )
    assert [source["records"] for source in named.report["sources"]] == [6, 10]


def test_another_corpus_is_refused_by_name(corpus, tmp_path):
    assert run(corpus, tmp_path, "--by=loss", "--keep=bottom", "--records=5", "--stratify=file") == 0
    path, kept = f"{tmp_path}/kept.jsonl", (corpus / "a.jsonl").read_text()
    (tmp_path / "c.jsonl").write_text(kept)
    with pytest.raises(InputError, match=r"data.select = .* says nothing of .*c.jsonl, and was made of .*a.jsonl, "):
        load(path=f"{tmp_path}/c.jsonl", select=path)
    other = tmp_path / "other"
    other.mkdir()
    rows = [json.loads(line) for line in (tmp_path / "kept.jsonl").read_text().splitlines()]
    rows = [{k: v for k, v in row.items() if k != ("check" if i else "digest")} for i, row in enumerate(rows)]
    rows[0]["selection"]["files"] = {str(other / "a.jsonl"): 20}
    of_a = [{**row, "file": str(other / "a.jsonl")} for row in rows[1:] if "a.jsonl" in row["file"]]
    rows[0]["selection"]["records"] = len(of_a)
    changed = [rows[0], *of_a]
    (other / "kept.jsonl").write_text("".join(json.dumps(row) + "\n" for row in changed))
    (other / "a.jsonl").write_text(kept.replace(json.loads(kept.splitlines()[1])["text"], "something else"))
    with pytest.raises(InputError, match=r"a.jsonl:2 is another record than the one that was scored"):
        load(path=f"{other}/a.jsonl", select=f"{other}/kept.jsonl")
    (other / "a.jsonl").write_text(kept + '{"text": "one more"}\n')
    with pytest.raises(InputError, match=r"had 20 records when they were scored, and has 21"):
        load(path=f"{other}/a.jsonl", select=f"{other}/kept.jsonl")
    assert run(corpus, tmp_path, "--by=loss", "--keep=top", "--records=2") == 0
    with pytest.raises(InputError, match=r"keeps nothing of '.*b.jsonl'"):
        load(path=f"{corpus}/a.jsonl,{corpus}/b.jsonl", select=path)
    for text, words in (("x", "is no selection"), ('{"selection": {}}', "is no selection")):
        (tmp_path / "bad.jsonl").write_text(text)
        with pytest.raises(InputError, match=words):
            load(path=f"{corpus}/a.jsonl", select=f"{tmp_path}/bad.jsonl")


def test_a_selection_that_is_damaged_is_named(corpus, tmp_path):
    assert run(corpus, tmp_path, "--by=loss", "--keep=bottom", "--records=5") == 0
    text = (tmp_path / "kept.jsonl").read_text()
    for old, new in (('"records": 5', '"records": 4'), ('"rank": 3', '"rank": 7')):
        assert old in text
        (tmp_path / "bad.jsonl").write_text(text.replace(old, new, 1))
        with pytest.raises(InputError, match=r"bad.jsonl.*isn't what was written: it is damaged"):
            load(path=f"{corpus}/a.jsonl,{corpus}/b.jsonl", select=f"{tmp_path}/bad.jsonl")


@pytest.mark.parametrize("pack", [False, True])
def test_a_curriculum_is_read_in_the_order_of_preference(corpus, tmp_path, pack):
    assert run(corpus, tmp_path, "--by=loss", "--keep=top", "--ordered", "--stratify=file") == 0
    path = f"{tmp_path}/kept.jsonl"
    data = load(path=f"{corpus}/a.jsonl", select=path, pack=pack, seq_len=64)
    (rows, _), *_ = data.train
    batch = rows.batch(np.arange(len(rows)))
    read = [bytes(int(t) for t in row if t < 256).decode().strip("\0") for row in batch["tokens"]]
    assert "".join(read) == "".join(lines(corpus / "a.jsonl", reversed(range(20))))
    assert (len(rows) < 20) == pack
    with pytest.raises(InputError, match=r"is in an order to train in, which data.shuffle = True loses"):
        load(path=f"{corpus}/a.jsonl", select=path, shuffle=True)


def test_a_changed_selection_is_tokenised_anew(corpus, tmp_path):
    for count in (3, 4):
        assert run(corpus, tmp_path, "--by=loss", "--keep=top", f"--records={count}") == 0
        assert len(texts(load(path=f"{corpus}/a.jsonl", select=f"{tmp_path}/kept.jsonl"))) == count
    assert selected.read(f"{tmp_path}/kept.jsonl", "x").about["records"] == 4


def test_a_list_that_was_cut_is_refused(corpus, tmp_path, capsys):
    assert run(corpus, tmp_path, "--by=loss", "--keep=top", "--records=4") == 0
    lines = (tmp_path / "kept.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "kept.jsonl").write_text("".join(lines[:-1]))
    with pytest.raises(InputError, match=r"says that it keeps 4 records, and names 3"):
        selected.read(str(tmp_path / "kept.jsonl"), "data.select")
