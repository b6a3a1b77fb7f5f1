"""Scorers that read by models, on runs of a few steps: IFD's numbers, gradients, references that know too much."""

import json
import math
import shutil

import goldens
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import runs

from research import loading, params
from research.commands import score
from research.devices import sharding
from research.errors import InputError
from research.evals import scored_rows
from research.evals.record_scores import Item
from research.evals.scorers import Chunk, ifd
from research.evals.scorers.inputs import Encoder, ScoringModel
from research.evals.scoring import Example
from research.loading.trained import open_trained
from research.objectives.types import next_token_targets
from research.ops import influence
from research.ops.losses import cross_entropy
from research.run.run import run as run_config
from research.sources import entries, scores
from research.sources.store import open_store

IFD = goldens.load("data_selection")["ifd"]
GPT2 = str(goldens.pathlib.Path(goldens.__file__).parent / "golden/hf_tiny/gpt2")
MODEL = {"num_layers": 2, "d_model": 16, "num_heads": 2, "num_kv_heads": 2, "d_ff": 16, "max_length": 64}


def pairs(first, count=12):
    return [
        {"prompt": f"say {i}", "response": f"{i} it is" * (1 + i % 3), "task": str(i % 2)}
        for i in range(first, first + count)
    ]


def write(path, records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return str(path)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Data, and the workdirs of two runs: `lora` with an adapter, and `plain`, which learned from other records under
    another template than its tokenizer's."""
    folder = tmp_path_factory.mktemp("scorers")
    for name, first in (("trained", 0), ("other", 100), ("scored", 200), ("target", 300)):
        write(folder / f"{name}.jsonl", pairs(first))
    fields = {"model": MODEL, "objective": {"terms": {"sft": 1.0}}, "steps": 2}
    data = {"path": str(folder / "trained.jsonl"), "eval_fraction": 0.0}
    lora = runs.small(**fields, data=data, adapter={"kind": "lora", "rank": 2}, checkpoint={"every": 1, "keep_last": 9})
    run_config(lora, str(folder / "lora"), devices=jax.devices()[:1])
    data = {"path": str(folder / "other.jsonl"), "eval_fraction": 0.0, "template": "plain"}
    run_config(runs.small(**fields, data=data), str(folder / "plain"), devices=jax.devices()[:1])
    return folder


@pytest.fixture
def scored(folder, tmp_path, monkeypatch, capsys):
    """(scorers, flags) -> the status, the rows, stderr; of scored.jsonl on one device."""
    monkeypatch.setattr("research.devices.compilation.use_compilation_cache", lambda: None)
    make_mesh = sharding.make_mesh

    def on_one_device(sizes, devices=None):
        """Without --mesh."""
        return make_mesh(sizes, jax.devices()[:1] if sizes == {"data": -1} else devices)

    monkeypatch.setattr(sharding, "make_mesh", on_one_device)

    def scored(names, *flags, data="scored", output="scores.jsonl"):
        path = tmp_path / output
        common = [f"--data={folder / data}.jsonl", f"--output={path}", *([f"--with={names}"] if names else [])]
        status = score.main([*common, *flags])
        rows = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else None
        return status, rows, capsys.readouterr().err

    return scored


# IFD.


@pytest.fixture(scope="module")
def gpt2():
    loaded = loading.load_model(GPT2, needs_tokenizer=False)
    return ScoringModel(GPT2, loaded, Encoder(None, "plain", loaded.model.config.vocab_size))


def ifd_of(model, form, examples):
    items = [Item(f"x.jsonl:{i}", b"", {}) for i in range(len(examples))]
    scorer, chunk = ifd.Ifd(model, form), Chunk(0, items, {model.encoder: examples})
    scorer.observe(chunk)
    return scorer.score(chunk)


def test_ifd_of_superfiltering(gpt2):
    rows = IFD.outputs["rows"]
    examples = [
        Example(
            np.array(row["prompt_ids"] + row["answer_ids"], np.int32),
            np.arange(len(row["prompt_ids"]) + len(row["answer_ids"])) >= len(row["prompt_ids"]),
        )
        for row in rows
    ]
    out = ifd_of(gpt2, "perplexity", examples)
    np.testing.assert_allclose(out["ifd"], [row["ifd_ppl"] for row in rows], rtol=1e-4)
    np.testing.assert_allclose(out["ifd_loss"], [row["loss_condition"] for row in rows], rtol=1e-5)
    np.testing.assert_allclose(out["ifd_loss_alone"], [row["loss_direct"] for row in rows], rtol=1e-5)
    assert out["ifd_above_1"] == [row["ifd_ppl"] > 1 for row in rows]
    out = ifd_of(gpt2, "loss", examples)
    np.testing.assert_allclose(out["ifd"], [row["ifd_loss_ratio"] for row in rows], rtol=1e-5)


def test_an_answer_of_one_token_has_no_ifd(gpt2):
    one = Example(np.array([5, 6, 7], np.int32), np.array([False, False, True]))
    two = Example(np.array([5, 6, 7], np.int32), np.array([False, True, True]))
    out = ifd_of(gpt2, "perplexity", [one, two])
    assert out["ifd"][0] is None and out["ifd_above_1"][0] is None  # noqa: PT018
    assert out["ifd"][1] > 0
    (alone,) = ifd.answers_alone(one, 9)  # where texts have a beginning, the answer has one token to score
    assert (alone.tokens.tolist(), alone.count) == ([9, 7], 1)


def test_each_answer_of_a_conversation_stands_alone():
    talk = Example(np.arange(8, dtype=np.int32), np.array([0, 0, 1, 1, 0, 1, 1, 1], bool))
    assert [part.tokens.tolist() for part in ifd.answers_alone(talk, None)] == [[2, 3], [5, 6, 7]]


# The command.


def test_the_template_is_that_of_training(scored, folder):
    """Tokens are those that the run's own data had, though its tokenizer has the marks of a conversation."""
    status, rows, _ = scored("perplexity,length", f"--model={folder / 'plain'}")
    assert status == 0
    source = loading.find(str(folder / "plain"))
    origin = entries.locate(str(folder / "scored.jsonl"), count=0, seed=0)
    options = {"format": "auto", "fields": {}, "on_bad_record": "error"}
    store = open_store(origin, source.tokenizer(), template="plain", **options)
    assert [row["tokens"] for row in rows] == store.length.tolist()
    assert [row["supervised"] for row in rows] == store.supervised.tolist()
    other = open_store(origin, source.tokenizer(), template="auto", **options)
    assert store.length.tolist() != other.length.tolist()
    records = pairs(200)
    assert [row["digest"] for row in rows] == [scores.digest(record) for record in records]
    assert [row["number"] for row in rows] == list(range(12))
    nats = [math.log(row["perplexity"]) * row["supervised"] for row in rows]
    size = [len(record["response"]) for record in records]  # the end token stands for no byte
    np.testing.assert_allclose([row["bits_per_byte"] for row in rows], np.array(nats) / math.log(2) / size, rtol=1e-6)


def test_a_killed_command_goes_on_to_the_same_bytes(scored, folder, tmp_path, monkeypatch):
    flags = ["perplexity,ifd,duplicates", f"--model={folder / 'plain'}"]
    monkeypatch.setattr(scored_rows, "_MOST_AT_ONCE", 5)
    assert scored(*flags)[0] == 0
    whole = (tmp_path / "scores.jsonl").read_bytes()
    real, calls = scored_rows.RowScorer._rows, []

    def dies(self, *args):
        calls.append(args)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return real(self, *args)

    monkeypatch.setattr(scored_rows.RowScorer, "_rows", dies)
    assert scored(*flags, output="cut.jsonl")[0] == 130
    partial = tmp_path / "cut.jsonl.partial"
    lines = partial.read_bytes().splitlines(keepends=True)
    assert len(lines) == 5
    partial.write_bytes(b"".join(lines[:3]) + lines[3][:7])  # as if it had died while writing
    monkeypatch.setattr(scored_rows.RowScorer, "_rows", real)
    status, _, error = scored("perplexity,ifd", flags[1], output="cut.jsonl")
    assert (status, "--with, --options, a model or a file" in error) == (2, True)
    assert scored(*flags, output="cut.jsonl")[0] == 0
    assert (tmp_path / "cut.jsonl").read_bytes() == whole


@pytest.mark.slow
def test_scores_are_the_same_on_a_mesh(scored, folder):
    names = "perplexity,el2n,gradient_norm,less"
    flags = [f"--model={folder / 'lora'}", f"--target={folder / 'target.jsonl'}"]
    _, rows, _ = scored(names, *flags)
    status, meshed, _ = scored(names, *flags, "--mesh=data=2,fsdp=2,tensor=2", output="meshed.jsonl")
    assert status == 0
    for column in ("loss", "el2n", "gradient_norm", "less"):
        np.testing.assert_allclose([r[column] for r in rows], [r[column] for r in meshed], rtol=2e-4, atol=1e-5)


def test_rho_is_the_difference_of_two_losses(scored, folder):
    status, rows, _ = scored("rho,perplexity", f"--model={folder / 'lora'}", f"--reference={folder / 'plain'}")
    assert status == 0
    for row in rows:
        assert row["rho"] == pytest.approx(row["rho_loss"] - row["rho_reference_loss"], rel=1e-6)
        assert row["rho_loss"] == row["loss"]


def test_a_reference_that_has_read_what_it_scores_is_refused(scored, folder, tmp_path):
    flags = ["rho", f"--model={folder / 'lora'}", f"--reference={folder / 'plain'}"]
    status, rows, error = scored(*flags, data="other")
    assert (status, rows) == (2, None)
    assert "has read what it is to score" in error
    shutil.copy(folder / "other.jsonl", folder / "renamed.jsonl")
    status, _, error = scored(*flags, data="renamed")
    assert (status, "under the name" in error) == (2, True)
    # One that began with it.
    record = json.loads((folder / "plain/config.json").read_text())
    shutil.copytree(folder / "plain", tmp_path / "after")
    record["config"]["data"]["path"], record["data"] = "tasks:copy", None
    del record["digest"]
    record["config"]["model"]["init_from"] = str(folder / "plain")
    (tmp_path / "after/config.json").write_text(json.dumps(record))
    status, _, error = scored(*flags[:2], f"--reference={tmp_path / 'after'}", data="other")
    assert (status, "which began with" in error) == (2, True)


def test_evaluation_data_is_always_compared(scored, folder):
    status, rows, error = scored("", f"--eval_data={folder / 'scored.jsonl'}")
    assert status == 0
    assert [row["overlap"] for row in rows] == [1.0] * 12
    assert "12 of 12 records share" in error


# Gradients.


def gradient(run, policy, example):
    """Of the mean loss of a record's supervised tokens, by what was trained, flat."""
    ids, mask = example.tokens[None], example.mask[None].astype(np.float32)
    batch = {
        "tokens": ids,
        "segment_ids": np.ones_like(ids),
        "positions": np.arange(ids.shape[1], dtype=np.int32)[None],
    }
    targets, weights = next_token_targets(batch, mask)

    @jax.jit
    @jax.grad
    def by_own(own, whole):
        values = params.put(whole, own)
        out = cross_entropy(run.model.hidden(values, batch), run.model.unembed(values), targets, weights)
        return out.loss_sum / out.weight_sum

    return np.concatenate([np.ravel(x) for x in jax.tree.leaves(by_own(policy.own, run.whole))])


@pytest.mark.slow
def test_less_is_what_its_formula_says(scored, folder):
    """With room for all numbers the projection loses nothing, so that cosines are those of the gradients."""
    flags = [f"--model={folder / 'lora'}", f"--target={folder / 'target.jsonl'}"]
    options = '{"less": {"width": 8192, "subtask": "task"}}'
    status, rows, _ = scored("less", *flags, f"--options={options}")
    assert status == 0
    run = open_trained(str(folder / "lora"), sharding.make_mesh({}, jax.devices()[:1]))
    source = loading.find(str(folder / "lora"))
    encoder = Encoder(source.tokenizer(), source.template, run.model.config.vocab_size)
    of = lambda records: encoder.encode([Item(f"x:{i}", b"", r) for i, r in enumerate(records)])  # noqa: E731
    unit = lambda x: x / np.linalg.norm(x)  # noqa: E731
    policies = [run.at(step, moments=True) for step in (1, 2)]
    assert policies[0].rate != policies[1].rate
    total = np.zeros(2)
    for policy in policies:
        moments = [np.concatenate([np.ravel(x) for x in jax.tree.leaves(m)]) for m in (policy.first, policy.second)]
        assert np.abs(moments[0]).max() > 0
        g = gradient(run, policy, of(pairs(200)[:1])[0])
        step = influence.adam_direction(*map(jnp.asarray, (g, *moments)), 0.9, 0.95)
        targets = np.stack([unit(gradient(run, policy, each)) for each in of(pairs(300))])
        cosines = targets @ unit(np.asarray(step))
        weight = policy.rate / sum(each.rate for each in policies)
        total += weight * np.array([cosines[::2].mean(), cosines[1::2].mean()])
    assert rows[0]["less"] == pytest.approx(total.max(), rel=1e-3, abs=1e-5)


@pytest.mark.slow
def test_gradient_norm_is_of_all_parameters(scored, folder):
    _, rows, _ = scored("gradient_norm", f"--model={folder / 'plain'}")
    run = open_trained(str(folder / "plain"), sharding.make_mesh({}, jax.devices()[:1]))
    policy = run.at(2, moments=False)
    source = loading.find(str(folder / "plain"))
    encoder = Encoder(source.tokenizer(), source.template, run.model.config.vocab_size)
    examples = encoder.encode([Item("x:1", b"", pairs(200)[3])])
    expected = np.linalg.norm(gradient(run, policy, examples[0]))
    assert rows[3]["gradient_norm"] == pytest.approx(expected, rel=1e-4)


def test_moments_must_be_there(folder, tmp_path):
    run = open_trained(str(folder / "plain"), sharding.make_mesh({}, jax.devices()[:1]))
    with pytest.raises(InputError, match="isn't the workdir of a run"):
        open_trained(str(tmp_path), run.mesh)
    with pytest.raises(InputError, match="no checkpoint of step 7"):
        run.at(7, moments=True)


# What is refused.


@pytest.mark.parametrize(
    ("names", "flags", "fault"),
    [
        ("perplexty", [], "no module research/evals/scorers/perplexty.py"),
        ("perplexity", [], "--model: is missing. The scorer perplexity needs it"),
        ("rho", ["--model=M"], "--reference: is missing. The scorer rho needs it"),
        ("rho", ["--model=M", "--reference=M"], "is --model too, and all scores would be 0"),
        ("dsir", [], "--target: is missing"),
        ("length,length", [], "length is there twice"),
        ("reward", [], "--options: reward.model: is missing"),
        ("length", ['--options={"lenght": {}}'], "Did you mean 'length'"),
        ("length", ['--options={"length": {"x": 1}}'], "--options: length.x: no such option"),
        ("ifd", ["--model=M", '--options={"ifd": {"form": "los"}}'], "--options: ifd.form = 'los'"),
        ("dsir", ["--target=M", '--options={"dsir": {"buckets": "a"}}'], "dsir.buckets = 'a': must be of type int"),
        ("length", ["--per_token"], "--per_token: writes into records"),
        ("length", ["--ema"], "are of --model, which isn't given"),
        ("", ["--model=M", "--target=M"], "--target = M: is of --with"),
        ("", [], "--model: is missing"),
        ("less", ["--model=M", "--target=M", "--on_long=split"], "a gradient is of a whole record"),
        ("perplexity,ifd", ["--model=M,M"], "--with scores by one"),
    ],
)
def test_what_is_refused(scored, names, flags, fault):
    status, rows, error = scored(names, *flags)
    assert (status, rows) == (2, None)
    assert fault in error


def test_texts_have_no_ifd(scored, folder):
    write(folder / "texts.jsonl", [{"text": "a text"}])
    status, _, error = scored("ifd", f"--model={folder / 'plain'}", data="texts")
    assert (status, "texts.jsonl:1: has no answer to a prompt" in error) == (2, True)
