"""data.sources: named sources, their weights and options, and the batch field that says which one a token is of."""

import dataclasses
import json

import jax
import numpy as np
import pytest

from research import config as config_lib
from research import objectives
from research.devices import sharding
from research.errors import InputError
from research.planning import abstract
from research.run import assemble
from research.sources.dataset import DataSpec, eval_batches, load, make_source
from research.sources.tokenizers import TokenizerSpec

BYTE = TokenizerSpec()


def write(path, records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return str(path)


@pytest.fixture
def paths(tmp_path):
    pairs = [{"prompt": f"a{i}", "response": "x" * (1 + i % 11)} for i in range(60)]
    return write(tmp_path / "a.jsonl", pairs), write(tmp_path / "b.jsonl", [{"text": f"b{i}"} for i in range(200)])


def batches(data, n, batch_size=8, seed=0, start=0):
    source, state, drawn = make_source(data.train, batch_size=batch_size, seed=seed), {"row": start * batch_size}, []
    for _ in range(n):
        batch, state = source.next(state)
        drawn.append(batch)
    return drawn


def same(a, b, skip=()):
    return a.keys() - set(skip) == b.keys() - set(skip) and all(np.array_equal(a[k], b[k]) for k in b if k not in skip)


@pytest.mark.parametrize("weights", [(), (3, 1)])
def test_the_long_form_of_a_path_gives_the_same_batches(paths, weights):
    a, b = paths
    short = f"{weights[0]}*{a},{weights[1]}*{b}" if weights else f"{a},{b}"
    sources = {"pairs": {"path": a}, "prose": {"path": b}}
    for name, weight in zip(sources, weights, strict=False):
        sources[name]["weight"] = weight
    one, other = (load(spec, BYTE) for spec in (DataSpec(short, seq_len=48), DataSpec("", sources=sources, seq_len=48)))
    pairs = [*zip(batches(one, 12), batches(other, 12), strict=True)]
    pairs += zip(eval_batches(one.held_out, 4), eval_batches(other.held_out, 4), strict=True)
    for path, named in pairs:
        assert "source" not in path
        assert same(named, path, skip=("source",))
    assert (one.source_names, other.source_names) == ((a, b), ("pairs", "prose"))
    assert [weight for _, weight in other.train] == list(weights or [1.0])


@pytest.mark.parametrize("weighted", [False, True])
def test_source_says_where_each_token_is_from(paths, weighted):
    sources = {"prose": {"path": paths[1]}, "pairs": {"path": paths[0]}}
    if weighted:
        sources = {"prose": sources["prose"] | {"weight": 0.5}, "pairs": sources["pairs"] | {"weight": 0.5}}
    data = load(DataSpec("", sources=sources, seq_len=48), BYTE)
    user, seen = data.tokenizer.special("<|user|>"), [0, 0]
    for batch in [*batches(data, 12), *eval_batches(data.held_out, 8)]:
        assert (batch["source"].shape, batch["source"].dtype) == (batch["tokens"].shape, np.int32)
        assert not batch["source"][batch["segment_ids"] == 0].any()
        for row, segments in enumerate(batch["segment_ids"]):
            for segment in range(1, segments.max(initial=0) + 1):
                here = segments == segment
                (number,) = np.unique(batch["source"][row, here])
                assert data.source_names[number] == ("pairs" if user in batch["tokens"][row, here] else "prose")
                seen[number] += 1
    assert data.source_names == ("pairs", "prose")
    assert min(seen) > 20
    mixed = [np.unique(row[real]) for row, real in zip(batch["source"], batch["segment_ids"] > 0, strict=True)]
    assert weighted or any(len(numbers) == 2 for numbers in mixed)
    values = {"batch_size": 8, "seq_len": 48, "data": {"path": "", "sources": sources}}
    assert abstract.batch_spec(config_lib.parse(values))["source"] == jax.ShapeDtypeStruct((8, 48), np.int32)


def test_one_source_is_a_batch_as_ever(paths):
    data = load(DataSpec("", sources={"only": {"path": paths[0]}}, seq_len=48), BYTE)
    plain = load(DataSpec(paths[0], seq_len=48), BYTE)
    assert all(same(x, y) for x, y in zip(batches(data, 5), batches(plain, 5), strict=True))
    assert data.source_names == ("only",)


def test_resumed_is_uninterrupted(paths):
    sources = {"a": {"path": paths[0], "weight": 2}, "b": {"path": paths[1], "weight": 1}}
    load_again = lambda: load(DataSpec("", sources=sources, seq_len=48), BYTE, seed=3)  # noqa: E731
    whole, rest = batches(load_again(), 20, seed=3), batches(load_again(), 9, seed=3, start=11)
    assert all(same(x, y) for x, y in zip(whole[11:], rest, strict=True))


def test_weights_hold_and_the_report_says_so(paths):
    sources = {"a": {"path": paths[0], "weight": 0.75}, "b": {"path": paths[1], "weight": 0.25}}
    data = load(DataSpec("", sources=sources, seq_len=48), BYTE)
    drawn = batches(data, 50, batch_size=40)
    rows = np.concatenate([batch["source"][:, 0] for batch in drawn])
    assert np.mean(rows == 0) == pytest.approx(0.75, abs=0.01)
    real = [batch["source"][batch["segment_ids"] > 0] for batch in drawn]
    a, b = data.report["sources"]
    assert (a["name"], b["name"]) == ("a", "b")
    assert a["share"] == pytest.approx(np.mean(np.concatenate(real) == 0), abs=0.01)
    assert a["share"] + b["share"] == pytest.approx(1)
    for name in ("examples", "tokens"):
        assert a[name] + b[name] == data.report["train"][name]
    assert a["held_out_examples"] + b["held_out_examples"] == data.report["held_out"]["examples"]
    assert a["examples"] + a["held_out_examples"] == 60


def test_weights_may_be_shares_of_tokens(tmp_path):
    """Of rows that are full and rows that are nearly empty."""
    long = write(tmp_path / "long.jsonl", [{"text": f"{i:02} " + "x" * 60} for i in range(40)])
    short = write(tmp_path / "short.jsonl", [{"text": f"{i:02}"} for i in range(40)])
    sources = {"long": {"path": long, "weight": 0.5}, "short": {"path": short, "weight": 0.5}}
    spec = DataSpec("", sources=sources, seq_len=64, pack=False)
    by_rows, by_tokens = (load(dataclasses.replace(spec, weights=of), BYTE) for of in ("rows", "tokens"))
    assert [source["row_share"] for source in by_rows.report["sources"]] == [0.5, 0.5]
    assert by_rows.report["sources"][0]["share"] > 0.85
    assert [source["share"] for source in by_tokens.report["sources"]] == pytest.approx([0.5, 0.5])
    drawn = batches(by_tokens, 50, batch_size=40)
    real = np.concatenate([batch["source"][batch["segment_ids"] > 0] for batch in drawn])
    assert np.mean(real == 0) == pytest.approx(0.5, abs=0.02)


def test_without_weights_shares_are_those_of_the_tokens(paths):
    data = load(DataSpec(",".join(paths), seq_len=48), BYTE)
    a, b = data.report["sources"]
    assert a["share"] == pytest.approx(a["tokens"] / (a["tokens"] + b["tokens"]))


def test_every_option_of_a_source_has_an_effect(tmp_path):
    """Each against the same source without it, which takes the value from the data section."""
    columns = write(tmp_path / "c.jsonl", [{"q": f"q{i}", "a": "yes", "text": f"t{i}"} for i in range(20)])
    bad = write(tmp_path / "bad.jsonl", [{"text": f"t{i}"} for i in range(10)] + [{"text": ""}])
    labelled = write(tmp_path / "l.jsonl", [{"text": f"t{i}", "label": i % 2} for i in range(10)])
    renamed = {"prompt": "q", "response": "a"}

    def texts(path, data=None, **options):
        data = load(DataSpec("", sources={"one": {"path": path, **options}}, seq_len=64, **(data or {})), BYTE)
        batch = data.train[0][0].batch(np.arange(len(data.train[0][0])))
        return data, data.tokenizer.decode(batch["tokens"].reshape(-1).tolist(), skip_special=False)

    assert "<|user|>q1<|assistant|>yes" in texts(columns, format="prompt_response", fields=renamed)[1]
    assert "<|bos|>t1<|eos|>" in texts(columns)[1]
    assert "<|bos|>q1yes<|eos|>" in texts(columns, format="prompt_response", fields=renamed, template="plain")[1]
    assert texts(columns, max_records=5)[0].report["sources"][0]["records"] == 5
    assert texts("tasks:copy", examples=7)[0].report["sources"][0]["records"] == 7
    assert texts(bad, on_bad_record="skip")[0].report["sources"][0]["bad"] == {"empty text": 1}
    assert "t1?" in texts(labelled, format="labelled", prompt="{text}?")[1]
    held = texts(columns, eval_path=bad, on_bad_record="skip")[0].report
    assert held["held_out"]["examples"] == 10
    assert held["train"]["dropped_as_in_eval_path"] == 10
    inherited = texts(columns, data={"format": "prompt_response", "fields": renamed, "template": "plain"})[1]
    assert "<|bos|>q1yes<|eos|>" in inherited


def test_held_out_prompts_are_put_as_their_source_puts_them(paths):
    sources = {"a": {"path": paths[0], "template": "plain"}, "b": {"path": "tasks:copy", "examples": 60}}
    data = load(DataSpec("", sources=sources, seq_len=64, eval_fraction=0.2), BYTE)
    assert set(data.held_out_templates) == {"plain", "auto"}
    pairs = zip(data.held_out_records, data.held_out_templates, strict=True)
    assert all((template == "plain") == ("task" not in record) for record, template in pairs)


def test_a_path_may_hold_a_comma(tmp_path):
    path = write(tmp_path / "a,b.jsonl", [{"text": f"t{i}"} for i in range(10)])
    assert load(DataSpec("", sources={"one": {"path": path}}, seq_len=16), BYTE).report["sources"][0]["records"] == 10


def test_evaluation_data_of_each_source(paths, tmp_path):
    held = write(tmp_path / "held.jsonl", [{"text": f"h{i}"} for i in range(9)])
    sources = {"a": {"path": paths[0], "eval_path": paths[0]}, "b": {"path": paths[1], "eval_path": held}}
    sources["a"]["path"] = "tasks:copy"
    data = load(DataSpec("", sources=sources, seq_len=48), BYTE)
    counts = np.zeros(2, int)
    for batch in eval_batches(data.held_out, 8):
        starts = (batch["segment_ids"] > 0) & (batch["positions"] == 0)
        counts += [np.sum(starts & (batch["source"] == number)) for number in (0, 1)]
    assert counts.tolist() == [60, 9]
    assert [source["name"] for source in data.report["sources"]] == ["a", "b", "a", "b"]
    assert [source.get("held_out_examples") for source in data.report["sources"]] == [None, None, 60, 9]


@pytest.mark.parametrize(
    ("sources", "options", "message"),
    [
        ({"code": {"path": "x", "wieght": 1}}, {}, r"data.sources.code.wieght: no such field. Did you mean 'weight'\?"),
        ({"code": {"weight": 1}}, {}, "data.sources.code.path: is missing"),
        ({"code": "a.jsonl"}, {}, "data.sources.code = 'a.jsonl': is a mapping"),
        ({"a.b": {"path": "x"}}, {}, "data.sources: 'a.b' is no name"),
        ({"code": {"path": "x", "weight": "1"}}, {}, "data.sources.code.weight = '1': must be of type float"),
        ({"code": {"path": "x", "max_records": True}}, {}, "data.sources.code.max_records = True: must be of type int"),
        ({"code": {"path": "x", "weight": 0}}, {}, "data.sources.code.weight = 0.0: must be greater than 0"),
        ({"code": {"path": "x", "format": "txt"}}, {}, "data.sources.code.format: 'txt' is not known"),
        ({"code": {"path": "x", "fields": {"promt": "q"}}}, {}, "data.sources.code.fields: there is no field 'promt'"),
        ({"code": {"path": "x"}}, {"path": "y"}, "data.path = 'y', and data.sources names code: there can be only one"),
        ({"code": {"path": "x", "weight": 1}, "b": {"path": "y"}}, {}, "data.sources.b.weight: is missing"),
        ({"code": {"path": "x", "eval_path": "e"}, "b": {"path": "y"}}, {}, "data.sources.b.eval_path: is missing"),
        ({"code": {"path": "x"}, "b": {"path": "y"}}, {"eval_path": "z"}, "data.eval_path = 'z': doesn't say of which"),
        ({"code": {"path": "no.jsonl"}}, {}, "data.sources.code.path: there is no 'no.jsonl'"),
        ({"code": {"path": "tasks:copy", "eval_path": "no.jsonl"}}, {}, "data.sources.code.eval_path: there is no"),
        ({"code": {"path": "tasks:copy"}}, {"seq_len": 4}, "data.sources: nothing of 'code' is left to train on"),
    ],
)
def test_what_is_wrong_is_named(sources, options, message):
    with pytest.raises(InputError, match=message):
        load(DataSpec(**{"path": "", "sources": sources} | options), BYTE)


def test_a_typo_is_found_before_anything_is_read():
    values = {"data": {"path": "", "sources": {"code": {"path": "nowhere.jsonl", "wieght": 1}}}}
    with pytest.raises(InputError, match=r"data\.sources\.code\.wieght"):
        config_lib.check(config_lib.parse(values), num_devices=1)


def traced(names, term):
    """The metrics of a step over sources of these names."""
    sources = {name: {"path": "tasks:copy"} for name in names}
    tiny = {"num_layers": 1, "d_model": 16, "num_heads": 2, "num_kv_heads": 2, "d_ff": 16}
    values = {"data": {"path": "", "sources": sources}, "objective": {"terms": {"sft": term}}, "model": tiny}
    config = config_lib.parse(values | {"batch_size": 8, "seq_len": 16})
    config_lib.check(config, num_devices=1)
    mesh = sharding.make_abstract_mesh({}, 1)
    with jax.sharding.use_abstract_mesh(mesh):
        parts = assemble.assemble(config, objectives.load(config.objective), mesh, abstract.batch_spec(config), 256)
        return jax.eval_shape(parts.step, parts.state, {}, parts.batch)[1]


@pytest.mark.parametrize("names", [("only",), ("only", "other")])
def test_a_term_may_name_sources_that_are_there(names):
    assert ("tokens/other" in traced(names, {"sources": ["only"]})) == (len(names) == 2)
    with pytest.raises(InputError, match=r"objective.terms.sft.sources: the data has no source 'onyl'. Did you mean"):
        traced(names, {"sources": ["onyl"]})


def test_prompts_beside_a_view_with_prefixes_are_prefixes_too(paths):
    sources = {
        "pairs": {"path": paths[0]},
        "texts": {"path": paths[1]},
        "noise": {"path": paths[1], "view": {"kind": "denoise"}},
    }
    data = load(DataSpec("", sources=sources, seq_len=64, eval_fraction=0.2), BYTE)
    for rows in (data.train[0][0], data.held_out):
        batch = rows.batch(np.arange(len(rows)))
        assert {0, 1, 2} == set(batch["source"][batch["segment_ids"] > 0])
        for number, name in enumerate(("noise", "pairs", "texts")):
            here = (batch["source"] == number) & (batch["segment_ids"] > 0)
            want = np.zeros_like(batch["loss_mask"]) if name == "texts" else 1 - batch["loss_mask"]
            np.testing.assert_array_equal(batch["prefix"][here], want[here])
    without = load(DataSpec("", sources={"pairs": sources["pairs"]}, seq_len=64), BYTE).train[0][0]
    assert "prefix" not in without.batch(np.arange(1))  # the objective finds its own


def test_names_of_classes_without_labels_are_refused(paths):
    with pytest.raises(InputError, match=r"data.labels = .*: has no effect, since the data has no labels"):
        load(DataSpec(paths[1], seq_len=64, labels=("a", "b")), BYTE)


def test_columns_of_a_source_are_texts(paths):
    with pytest.raises(InputError, match=r"data.sources.a.fields.text = 3: must be of type str, and is int"):
        load(DataSpec("", sources={"a": {"path": paths[0], "fields": {"text": 3}}}), BYTE)
