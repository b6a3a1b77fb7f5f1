import dataclasses
import json
import threading

import numpy as np
import pytest

from research.errors import InputError
from research.sources.dataset import DataSpec, eval_batches, has_plain_texts, load, make_source
from research.sources.tokenizers import Tokenizer, TokenizerSpec

BYTE = TokenizerSpec()


def write(path, records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return str(path)


def pairs(n, tag=""):
    return [{"prompt": f"{tag}{i}" + "?" * (i % 7), "response": "x" * (1 + i % 11)} for i in range(n)]


def documents(batch, tokenizer):
    """All documents of a batch as (text, supervised text), with their special tokens."""
    found = []
    for row in range(len(batch["tokens"])):
        for segment in range(1, batch["segment_ids"][row].max(initial=0) + 1):
            here = batch["segment_ids"][row] == segment
            tokens, mask = batch["tokens"][row, here], batch["loss_mask"][row, here] == 1
            assert batch["positions"][row, here].tolist() == list(range(here.sum()))
            found.append(tuple(tokenizer.decode(ids, skip_special=False) for ids in (tokens, tokens[mask])))
    return found


def all_rows(rows):
    return rows.batch(np.arange(len(rows)))


@pytest.fixture
def path(tmp_path):
    return write(tmp_path / "a.jsonl", pairs(200))


@pytest.mark.parametrize("pack", [True, False])
@pytest.mark.parametrize("kind", ["byte", "bpe"])
def test_every_example_once_and_whole(path, pack, kind):
    data = load(DataSpec(path, seq_len=48, pack=pack), TokenizerSpec(kind, 290))
    rows = data.train[0][0]
    batch = all_rows(rows)
    found = documents(batch, data.tokenizer) + documents(all_rows(data.held_out), data.tokenizer)
    want = [
        (f"<|bos|><|user|>{r['prompt']}<|assistant|>{r['response']}<|eos|>", f"{r['response']}<|eos|>")
        for r in pairs(200)
    ]
    assert sorted(found) == sorted(want)
    assert {name: (value.shape[1], value.dtype) for name, value in batch.items()} == {
        "tokens": (48, np.int32),
        "segment_ids": (48, np.int32),
        "positions": (48, np.int32),
        "loss_mask": (48, np.float32),
    }
    padding = batch["segment_ids"] == 0
    assert not batch["loss_mask"][padding].any()
    report = data.report["train"]
    assert report["tokens"] == (~padding).sum()
    assert report["supervised_tokens"] == batch["loss_mask"].sum()
    assert report["packing_efficiency"] == pytest.approx(np.mean(~padding))
    assert report["rows"] == len(rows)
    assert report["examples"] + data.report["held_out"]["examples"] == 200
    assert (report["rows"] == report["examples"]) != pack
    assert report["packing_efficiency"] > (0.95 if pack and kind == "byte" else 0.1)


def test_long_texts_are_cut_and_lose_nothing(tmp_path):
    texts = ["".join(chr(97 + (i * j) % 26) for j in range(n)) for i, n in enumerate([300, 5, 64, 1, 61, 62, 63])]
    path = write(tmp_path / "a.jsonl", [{"text": text} for text in texts])
    data = load(DataSpec(path, seq_len=64, eval_fraction=0, shuffle=False), BYTE)
    rows = data.train[0][0]
    pieces = [text for text, learned in documents(all_rows(rows), data.tokenizer) if text == learned]
    assert len(pieces) == data.report["train"]["tokens"] - data.report["train"]["supervised_tokens"]
    joined = "".join(pieces)
    assert len(joined) == sum(len(f"<|bos|>{text}<|eos|>") for text in texts)
    assert all(f"<|bos|>{text}<|eos|>" in joined for text in texts if len(text) + 2 <= 64)
    assert f"<|bos|>{texts[0]}"[:64] in joined
    assert rows.length.max() == 64
    assert len(data.held_out) == 0
    assert list(eval_batches(data.held_out, 4)) == []


def test_eos_is_learned_when_it_is_also_the_padding(path):
    data = load(DataSpec(path, seq_len=64), BYTE)
    assert data.tokenizer.eos != 0
    same = dataclasses.replace(data.tokenizer, eos=0)
    batch = all_rows(load(DataSpec(path, seq_len=64), BYTE, tokenizer=same).train[0][0])
    real = batch["segment_ids"] > 0
    assert (batch["tokens"][~real] == 0).all()
    ends = real & (batch["tokens"] == 0)
    assert ends.sum() == data.report["train"]["examples"]
    assert batch["loss_mask"][ends].all()


def test_long_and_unlearnable_conversations_are_counted(tmp_path):
    records = [
        {"prompt": "p", "response": "r"},
        {"prompt": "p2", "response": "r" * 40},
        {"prompt": "p" * 40, "response": "r"},
        {"prompt": "p3", "response": "r"},
    ]
    path = write(tmp_path / "a.jsonl", records)
    dropped = load(DataSpec(path, seq_len=32, eval_fraction=0), BYTE).report["train"]
    assert (dropped["examples"], dropped["too_long_dropped"], dropped["nothing_supervised"]) == (2, 2, 0)
    data = load(DataSpec(path, seq_len=32, eval_fraction=0, on_long="truncate"), BYTE)
    cut = data.report["train"]
    assert (cut["examples"], cut["too_long_truncated"], cut["nothing_supervised"]) == (3, 2, 1)
    assert cut["supervised_tokens"] == all_rows(data.train[0][0])["loss_mask"].sum() == 2 + 2 + 32 - 5
    with pytest.raises(InputError, match=r"left to train on \(4 longer than data.seq_len=4\).*on_long='truncate'"):
        load(DataSpec(path, seq_len=4, eval_fraction=0), BYTE)
    with pytest.raises(InputError, match="4 cut before their answer"):
        load(DataSpec(path, seq_len=3, eval_fraction=0, on_long="truncate"), BYTE)


def prompts(rows, tokenizer):
    return {text.split("<|user|>")[1].split("<|assistant|>")[0] for text, _ in documents(all_rows(rows), tokenizer)}


def test_equal_prompts_never_stand_on_both_sides(tmp_path):
    records = [{"prompt": f"p{i % 40}", "response": f"r{i}"} for i in range(200)]
    sides = []
    for name, some in (("a", records), ("b", records[::-1])):
        path = write(tmp_path / f"{name}.jsonl", some)
        data = load(DataSpec(path, seq_len=64, eval_fraction=0.2), BYTE)
        train, held_out = prompts(data.train[0][0], data.tokenizer), prompts(data.held_out, data.tokenizer)
        assert not train & held_out
        assert len(train | held_out) == 40
        assert {r["prompt"] for r in data.held_out_records} == held_out
        assert len(data.held_out_records) == len(held_out), "one a prompt"
        sides.append(held_out)
    assert sides[0] == sides[1], "whatever the order of the records"
    both = f"{tmp_path}/a.jsonl,{write(tmp_path / 'c.jsonl', pairs(100))}"
    assert prompts(load(DataSpec(both, seq_len=64, eval_fraction=0.2), BYTE).held_out, data.tokenizer) >= sides[0]


def test_a_few_records_still_give_one_to_each_side(tmp_path):
    path = write(tmp_path / "a.jsonl", pairs(2))
    for fraction in (0.001, 0.999):
        data = load(DataSpec(path, seq_len=64, eval_fraction=fraction), BYTE)
        assert (data.report["train"]["examples"], data.report["held_out"]["examples"]) == (1, 1)
    data = load(DataSpec(write(tmp_path / "b.jsonl", pairs(1) * 3), seq_len=64), BYTE)
    assert (data.report["train"]["examples"], data.report["held_out"]["examples"]) == (3, 0)


def test_eval_path_takes_its_prompts_out_of_training(tmp_path):
    train = write(tmp_path / "a.jsonl", pairs(50))
    held = write(tmp_path / "b.jsonl", pairs(60)[40:])
    data = load(DataSpec(train, eval_path=held, seq_len=64), BYTE)
    assert data.report["train"]["dropped_as_in_eval_path"] == 10
    assert not prompts(data.train[0][0], data.tokenizer) & prompts(data.held_out, data.tokenizer)
    assert len(data.held_out_records) == 20


def test_records_keep_what_a_verifier_needs():
    data = load(DataSpec("tasks:sort_numbers", examples=300, seq_len=128), BYTE)
    assert {"prompt", "response", "task"} <= set(data.held_out_records[0])
    assert data.held_out_records[0]["task"] == "sort_numbers"


def test_renamed_columns_reach_the_records(tmp_path):
    path = write(tmp_path / "a.jsonl", [{"q": str(i), "a": "b"} for i in range(9)])
    data = load(DataSpec(path, fields={"prompt": "q", "response": "a"}, seq_len=64), BYTE)
    assert data.held_out_records[0]["response"] == "b"


def test_max_records(path):
    report = load(DataSpec(path, seq_len=64, max_records=10), BYTE).report
    assert report["train"]["examples"] + report["held_out"]["examples"] == 10


def test_texts_without_conversations_are_told_apart(path, tmp_path):
    texts = write(tmp_path / "t.jsonl", [{"text": f"text {i}"} for i in range(20)])
    for entry, plain in ((path, False), (texts, True), (f"{path},{texts}", False)):
        assert has_plain_texts(load(DataSpec(entry, seq_len=64), BYTE)) == plain


def test_a_second_run_neither_reads_nor_tokenises(path, monkeypatch):
    spec, bpe = DataSpec(path, seq_len=64), TokenizerSpec("bpe", 290)
    first = load(spec, bpe)

    def forbidden(*args):
        raise AssertionError

    monkeypatch.setattr(Tokenizer, "encode_batch", forbidden)
    monkeypatch.setattr("research.sources.records.parse", forbidden)
    second = load(dataclasses.replace(spec, seq_len=32, eval_fraction=0.05, on_long="truncate"), bpe)
    assert second.report["sources"][0]["was_cached"]
    assert second.held_out_records == first.held_out_records


def test_bpe_learns_nothing_from_what_is_held_out(tmp_path):
    records = [{"text": f"document {i} " + "zqzqzq" * 20 * (i == 3)} for i in range(8)]
    path = write(tmp_path / "a.jsonl", records[3:4])
    data = load(DataSpec(write(tmp_path / "b.jsonl", records), eval_path=path, seq_len=64), TokenizerSpec("bpe", 300))
    assert len(data.tokenizer.encode("zqzqzqzq")) == 8


@pytest.fixture
def data(path):
    return load(DataSpec(path, seq_len=48), BYTE)


def batches(source, n, state=None):
    state = state or source.init()
    made = []
    for _ in range(n):
        batch, state = source.next(state)
        made.append(batch)
    return made, state


def same(a, b):
    return a.keys() == b.keys() and all((a[name] == b[name]).all() and a[name].dtype == b[name].dtype for name in a)


def test_resumed_is_uninterrupted(data):
    make = lambda: make_source(data.train, batch_size=6, seed=3)  # noqa: E731
    whole, _ = batches(make(), 40)
    _, state = batches(make(), 17)
    state = json.loads(json.dumps(state))
    rest, _ = batches(make(), 23, state)
    assert all(same(a, b) for a, b in zip(whole[17:], rest, strict=True))
    source, results = make(), {}
    threads = [
        threading.Thread(target=lambda i=i: results.update({i: source.next({"row": 6 * i})[0]})) for i in range(20)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(same(whole[i], results[i]) for i in range(20))
    other, _ = batches(make_source(data.train, batch_size=6, seed=4), 1)
    assert not same(whole[0], other[0])


def test_spec_is_that_of_the_global_batch(data):
    source = make_source(data.train, batch_size=6, seed=3, mine=[0, 2, 5])
    (batch,), _ = batches(source, 1)
    assert {k: (v.shape, v.dtype) for k, v in source.spec.items()} == {k: ((6, 48), v.dtype) for k, v in batch.items()}
    assert batch["tokens"].shape == (3, 48)


def test_processes_share_the_global_batch(data):
    alone, _ = batches(make_source(data.train, batch_size=6, seed=3), 5)
    shares = [
        batches(make_source(data.train, batch_size=6, seed=3, mine=range(2 * p, 2 * p + 2)), 5)[0] for p in range(3)
    ]
    for whole, *parts in zip(alone, *shares, strict=True):
        assert same(whole, {name: np.concatenate([part[name] for part in parts]) for name in whole})


@pytest.mark.parametrize("n", [1, 2, 30, 5000])
def test_every_row_once_an_epoch_in_a_new_order(tmp_path, n):
    path = write(tmp_path / "a.jsonl", [{"text": f"{i:04}"} for i in range(n)])
    data = load(DataSpec(path, seq_len=6, pack=False, eval_fraction=0), BYTE)
    source = make_source(data.train, batch_size=n, seed=0)
    (one, two), _ = batches(source, 2)
    orders = [["".join(map(chr, row[1:5])) for row in batch["tokens"]] for batch in (one, two)]
    assert sorted(orders[0]) == sorted(orders[1]) == [f"{i:04}" for i in range(n)]
    assert n < 30 or orders[0] != orders[1] != sorted(orders[0]) != orders[0]
    data = load(DataSpec(path, seq_len=6, pack=False, eval_fraction=0, shuffle=False), BYTE)
    (one,), _ = batches(make_source(data.train, batch_size=n, seed=0, shuffle=False), 1)
    assert ["".join(map(chr, row[1:5])) for row in one["tokens"]] == [f"{i:04}" for i in range(n)]


def test_mixture_weights_hold(tmp_path):
    a = write(tmp_path / "a.jsonl", pairs(40, "a"))
    b = write(tmp_path / "b.jsonl", [{"text": f"b{i}"} for i in range(300)])
    data = load(DataSpec(f"0.7*{a}, 0.3*{b}", seq_len=32, pack=False), BYTE)
    assert [weight for _, weight in data.train] == [0.7, 0.3]
    made, _ = batches(make_source(data.train, batch_size=50, seed=0), 40)
    first = np.concatenate([batch["tokens"][:, 1] for batch in made])
    of_a = np.mean(first == data.tokenizer.special("<|user|>"))
    assert of_a == pytest.approx(0.7, abs=0.01)
    texts = np.concatenate([batch["tokens"][batch["tokens"][:, 1] == ord("b")] for batch in made])
    counts = np.unique(texts, axis=0, return_counts=True)[1]
    assert counts.max() - counts.min() <= 1, "each part runs through its own epochs"
    assert data.held_out_records


def test_without_weights_all_rows_come_equally_often(tmp_path):
    a = write(tmp_path / "a.jsonl", pairs(40, "a"))
    b = write(tmp_path / "b.jsonl", [{"text": f"b{i}"} for i in range(300)])
    data = load(DataSpec(f"{a},{b},tasks:copy", examples=50, seq_len=64, pack=False, eval_fraction=0), BYTE)
    ((rows, weight),) = data.train
    assert weight == 1.0
    (batch,), _ = batches(make_source(data.train, batch_size=len(rows), seed=0), 1)
    found = documents(batch, data.tokenizer)
    assert len(set(found)) == len(found) == len(rows)
    assert {(text, learned) for text, learned in found if "<|user|>" not in text} == {
        (f"<|bos|>b{i}<|eos|>",) * 2 for i in range(300)
    }
    assert {learned for text, learned in found if "<|user|>a" in text} >= {f"{'x' * n}<|eos|>" for n in range(1, 12)}


def test_evaluation_sees_every_row_once(path):
    data = load(DataSpec(path, seq_len=48, eval_fraction=0.6), BYTE)
    rows = data.held_out
    assert len(rows) % 8
    made = list(eval_batches(rows, 8))
    assert {batch["tokens"].shape for batch in made} == {(8, 48)}
    found = [document for batch in made for document in documents(batch, data.tokenizer)]
    assert sorted(found) == sorted(documents(all_rows(rows), data.tokenizer))
    assert not made[-1]["segment_ids"][len(rows) % 8 :].any()
    some = list(eval_batches(rows, 8, 2))
    assert len(some) == 2
    assert len({row.tobytes() for batch in some for row in batch["tokens"]}) == 16
    shares = [list(eval_batches(rows, 8, mine=range(4 * p, 4 * p + 4))) for p in range(2)]
    for whole, *parts in zip(made, *shares, strict=True):
        assert same(whole, {name: np.concatenate([part[name] for part in parts]) for name in whole})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format": "txt"}, "data.format: 'txt' is not known. Did you mean 'text'?"),
        ({"template": "chatml"}, "data.template: 'chatml' is not known. Did you mean 'chat'?"),
        ({"on_bad_record": "ignore"}, "data.on_bad_record: 'ignore'"),
        ({"on_long": "trunc"}, "Did you mean 'truncate'?"),
        (
            {"fields": {"promt": "q"}},
            "data.fields: there is no field 'promt' to rename a column to. Did you mean 'prompt'?",
        ),
        ({"seq_len": 1}, "data.seq_len = 1"),
        ({"eval_fraction": 1.0}, "data.eval_fraction = 1.0"),
        ({"examples": 0}, "data.examples = 0"),
        ({"max_records": -1}, "data.max_records = -1"),
        ({"path": "{dir}/b.jsonl"}, "data.path: there is no"),
        ({"eval_path": "{dir}/b.jsonl"}, "data.eval_path: there is no"),
        ({"eval_path": "2*{dir}/a.jsonl"}, "has weights, but all of it is evaluated"),
        ({"path": "2*{dir}/a.jsonl,{dir}/a.jsonl"}, "some entries have a weight and some have none"),
        ({"path": "0*{dir}/a.jsonl"}, "must be greater than 0"),
        ({"path": "{dir}/a.jsonl,"}, "has an empty entry"),
        ({"path": ""}, "has an empty entry"),
        ({"path": "tasks:sort_number"}, "Did you mean 'sort_numbers'?"),
        ({"format": "messages"}, "a.jsonl:1: has no field 'messages'"),
    ],
)
def test_bad_input(path, tmp_path, change, message):
    change = {k: v.format(dir=tmp_path) if isinstance(v, str) else v for k, v in change.items()}
    with pytest.raises(InputError) as e:
        load(dataclasses.replace(DataSpec(path), **change), BYTE)
    assert message in str(e.value)


def test_a_comma_in_a_path_is_written_in_sources(tmp_path):
    file = tmp_path / "a, b.jsonl"
    write(file, pairs(20))
    for field, paths in (("path", {"path": str(file)}), ("eval_path", {"path": "tasks:copy", "eval_path": str(file)})):
        with pytest.raises(InputError) as error:
            load(DataSpec(**paths), BYTE)
        assert f"data.{field}: there is no" in str(error.value)
        assert f"data.sources={{'NAME': {{{field!r}: {str(file)!r}}}}}" in str(error.value)
    with pytest.raises(InputError, match=r"a path with a comma is named in data\.sources"):
        load(DataSpec(f"0.5*{file},0.5*tasks:copy"), BYTE)
    data = load(DataSpec("", sources={"one": {"path": str(file)}}, seq_len=64), BYTE)
    assert data.report["sources"][0]["records"] == 20


@pytest.mark.parametrize("on_long", ["drop", "truncate"])
def test_the_length_that_most_fit_in_is_reported(tmp_path, on_long):
    """100 examples of 11 to 110 tokens: bos, a prompt, a response of one letter, eos."""
    write(tmp_path / "a.jsonl", [{"prompt": "p" * n, "response": "r"} for n in range(8, 108)])
    spec = DataSpec(str(tmp_path / "a.jsonl"), template="plain", seq_len=60, eval_fraction=0, on_long=on_long)
    report = load(spec, BYTE).report["train"]
    assert report["length_99"] == 109
    assert report["too_long_dropped" if on_long == "drop" else "too_long_truncated"] == 50
    write(tmp_path / "b.jsonl", [{"text": "t" * 500}])
    texts = load(DataSpec(str(tmp_path / "b.jsonl"), seq_len=60, eval_fraction=0), BYTE).report["train"]
    assert texts["length_99"] == 0


@pytest.mark.parametrize(
    ("spec", "told", "untold"),
    [
        (
            {"on_long": "drop"},
            ["20 longer than data.seq_len=16", "Raise data.seq_len, set data.on_long='truncate'"],
            [],
        ),
        ({"on_long": "truncate"}, ["20 cut before their answer", "Raise data.seq_len, or give shorter"], ["on_long"]),
    ],
)
def test_what_to_do_where_nothing_is_left_is_not_set_already(tmp_path, spec, told, untold):
    write(tmp_path / "a.jsonl", [{"prompt": f"{i} " + "p" * 50, "response": "r"} for i in range(20)])
    with pytest.raises(InputError) as error:
        load(DataSpec(str(tmp_path / "a.jsonl"), seq_len=16, eval_fraction=0, **spec), BYTE)
    assert all(words in str(error.value) for words in told), error.value
    assert not any(words in str(error.value) for words in untold), error.value
