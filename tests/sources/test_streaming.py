"""Data that is read while a run trains: its rows, its place, how far it is read ahead, and what it refuses."""

import concurrent.futures
import dataclasses
import itertools
import json
import threading
from collections import Counter

import numpy as np
import pytest

from research.errors import InputError
from research.run import record
from research.sources import packing, streaming
from research.sources.dataset import DataSpec, load, source_of
from research.sources.entries import locate
from research.sources.tokenizers import TokenizerSpec

BYTE = TokenizerSpec()


def write(path, records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return str(path)


def pairs(n, tag=""):
    return [{"prompt": f"{tag}{i}" + "?" * (i % 7), "response": "x" * (1 + i % 11)} for i in range(n)]


def spec_of(path, **options):
    return DataSpec(path, **{"seq_len": 48, "streaming": True, "buffer": 32} | options)


def documents(batch, tokenizer):
    return [
        tokenizer.decode(batch["tokens"][row][batch["segment_ids"][row] == k])
        for row in range(len(batch["tokens"]))
        for k in range(1, batch["segment_ids"][row].max() + 1)
    ]


def drawn(source, steps, state=None):
    """The batches of so many steps, and the state after them; what is kept of the state is JSON."""
    batches, state = [], source.init() if state is None else json.loads(json.dumps(state))
    for _ in range(steps):
        batch, state = source.next(state)
        batches.append(batch)
    return batches, state


def assert_same(a, b):
    for x, y in zip(a, b, strict=True):
        assert x.keys() == y.keys()
        for name in x:
            np.testing.assert_array_equal(x[name], y[name], err_msg=name)


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    return write(tmp_path_factory.mktemp("data") / "a.jsonl", pairs(600))


@pytest.fixture(scope="module")
def data(path):
    return load(spec_of(path, eval_records=50), BYTE)


def source_(data, batch_size=8, mine=None):
    return source_of(data, batch_size=batch_size, seed=0, mine=mine)


def test_every_record_comes_once_in_a_pass_and_the_first_ones_are_held_out(data):
    batches, state = drawn(source_(data), 40)
    found = [text for batch in batches for text in documents(batch, data.tokenizer)]
    held = set(documents(data.held_out.batch(np.arange(len(data.held_out))), data.tokenizer))
    assert len(held) == 50
    assert state["parts"][0]["cursor"]["epoch"] == 1  # a pass is over
    first, times = set(found[:550]), Counter(found)
    assert len(times) == 550
    assert not held & set(times)
    assert len(first) == 550
    # Neighbours aren't those of the file, nor are those of the next pass the same.
    assert found[:20] != sorted(found[:20])
    assert found[550:580] != found[:30]


def test_rows_in_order_are_those_of_a_reference_packing(path, data):
    ordered = load(spec_of(path, shuffle=False, buffer=16), BYTE)
    stream = ordered.streams[0]
    block = stream.block(streaming.START)
    sizes = np.array([len(f"{r['prompt']}{r['response']}".encode()) + 4 for r in pairs(600)])
    n = block.counts["records"]
    order, splits = packing.rows_of(sizes[:n], 48)
    batch = block.rows.batch(block.order)
    want = [
        [pairs(600)[i]["prompt"] + pairs(600)[i]["response"] for i in order[a:b]] for a, b in itertools.pairwise(splits)
    ]
    got = [documents({k: v[r : r + 1] for k, v in batch.items()}, data.tokenizer) for r in range(len(block.order))]
    strip = lambda rows: [[text.replace("<|user|>", "").replace("<|assistant|>", "") for text in r] for r in rows]  # noqa: E731
    assert strip(got) == want
    assert 14 <= len(want) <= 20


def test_a_run_that_goes_on_sees_the_same_bits(data):
    whole, _ = drawn(source_(data), 30)
    _, state = drawn(source_(data), 11)
    rest, _ = drawn(source_(data), 19, state)
    assert_same(whole[11:], rest)
    # So does one that goes on with batches of another size: no row is missed or repeated.
    halves, _ = drawn(source_(data, 4), 38, state)
    joined = [{k: np.concatenate([a[k], b[k]]) for k in a} for a, b in zip(halves[::2], halves[1::2], strict=True)]
    assert_same(whole[11:], joined)


def test_processes_hold_rows_of_their_own_and_together_the_batch(data):
    whole, state = drawn(source_(data), 12)
    for shares in ([range(4), range(4, 8)], [[0, 1], [2, 5, 7], [3, 4, 6]]):
        parts = [drawn(source_(data, mine=list(share)), 12) for share in shares]
        assert all(each[1] == state for each in parts)
        for i, batch in enumerate(whole):
            for share, (batches, _) in zip(shares, parts, strict=True):
                assert_same([{name: value[list(share)] for name, value in batch.items()}], [batches[i]])


def test_a_mixture_is_drawn_by_weight_and_goes_on(path, tmp_path):
    other = write(tmp_path / "b.jsonl", pairs(90, "other "))
    sources = {"a": {"path": path, "weight": 0.75}, "b": {"path": other, "weight": 0.25}}
    data = load(DataSpec("", sources=sources, seq_len=48, streaming=True, buffer=16), BYTE)
    whole, state = drawn(source_(data), 30)
    of_b = np.mean([(batch["source"] == 1).any(axis=1).mean() for batch in whole])
    assert abs(of_b - 0.25) < 0.02
    assert state["parts"][1]["cursor"]["epoch"] > state["parts"][0]["cursor"]["epoch"]
    _, middle = drawn(source_(data), 13)
    assert_same(whole[13:], drawn(source_(data), 17, middle)[0])
    assert streaming.passed(state)["passes"] == 0
    table = record.source_table(data.report, drawn=240)
    assert [line.split()[1:3] for line in table[1:]] == [["streamed", "streamed"]] * 2
    lines = []
    record.describe_data(lines.append, data.report)
    assert any("a: streamed, of which the first" in line for line in lines)


def test_entries_without_weights_are_read_one_after_the_other(tmp_path):
    paths = [write(tmp_path / f"{tag}.jsonl", pairs(40, tag)) for tag in "ab"]
    data = load(spec_of(",".join(paths), buffer=8), BYTE)
    batches, state = drawn(source_(data, 4), 12)
    firsts = [documents(batch, data.tokenizer)[0].strip("<|user>")[0] for batch in batches]
    assert "".join(key for key, _ in itertools.groupby(firsts)).startswith("ab")
    assert state["parts"][0]["cursor"]["block"] > 2


def test_reads_ahead_no_further_than_its_buffer(data, path):
    """A generator that counts how far it is read, where the rows that are drawn are counted too."""
    stream = data.streams[0]
    read, lock = [0], threading.Lock()

    def endless(position):
        for i in itertools.count(position[0] if position else 0):
            with lock:
                read[0] = max(read[0], i)
            yield [i + 1], f"line {i + 1}", json.dumps(pairs(1, str(i))[0]).encode()

    one = stream.inputs[0]
    one = one._replace(origin=one.origin._replace(stream=endless))
    stream = dataclasses.replace(stream, inputs=(one,), held_out=np.zeros(0, np.uint64))
    source = streaming.make_source([stream], [1.0], data.train[0][0].spec(8), batch_size=8)
    state, documents_drawn, most = source.init(), 0, 0
    for _ in range(60):
        batch, state = source.next(state)
        documents_drawn += int(batch["segment_ids"].max(axis=1).sum())
        most = max(most, read[0] - documents_drawn)
    # Two blocks: the one that is drawn from and the next.
    assert documents_drawn > 1500
    assert most < 2.2 * 32 * 5


def test_a_bad_record_in_the_middle_is_named_or_skipped_and_counted(tmp_path):
    records = pairs(300)
    path = write(tmp_path / "a.jsonl", records)
    lines = (tmp_path / "a.jsonl").read_text().splitlines()
    lines[207] = '{"prompt": "cut'
    (tmp_path / "a.jsonl").write_text("\n".join(lines) + "\n")
    data = load(spec_of(path, buffer=8), BYTE)
    with pytest.raises(InputError, match=r"a\.jsonl:208: invalid JSON.*data\.on_bad_record='skip'"):
        drawn(source_(data), 40)
    skipping = load(spec_of(path, buffer=8, on_bad_record="skip"), BYTE)
    _, state = drawn(source_(skipping), 14)
    assert streaming.passed(state)["records_skipped"] == 1
    # Until there the rows are the same, so that the same run goes on with it.
    _, middle = drawn(source_(data), 3)
    assert_same(drawn(source_(skipping), 6)[0][3:], drawn(source_(skipping), 3, middle)[0])


def test_data_that_changed_under_a_run_is_named(tmp_path):
    path = write(tmp_path / "a.jsonl", pairs(300))
    data = load(spec_of(path, buffer=8), BYTE)
    _, state = drawn(source_(data), 5)
    text = (tmp_path / "a.jsonl").read_text()
    at = state["parts"][0]["cursor"]["at"][1]
    (tmp_path / "a.jsonl").write_text(text[:at] + text[at:].replace("x", "y"))
    with pytest.raises(InputError, match=r"a\.jsonl' isn't what it was .* from its record \d+ on"):
        drawn(source_(load(spec_of(path, buffer=8), BYTE)), 1, state)


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz", "a.txt", "part*.jsonl"])
def test_files_are_read_on_from_a_place(tmp_path, name):
    import gzip

    text = "".join(json.dumps({"text": f"one {i}"}) + "\n\n" * (i % 3 == 0) for i in range(50))
    (tmp_path / "a.jsonl").write_text("\ufeff" + text)
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(text.encode()))
    (tmp_path / "a.txt").write_text(("word " * 200 + "\n\n") * 90)
    for i in range(3):
        write(tmp_path / f"part{i}.jsonl", pairs(7, str(i)))
    origin = locate(str(tmp_path / name), count=0, seed=0)
    records = list(origin.stream([]))
    assert [(where, raw) for _, where, raw in records] == list(origin.read())
    for i, (at, _, _) in enumerate(records):
        assert list(origin.stream(json.loads(json.dumps(at)))) == records[i + 1 :]


def test_the_hub_is_read_row_by_row(tmp_path):
    pytest.importorskip("datasets")
    (tmp_path / "repo").mkdir()
    write(tmp_path / "repo/train.jsonl", pairs(120))
    hub, options = f"hf:{tmp_path}/repo:train", {"buffer": 8, "eval_records": 10}
    data = load(spec_of(hub, **options), BYTE)
    file = load(spec_of(str(tmp_path / "repo/train.jsonl"), **options), BYTE)
    whole, state = drawn(source_(data), 6)
    assert_same(whole, drawn(source_(file), 6)[0])
    more, _ = drawn(source_(data), 2, state)
    assert_same(more, drawn(source_(file), 8)[0][6:])
    with pytest.raises(InputError, match=r"could not be loaded .*hf:NAME:SPLIT"):
        load(spec_of(f"hf:{tmp_path}/repo:dev", **options), BYTE)


def test_rows_of_the_hub_may_be_read_in_several_threads(tmp_path):
    """A block is made ahead in one, while a new source begins in another."""
    pytest.importorskip("datasets")
    write(tmp_path / "train.jsonl", pairs(80))
    origin = locate(f"hf:{tmp_path}:train", count=0, seed=0, streaming=True)
    rows = [raw for _, _, raw in origin.stream([])]

    def read(first):
        return all([raw for _, _, raw in origin.stream([first])] == rows[first:] for _ in range(10))

    with concurrent.futures.ThreadPoolExecutor(3) as pool:
        assert all(pool.map(read, (1, 20, 50)))


def test_views_labels_and_comparisons_are_streamed(tmp_path):
    texts = write(tmp_path / "t.jsonl", [{"text": f"text number {i} of some"} for i in range(80)])
    source = {"t": {"path": texts, "view": {"kind": "reverse"}}}
    data = load(DataSpec("", sources=source, seq_len=48, streaming=True, buffer=8), BYTE)
    (batch,), _ = drawn(source_(data), 1)
    assert documents(batch, data.tokenizer)[0].startswith("emos fo ")
    labelled = write(tmp_path / "l.jsonl", [{"text": f"t {i}", "label": i % 3} for i in range(80)])
    options = {"format": "labelled", "num_classes": 4, "buffer": 8, "eval_records": 5}
    data = load(spec_of(labelled, **options), BYTE)
    (batch,), _ = drawn(source_(data), 1)
    assert batch["label_probs"].shape == (8, 48, 4)
    assert data.held_out.spec(1)["label_probs"].shape == (1, 48, 4)
    chosen = [{"prompt": f"p{i}", "chosen": "good", "rejected": "bad"} for i in range(80)]
    data = load(spec_of(write(tmp_path / "p.jsonl", chosen), buffer=8, eval_records=5), BYTE)
    (batch,), _ = drawn(source_(data), 1)
    assert set(batch["side"].ravel()) == {-1, 0, 1}
    assert data.held_out.spec(8).keys() == batch.keys()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"select": "kept.jsonl"}, "data.select: doesn't go with data.streaming"),
        ({"annotations": "folder"}, "data.annotations: doesn't"),
        ({"weights": "tokens"}, "data.weights = 'tokens': doesn't"),
        ({"keep_records": True}, "rewards: doesn't"),
        ({"mismatches": True}, "'mismatched': doesn't"),
        ({"eval_fraction": 0.2}, "data.eval_fraction = 0.2: doesn't .* data.eval_records"),
        ({"eval_records": 5, "max_records": 5}, "data.eval_records = 5: leaves nothing of data.max_records = 5"),
        ({"eval_records": 5, "eval_path": "b.jsonl"}, "data.eval_records = 5: doesn't"),
        ({"format": "labelled"}, "data.num_classes or data.labels"),
        ({"path": "tasks:copy"}, "'tasks:copy': is generated, and can't be streamed"),
        ({"path": "JSON"}, "is read as a whole, and can't be streamed. Write its records into a .jsonl"),
        ({"streaming": False, "buffer": 5}, "data.buffer = 5: is of data.streaming"),
        ({"streaming": False, "eval_records": 5}, "data.eval_records = 5: is of data.streaming"),
    ],
)
def test_what_a_stream_can_not_do_is_named(path, tmp_path, options, message):
    (tmp_path / "x.json").write_text(json.dumps(pairs(3)))
    if options.get("path") == "JSON":
        options = {"path": str(tmp_path / "x.json")}
    with pytest.raises(InputError, match=message):
        load(DataSpec(**{"path": path, "seq_len": 48, "streaming": True} | options), BYTE)


def test_data_of_which_nothing_is_left_ends(tmp_path):
    path = write(tmp_path / "a.jsonl", pairs(20))
    with pytest.raises(InputError, match=r"nothing of .* is left to train on"):
        load(spec_of(path, eval_records=20), BYTE)
