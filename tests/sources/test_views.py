"""Views: what a row holds of a document, planned, cached and resumed like any other tokens."""

import dataclasses
import json
from pathlib import Path

import jax
import numpy as np
import pytest

from research import config as config_lib
from research.devices import sharding
from research.errors import InputError
from research.planning import abstract
from research.sources import fields
from research.sources.dataset import DataSpec, load, make_source
from research.sources.tokenizers import TokenizerSpec

BYTE = TokenizerSpec()


def write(path, records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return str(path)


def spec(path, view, **options):
    return DataSpec("", sources={"one": {"path": path, "view": view}}, **{"seq_len": 64, "eval_fraction": 0} | options)


def documents(rows, tokenizer):
    batch = rows.batch(np.arange(len(rows)))
    texts = []
    for row, segments in enumerate(batch["segment_ids"]):
        for segment in range(1, segments.max() + 1):
            texts.append(tokenizer.decode(batch["tokens"][row, segments == segment], skip_special=False))
    return sorted(texts)


@pytest.fixture
def texts(tmp_path):
    return write(tmp_path / "a.jsonl", [{"text": f"{i:03}" + "abcdefghij" * (i % 12)} for i in range(40)])


def test_truncate_keeps_the_first_or_last_tokens(texts):
    whole = [f"<|bos|>{i:03}{'abcdefghij' * (i % 12)}<|eos|>" for i in range(40)]
    for keep in ("first", "last"):
        data = load(spec(texts, {"kind": "truncate", "tokens": 20, "keep": keep}), BYTE)
        marked = [text.replace("<|bos|>", "^").replace("<|eos|>", "$") for text in whole]
        seen = [text[:20] if keep == "first" else text[-20:] for text in marked]
        want = sorted(text.replace("^", "<|bos|>").replace("$", "<|eos|>") for text in seen)
        assert documents(data.train[0][0], data.tokenizer) == want
        assert data.report["train"]["tokens"] == sum(map(len, seen))
    assert data.report["train"]["examples"] == 40


def test_what_has_a_label_has_it_at_the_last_token_that_is_seen(tmp_path):
    path = write(tmp_path / "l.jsonl", [{"text": f"{i:03}" + "a" * i, "label": i % 3} for i in range(30)])
    for keep in ("first", "last"):
        data = load(spec(path, {"kind": "truncate", "tokens": 5, "keep": keep}, format="labelled"), BYTE)
        rows = data.train[0][0]
        batch = rows.batch(np.arange(len(rows)))
        assert data.report["train"]["examples"] == 30
        assert batch["label_probs"].sum(axis=(0, 1)).tolist() == [10, 10, 10]
        at = batch["label_probs"].sum(-1) > 0
        following = np.pad(batch["segment_ids"][:, 1:], ((0, 0), (0, 1)))
        np.testing.assert_array_equal(at, (batch["segment_ids"] > 0) & (following != batch["segment_ids"]))


def test_reverse_keeps_beginning_and_end_and_what_is_supervised(tmp_path, texts):
    data = load(spec(texts, {"kind": "reverse"}, seq_len=256), BYTE)
    want = sorted(f"<|bos|>{(f'{i:03}' + 'abcdefghij' * (i % 12))[::-1]}<|eos|>" for i in range(40))
    assert documents(data.train[0][0], data.tokenizer) == want
    pairs = write(tmp_path / "p.jsonl", [{"prompt": "ask", "response": "reply"}])
    data = load(spec(pairs, {"kind": "reverse"}), BYTE)
    batch = data.train[0][0].batch(np.array([0]))
    here = batch["loss_mask"][0] == 1
    assert data.tokenizer.decode(batch["tokens"][0, here], skip_special=False) == "ylper<|eos|>"


def test_prompts_are_prefixes_and_texts_have_none(tmp_path, texts):
    pairs = write(tmp_path / "p.jsonl", [{"prompt": "ask", "response": "reply"}] * 3)
    sources = {
        "pairs": {"path": pairs, "view": {"kind": "prompt"}},
        "texts": {"path": texts, "view": {"kind": "prompt"}},
    }
    source = make_source(
        load(DataSpec("", sources=sources, seq_len=64, eval_fraction=0), BYTE).train, batch_size=8, seed=0
    )
    batch, _ = source.next(source.init())
    np.testing.assert_array_equal(batch["prefix"], (batch["segment_ids"] > 0) & (batch["loss_mask"] == 0))
    pair = (batch["segment_ids"] > 0) & (batch["source"] == 0)
    assert 0.4 < batch["prefix"][pair].mean() < 0.8
    assert not batch["prefix"][~pair].any()


def test_a_prefix_is_in_plans_and_is_not_predicted(texts, tmp_path, monkeypatch):
    values = {"seq_len": 64, "batch_size": 4, "objective": {"terms": {"next_token": 1.0}}}
    values["data"] = {"sources": {"one": {"path": texts, "view": {"kind": "prompt"}}}}
    assert abstract.batch_spec(config_lib.parse(values))["prefix"] == jax.ShapeDtypeStruct((4, 64), np.int32)
    (tmp_path / "seen.py").write_text(
        "import numpy as np\nfrom research.sources.views import Document, View\n\ndef make():\n"
        "    def documents(document, rng):\n"
        "        return [document._replace(fields={'prefix': np.arange(len(document.tokens)) < 2})]\n"
        "    return View(documents, ('prefix',))\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(InputError, match="tokens of a 'prefix', which all of it sees, predicted"):
        load(spec(texts, {"kind": "seen"}), BYTE)


def test_a_view_leaves_labels_at_the_last_token(tmp_path):
    path = write(tmp_path / "l.jsonl", [{"text": "x" * n, "label": n % 2} for n in range(30, 50)])
    data = load(spec(path, {"kind": "truncate", "tokens": 8, "keep": "last"}, format="labelled"), BYTE)
    batch = data.train[0][0].batch(np.arange(len(data.train[0][0])))
    assert batch["label_probs"].sum() == 20
    assert np.all(batch["positions"][batch["label_probs"].sum(axis=2) > 0] == 7)


def test_what_a_view_shows_is_cached_by_its_options(texts):
    view = {"kind": "truncate", "tokens": 20}
    assert not load(spec(texts, view), BYTE).report["sources"][0]["was_cached"]
    assert load(spec(texts, view, seq_len=32), BYTE).report["sources"][0]["was_cached"]
    other = load(spec(texts, view | {"tokens": 10}), BYTE)
    assert not other.report["sources"][0]["was_cached"]
    assert other.train[0][0].length.max() == 10


DOUBLED = '''
"""Each document twice, the second time shuffled, and how often each token was in it."""
import numpy as np
from research.sources.views import Document, View

def make(twice: bool = True):
    def documents(document, rng):
        shuffled = document.tokens.copy()
        rng.shuffle(shuffled)
        both = [document.tokens, shuffled] if twice else [shuffled]
        return [Document(x, document.mask, {"count": np.bincount(x)[x]}) for x in both]
    return View(documents, ("count",))
'''


@pytest.fixture
def doubled(tmp_path, monkeypatch):
    (tmp_path / "doubled_view.py").write_text(DOUBLED)
    monkeypatch.syspath_prepend(tmp_path)
    row = fields.Field(np.int32, ("time",), -1, lambda text: text.positions % 3, "counts")
    monkeypatch.setitem(fields.TABLE, "count", row)
    return {"kind": "doubled_view"}


def test_a_new_field_is_a_row_of_the_table_and_a_view(texts, doubled, tmp_path):
    """It arrives in batches, in those of a source without it, in the plan, the shardings and made-up batches."""
    plain = write(tmp_path / "plain.jsonl", [{"text": "plain"}] * 4)
    sources = {"one": {"path": texts, "view": doubled}, "other": {"path": plain}}
    data = load(DataSpec("", sources=sources, seq_len=128, eval_fraction=0.1), BYTE)
    source = make_source(data.train, batch_size=4, seed=0)
    assert source.spec["count"] == jax.ShapeDtypeStruct((4, 128), np.int32)
    state, seen = source.init(), 0
    for _ in range(20):
        batch, state = source.next(state)
        one = (batch["segment_ids"] > 0) & (batch["source"] == 0)
        assert np.all(batch["count"][~one] == -1)
        for row, segments in enumerate(batch["segment_ids"]):
            for segment in np.unique(segments[one[row]]):
                here = segments == segment
                tokens = batch["tokens"][row, here]
                np.testing.assert_array_equal(batch["count"][row, here], np.bincount(tokens)[tokens])
                seen += 1
    assert seen > 40
    assert "count" in data.held_out.spec(2)

    (tmp_path / "counting.py").write_text(
        "from research.objectives import sft\nimport dataclasses\n"
        "def make():\n"
        "    plain = sft.make()\n"
        "    return dataclasses.replace(plain, fields=(*plain.fields, 'count'))\n"
    )
    tiny = {"num_layers": 1, "d_model": 16, "num_heads": 2, "num_kv_heads": 2, "d_ff": 16}
    values = {"seq_len": 128, "batch_size": 4, "model": tiny, "objective": {"terms": {"counting": 1.0}}}
    config = config_lib.parse(values)
    planned = abstract.batch_spec(config)
    assert planned["count"] == source.spec["count"]
    mesh = sharding.make_abstract_mesh({"data": 2}, 2)
    assert fields.shardings(mesh, planned)["count"].spec[0] == ("data", "fsdp", "expert")
    assert fields.fake(planned, 256)["count"].max() == 2
    assert assembled(config, mesh, planned)["count"].sharding == fields.shardings(mesh, planned)["count"]


def assembled(config, mesh, spec):
    """The abstract batch that the train step is traced with; it is traced."""
    from research import objectives
    from research.run import assemble

    with jax.sharding.use_abstract_mesh(mesh):
        parts = assemble.assemble(config, objectives.load(config.objective), mesh, spec, 256)
        jax.eval_shape(parts.step, parts.state, {}, parts.batch)
    return parts.batch


def test_draws_depend_on_the_document_alone(texts, doubled, tmp_path):
    one = load(spec(texts, doubled, seq_len=128), BYTE)
    assert one.report["train"]["examples"] == 80
    assert (
        one.report["train"]["bytes"]
        == load(DataSpec(texts, seq_len=128, eval_fraction=0), BYTE).report["train"]["bytes"]
    )
    lines = Path(texts).read_text().splitlines()
    (tmp_path / "turned.jsonl").write_text("\n".join(lines[::-1]) + "\n")
    other = load(spec(str(tmp_path / "turned.jsonl"), doubled, seq_len=128), BYTE)
    assert documents(one.train[0][0], one.tokenizer) == documents(other.train[0][0], other.tokenizer)


def test_resumed_with_a_view_is_uninterrupted(texts, doubled):
    batches = []
    for start, stop in ((0, 8), (3, 8)):
        data = load(spec(texts, doubled, seq_len=128), BYTE, seed=1)
        source, state = make_source(data.train, batch_size=3, seed=1), {"row": 3 * start}
        batches.append([])
        for _ in range(start, stop):
            batch, state = source.next(state)
            batches[-1].append(batch)
    for whole, again in zip(batches[0][3:], batches[1], strict=True):
        assert whole.keys() == again.keys()
        assert all((whole[name] == again[name]).all() for name in whole)


@pytest.mark.parametrize(
    ("view", "message"),
    [
        ({"tokens": 3}, "data.sources.one.view.kind = None: names no view"),
        ({"kind": "truncat", "tokens": 3}, "data.sources.one.view.kind = 'truncat'.*Did you mean 'truncate'?"),
        ({"kind": "truncate", "token": 3}, "data.sources.one.view.token: no such option. Did you mean 'tokens'?"),
        ({"kind": "truncate"}, "data.sources.one.view.tokens: is missing"),
        ({"kind": "truncate", "tokens": 1}, "data.sources.one.view.tokens = 1: must be at least 2"),
        ({"kind": "truncate", "tokens": 9, "keep": "frist"}, "data.sources.one.view.keep = 'frist'.*'first'"),
        ({"kind": "json"}, "json.*has no function make"),
        ({"kind": "truncate", "tokens": True}, "data.sources.one.view.tokens = True: must be of type int, and is bool"),
        ({"kind": "truncate", "tokens": "9"}, "data.sources.one.view.tokens = '9': must be of type int, and is str"),
        ({"kind": "truncate", "tokens": 9, "keep": 1}, "data.sources.one.view.keep = 1: must be of type str"),
        ({"kind": "fim", "rate": float("nan")}, "data.sources.one.view.rate = nan: must be a finite number"),
        ({"kind": "fim", "draws": 2.0}, "data.sources.one.view.draws = 2.0: must be of type int, and is float"),
        ({"kind": "denoise", "density": "0.5"}, "data.sources.one.view.density = '0.5': must be of type float or None"),
        ({"kind": "denoise", "mixture": ["ul2"]}, "data.sources.one.view.mixture = 'ul2': must be of type mapping"),
    ],
)
def test_what_is_wrong_with_a_view_is_named(texts, view, message):
    with pytest.raises(InputError, match=message):
        load(spec(texts, view), BYTE)


def test_a_view_must_keep_its_promises(texts, tmp_path, monkeypatch, doubled):
    for name, change, message in [
        ("one_short", ("np.bincount(x)[x]", "np.bincount(x)[x][1:]"), "tokens and .* values of 'count'"),
        ("no_field", ('{"count": np.bincount(x)[x]}', "{}"), r"gives the fields \[\], and promised \['count'\]"),
        ("no_tokens", ("Document(x,", "Document(x[:0],"), "a document of no tokens"),
        ("nothing", ("for x in both", "for x in ()"), "leaves nothing of any document"),
        ("no_prefix", ('"count"', '"prefix"'), "a 'prefix' that isn't 1 at the first tokens"),
        ("own_mask", ('("count",)', '("loss_mask",)'), "can't give the batch field 'loss_mask'"),
    ]:
        (tmp_path / f"{name}.py").write_text(DOUBLED.replace(*change))
        with pytest.raises(InputError, match=message):
            load(spec(texts, {"kind": name}), BYTE)


def test_a_teacher_of_another_tokenizer_reads_whole_documents(texts):
    data = load(spec(texts, {"kind": "reverse"}), BYTE)
    with pytest.raises(InputError, match=r"data.sources.one.view: a teacher reads the same documents in its own"):
        load(spec(texts, {"kind": "reverse"}), BYTE, teacher=dataclasses.replace(data.tokenizer))
