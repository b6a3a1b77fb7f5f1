"""Models by name, from wherever; and a config that names a checkpoint takes its architecture."""

import dataclasses
import json
import shutil
from pathlib import Path

import goldens
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

from research import config, loading
from research.devices import sharding
from research.errors import InputError
from research.models.config import ModelConfig
from research.ops.rope import RopeScaling
from research.sources.tokenizers import TokenizerSpec, make_tokenizer

TINY = Path(goldens.__file__).parent / "golden/hf_tiny"
BYTES = make_tokenizer(TokenizerSpec("byte"), lambda: iter(()))


def test_a_folder_is_found_with_all_that_an_export_writes_again():
    found = loading.find(str(TINY / "llama_bf16"))
    assert (found.config.dtype, found.config.num_layers, found.template) == ("float32", 2, "auto")
    assert not found.has_tokenizer
    assert found.origin["config"] == json.loads((TINY / "llama_bf16/config.json").read_text())
    assert set(found.origin["dtypes"].values()) == {"bfloat16"}
    assert json.loads(json.dumps(found.origin)) == found.origin
    with pytest.raises(InputError, match=r"llama_bf16: comes without a tokenizer\. Copy its tokenizer\.json"):
        found.tokenizer()


def test_a_model_is_loaded_onto_a_mesh_with_the_tokenizer_that_fits_it(tmp_path):
    """A vocabulary of 320 has room for the 261 tokens of bytes; one of 96 has not."""
    folder = tmp_path / "wide"
    shutil.copytree(TINY / "gpt2", folder)
    tensors = safetensors.numpy.load_file(folder / "model.safetensors")
    tensors["transformer.wte.weight"] = np.resize(tensors["transformer.wte.weight"], (320, 32))
    safetensors.numpy.save_file(tensors, folder / "model.safetensors")
    values = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**values, "vocab_size": 320}))
    BYTES.save(folder)
    mesh = sharding.make_mesh({"fsdp": 2, "tensor": 2}, jax.devices()[:4])
    loaded = loading.load_model(str(folder), mesh=mesh)
    assert loaded.tokenizer.encode("né") == BYTES.encode("né")
    assert loaded.params["embed"].sharding.mesh == mesh
    assert loaded.params["embed"].addressable_shards[0].data.shape == (160, 16)
    np.testing.assert_array_equal(loaded.params["embed"], tensors["transformer.wte.weight"])

    narrow = tmp_path / "narrow"
    shutil.copytree(TINY / "gpt2", narrow)
    BYTES.save(narrow)
    with pytest.raises(InputError, match="narrow: its tokenizer has 261 tokens, and its embedding 96 rows"):
        loading.load_model(str(narrow))


def test_a_model_without_a_tokenizer_is_loaded_where_none_is_needed():
    assert loading.load_model(str(TINY / "llama"), needs_tokenizer=False).tokenizer is None
    with pytest.raises(InputError, match=r"tokenizer\.json"):
        loading.load_model(str(TINY / "llama"))


def test_names_and_flags_that_can_not_be(tmp_path):
    (tmp_path / "run" / "checkpoints").mkdir(parents=True)
    (tmp_path / "started").mkdir()
    (tmp_path / "started" / "metrics.jsonl").touch()
    (tmp_path / "empty").mkdir()
    for name, options, words in (
        (tmp_path / "run", {}, "run: is the workdir of a run that has saved no checkpoint yet"),
        (tmp_path / "started", {}, "started: is the workdir of a run that has saved no checkpoint yet"),
        (tmp_path / "empty", {}, r"empty: holds no config\.json"),
        (tmp_path / "none", {}, "none: no such file or folder"),
        (TINY / "llama", {"step": 100}, r"--step: .*llama isn't the workdir of a run.* Leave it out"),
        (TINY / "llama", {"ema": True}, r"--ema: .*llama isn't the workdir of a run.* Leave it out"),
    ):
        with pytest.raises(InputError, match=words):
            loading.find(str(name), **options)


def test_kernels_are_held_in_the_compute_dtype(monkeypatch):
    """On an accelerator that is bfloat16: the kernels alone, rounded once."""
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    half = loading.load_model(str(TINY / "llama"), needs_tokenizer=False)
    monkeypatch.undo()
    whole = loading.load_model(str(TINY / "llama"), needs_tokenizer=False)
    assert half.model.config == dataclasses.replace(whole.model.config, dtype="bfloat16")
    up = half.params["layers"]["mlp"]["up"]["kernel"]
    np.testing.assert_array_equal(up, whole.params["layers"]["mlp"]["up"]["kernel"].astype(jnp.bfloat16))
    np.testing.assert_array_equal(half.params["final_norm"]["scale"], whole.params["final_norm"]["scale"])


# A config that names a checkpoint.

BASE = ModelConfig(
    vocab_size=96, num_layers=2, d_model=32, num_heads=4, num_kv_heads=2, d_ff=56, max_length=64, mlp="geglu",
    norm_eps=1e-5, rope_theta=5e5, tie_embeddings=False, rope_scaling=RopeScaling("linear", 2.0), sliding_window=(4, 0),
)  # fmt: skip


def with_architecture(base=BASE, **model):
    parsed = config.parse({"model": {"init_from": "there", **model}})
    return config.with_architecture(parsed, base, "there")


def test_the_checkpoint_decides_what_the_config_leaves_open():
    merged = with_architecture()
    assert config.model_config(merged, 96, backend="cpu") == BASE
    again = config.parse(json.loads(json.dumps(config.to_dict(merged))))  # as a run that goes on reads it
    assert config.model_config(again, 96, backend="cpu") == BASE
    assert again.model.init_from == "there"


def test_what_changes_no_parameter_may_be_set():
    free = {"remat": "full", "attention": "reference", "dtype": "bfloat16", "max_length": 128, "rope_theta": 1e6}
    free |= {"sliding_window": (8,), "logit_softcap": 30.0, "norm_eps": 1e-4, "init_std": 0.1}
    scaling = {"kind": "yarn", "factor": 4.0, "original_length": 64}
    merged = config.model_config(with_architecture(**free, rope_scaling=scaling), 96)
    assert merged == dataclasses.replace(BASE, **free, rope_scaling=RopeScaling(**scaling))


def test_what_agrees_with_the_checkpoint_may_be_said():
    said = with_architecture(d_model=32, mlp="geglu", vocab_size=96)
    assert config.model_config(said, 96, backend="cpu") == BASE


@pytest.mark.parametrize(
    ("model", "words"),
    [
        ({"d_model": 64}, r"model\.d_model = 64, .* there, has 32\. Leave it"),
        ({"num_layers": 3}, r"model\.num_layers = 3, .* has 2"),
        ({"mlp": "gelu"}, r"model\.mlp = 'gelu', .* has 'geglu'"),
        ({"vocab_size": 128}, r"model\.vocab_size = 128, .* has 96"),
        ({"qk_norm": "head"}, r"model\.qk_norm = 'head', .* has 'none'"),
        ({"d_ff": "wide"}, r"model\.d_ff = 'wide': must be of type int"),
    ],
)
def test_what_asks_for_other_parameters_is_named(model, words):
    with pytest.raises(InputError, match=words):
        with_architecture(**model)


def test_learned_positions_are_parameters():
    learned = dataclasses.replace(BASE, positions="learned", rope_scaling=RopeScaling())
    with pytest.raises(InputError, match=r"model\.max_length = 128, .* has 64"):
        with_architecture(learned, max_length=128)
