"""Tokens that a run adds to a model: its vocabulary grows, the new rows train, alone too, and are exported."""

import json
from pathlib import Path

import jax
import numpy as np
import pytest
import runs
import safetensors.numpy
import tokenizers as hf

from research import config, loading, params
from research.commands import export
from research.devices import sharding
from research.errors import InputError
from research.models.config import ModelConfig
from research.models.transformer import make_model
from research.planning import abstract
from research.pretrained import export as pretrained_export
from research.run import assemble, resolve
from research.run.run import run
from research.sources.tokenizers import TokenizerSpec, load_tokenizer, make_tokenizer

pytestmark = pytest.mark.slow

ONE = jax.devices()[:1]
SHAPE = {"num_layers": 1, "d_model": 16, "num_heads": 2, "num_kv_heads": 2, "d_ff": 16, "init_std": 0.3}
BYTES = make_tokenizer(TokenizerSpec("byte"), lambda: iter(()))
ADDED = ("<|tool|>", "<|mask|>")


def write_model(folder, vocab_size, **fields):
    """A model in a folder as transformers saves it, with the tokenizer of bytes, which has 261 tokens."""
    c = ModelConfig(vocab_size=vocab_size, **SHAPE, **fields)
    values = params.init(make_model(c).specs, jax.random.key(0))
    pretrained_export.export(folder, c, values, {}, BYTES)
    return str(folder)


def config_of(base, **fields):
    values = {
        "steps": 2,
        "batch_size": 4,
        "seq_len": 32,
        "model": {"init_from": base},
        "tokenizer": {"kind": "auto", "added_tokens": ADDED},
        "data": {"path": "tasks:copy", "examples": 40},
        "checkpoint": {"every": 1, "keep_last": 9},
        "eval": {"every": 0},
        "log": {"every": 1, "tensorboard": False},
        "optimizer": {"learning_rate": 1e-2},
    }
    return config.parse({**values, **fields})


def tensors(folder):
    return safetensors.numpy.load_file(folder / "model.safetensors")


@pytest.fixture(scope="module")
def full(tmp_path_factory):
    """A tied model whose vocabulary is full, and a run that trains the rows of two tokens that it adds, alone."""
    folder = tmp_path_factory.mktemp("full")
    write_model(folder / "base", 261)
    run(config_of(str(folder / "base"), trainable="embed_added"), str(folder / "w"), devices=ONE)
    export.main([f"--model={folder / 'w'}", f"--output={folder / 'out'}"])
    return folder


def test_a_full_vocabulary_grows_and_its_new_rows_are_trained_alone(full):
    model = json.loads((full / "w/config.json").read_text())["config"]["model"]
    assert {k: model[k] for k in ("vocab_size", "added_from", "added_rows")} == {
        "vocab_size": 384,
        "added_from": 261,
        "added_rows": 2,
    }
    state = {name: x for name, x in runs.parameters(full / "w").items() if "policy" in name}
    assert {x.shape for x in state.values()} == {(2, 16)}
    before = tensors(full / "base")["model.embed_tokens.weight"]
    trained = next(x for name, x in state.items() if "params" in name)
    assert np.abs(trained - before.mean(axis=0)).max() > 1e-3


def test_an_export_has_one_matrix_and_the_tokenizer_of_it(full):
    before, after = tensors(full / "base"), tensors(full / "out")
    assert before.keys() == after.keys()
    (trained,) = (x for name, x in runs.parameters(full / "w").items() if "policy" in name and "params" in name)
    rows = after.pop("model.embed_tokens.weight")
    embedding = before.pop("model.embed_tokens.weight")
    for name in before:
        np.testing.assert_array_equal(before[name], after[name], err_msg=name)
    np.testing.assert_array_equal(rows[:261], embedding)
    np.testing.assert_array_equal(rows[261:263], trained)
    np.testing.assert_allclose(rows[263:], np.broadcast_to(embedding.mean(axis=0), (121, 16)), rtol=1e-5, atol=1e-6)
    values = json.loads((full / "out/config.json").read_text())
    assert (values["vocab_size"], values["tie_word_embeddings"]) == (384, True)
    tokenizer = load_tokenizer(full / "out")
    assert [tokenizer.special(name) for name in ADDED] == [261, 262]
    assert "<|tool|>" in json.loads((full / "out/tokenizer_config.json").read_text())["additional_special_tokens"]
    assert loading.find(str(full / "out")).config == loading.find(str(full / "w")).config


def test_a_run_that_goes_on_is_the_same(full, tmp_path):
    fields = {"trainable": "embed_added", "optimizer": {"learning_rate": 1e-2, "schedule": "constant"}}
    for name, steps in (("a", 1), ("a", 2), ("b", 2)):
        run(config_of(str(full / "base"), **fields, steps=steps), str(tmp_path / name), devices=ONE)
    runs.assert_same(tmp_path / "a", tmp_path / "b")


def test_a_run_is_read_as_the_model_that_it_is(full):
    loaded = loading.load_model(str(full / "w"))
    assert (loaded.model.config.added_rows, loaded.params["embed"].shape) == (0, (384, 16))
    exported = loading.load_model(str(full / "out"))
    jax.tree.map(np.testing.assert_array_equal, loaded.params, exported.params)


def test_more_tokens_are_added_to_a_run(full, tmp_path):
    """The rows that were added before are rows like all others now, and there is room for one more."""
    c = config_of(
        str(full / "w"),
        tokenizer={"kind": "auto", "added_tokens": ("<|tool|>", "<|third|>")},
        trainable="embed.*",
        steps=1,
    )
    run(c, str(tmp_path / "v"), devices=ONE)
    model = json.loads((tmp_path / "v/config.json").read_text())["config"]["model"]
    assert (model["vocab_size"], model["added_from"], model["added_rows"]) == (384, 263, 1)
    assert load_tokenizer(tmp_path / "v").special("<|tool|>") == 261


@pytest.mark.parametrize("fields", [{"tie_embeddings": False}, {"tie_embeddings": False, "attention_bias": True}])
def test_a_padded_vocabulary_has_room_and_new_rows_a_rate_of_their_own(fields, tmp_path):
    base = write_model(tmp_path / "base", 300, **fields)
    groups = {"new": {"match": "policy/(embed|head)_added", "learning_rate": 0.1}}
    c = config_of(base, steps=1, optimizer={"learning_rate": 0.0, "groups": groups, "schedule": "constant"})
    run(c, str(tmp_path / "w"), devices=ONE)
    found = loading.find(str(tmp_path / "w"))
    assert (found.config.vocab_size, found.config.tie_embeddings) == (300, False)
    export.main([f"--model={tmp_path / 'w'}", f"--output={tmp_path / 'out'}"])
    before, after = tensors(tmp_path / "base"), tensors(tmp_path / "out")
    changed = {name: np.flatnonzero((before[name] != after[name]).any(axis=-1)) for name in before}
    changed = {name: rows.tolist() for name, rows in changed.items() if len(rows)}
    assert changed == {"model.embed_tokens.weight": [261, 262], "lm_head.weight": [261, 262]}
    head = before["lm_head.weight"][:261].mean(axis=0)
    np.testing.assert_allclose(np.abs(after["lm_head.weight"][261:263] - head), 0.1, rtol=0.15)  # AdamW's first step


@pytest.mark.slow
def test_an_encoder_with_a_bias_of_its_head_grows(tmp_path):
    """BERT, whose vocabulary of 80 is full, gets a mask token and learns to fill it in."""
    words = {"[UNK]": 0, "</s>": 1, **{f"{i}": 2 + i for i in range(78)}}
    backend = hf.Tokenizer(hf.models.WordLevel(words, "[UNK]"))
    backend.pre_tokenizer = hf.pre_tokenizers.Whitespace()
    backend.save(str(tmp_path / "tokenizer.json"))
    base = Path(runs.__file__).parent / "golden/hf_tiny/bert_mlm"
    fields = {"tokenizer": {"kind": str(tmp_path / "tokenizer.json")}, "objective": {"terms": {"masked": 1.0}}}
    run(config_of(str(base), **fields, steps=1), str(tmp_path / "w"), devices=ONE)
    export.main([f"--model={tmp_path / 'w'}", f"--output={tmp_path / 'out'}"])
    assert load_tokenizer(tmp_path / "out").special("<|mask|>") == 80
    before, after = tensors(base), tensors(tmp_path / "out")
    assert after["cls.predictions.bias"].shape == (128,)
    rate = 0.011
    for name in ("cls.predictions.bias", "bert.embeddings.word_embeddings.weight"):
        mean = np.broadcast_to(before[name].mean(axis=0), after[name][80:].shape)
        np.testing.assert_allclose(after[name][81:], mean[1:], atol=rate)
        assert 1e-5 < np.abs(after[name][80] - mean[0]).max() < rate
    assert loading.find(str(tmp_path / "out")).config.vocab_size == 128


def test_a_run_says_which_tokens_it_adds_and_whether_they_are_trained(full, tmp_path, capfd):
    c = config_of(str(full / "base"), trainable="embed|layers/.*", steps=1)
    run(c, str(tmp_path / "w"), devices=ONE)
    said = "added    2 tokens from 261 on: <|tool|> <|mask|>; embed_added is not trained"
    assert said in capfd.readouterr().err


def test_roles_share_the_policys_rows(full, tmp_path):
    """A value head reads the policy's trunk, and a reference its frozen part: both know the added tokens."""
    fields = {
        "roles": {"value": {"of": "policy", "num_labels": 1}, "reference": {"of": "policy"}},
        "objective": {"terms": {"two_roles": 1.0}, "two_roles": {"reference": True}},
        "trainable": "embed_added|layers/0/mlp/.*",
    }
    run(config_of(str(full / "base"), **fields, steps=1), str(tmp_path / "a"), devices=ONE)
    run(config_of(str(full / "base"), **fields), str(tmp_path / "a"), devices=ONE)
    names = set(runs.parameters(tmp_path / "a"))
    assert any("value" in name and "head" in name for name in names)
    assert not any("embed'" in name or "head_added" in name for name in names)


def test_a_mesh_changes_nothing(full):
    """The 261 rows that are read aren't divisible by its tensor axis; the 384 that they become are."""

    def begun(mesh, devices, rule):
        model = {"init_from": str(full / "base"), "new_rows": rule}
        inputs = resolve.resolve(config_of(str(full / "base"), mesh=mesh, model=model), "none", devices)
        parts = assemble.assemble(
            inputs.config, inputs.terms, inputs.mesh, inputs.source.spec, inputs.data.tokenizer.size
        )
        with jax.set_mesh(inputs.mesh):
            state, _ = assemble.initial(inputs.config, parts, inputs.bases, inputs.mesh)
        return state.params["policy"]

    for rule in ("mean", "random"):
        one = begun({}, ONE, rule)
        several = begun({"fsdp": 2, "tensor": 2}, jax.devices()[:4], rule)
        assert several["embed"].sharding.spec == sharding.partition(("vocab", "embed"), sharding.RULES)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), one, several)
    assert np.abs(one["embed_added"][0] - one["embed_added"][1]).max() > 0.01


def test_a_plan_knows_the_rows(full):
    described = abstract.describe(config_of(str(full / "base"), trainable="embed_added"), devices=ONE)
    assert described.vocab_size == 384
    assert described.assemble().state.params["policy"].keys() == {"embed_added"}


def test_a_model_that_does_not_know_the_tokens_is_no_teacher(full, tmp_path):
    fields = {
        "roles": {"teacher": {"init_from": str(full / "base")}},
        "objective": {"terms": {"distill": 1.0}},
    }
    c = config_of(str(full / "base"), **fields)
    with pytest.raises(InputError, match=r"roles.teacher.init_from = .*base: doesn't know <\|tool\|>, <\|mask\|>"):
        resolve.resolve(c, str(tmp_path / "w"), ONE)
    fields["roles"] = {"teacher": {"init_from": str(full / "w")}}
    c = config_of(str(full / "base"), **fields, steps=1)
    assert np.isfinite(run(c, str(tmp_path / "w"), devices=ONE)["train/loss"])


def test_options_without_effect(full, tmp_path):
    base = {"init_from": str(full / "base"), "new_rows": "random"}
    for fields, words in (
        (
            {"model": base, "tokenizer": {"kind": "auto"}},
            "model.new_rows = 'random': has no effect, since no token is added",
        ),
        ({"model": {**SHAPE, "new_rows": "random"}}, "model.new_rows = 'random': has no effect, since model.init_from"),
        ({"model": {**base, "new_rows": "zero"}}, "model.new_rows = 'zero': no such choice"),
        ({"roles": {"teacher": base}}, "roles.teacher.new_rows = 'random': only the policy's tokens grow"),
        ({"model": {**base, "added_rows": 1}}, "model.added_rows = 1, and the checkpoint that it starts from"),
    ):
        with pytest.raises(InputError, match=words):
            resolve.resolve(config_of(str(full / "base"), **fields), str(tmp_path / "w"), ONE)
