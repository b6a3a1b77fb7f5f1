"""Exports: every tensor comes back as it was, and a model that began with us finds a family that can hold it."""

import dataclasses
import json
from pathlib import Path

import goldens
import jax
import numpy as np
import pytest
import safetensors.numpy
import transformers

from research import params
from research.devices import sharding
from research.errors import InputError
from research.models.config import ModelConfig
from research.models.transformer import make_model
from research.ops.rope import RopeScaling
from research.pretrained import families, load, save

GOLDEN = Path(goldens.__file__).parent / "golden"
FOLDERS = [f"{p.parent.name}/{p.name}" for p in sorted([*GOLDEN.glob("hf_tiny/*"), *GOLDEN.glob("hf_tiny_v4/*")])]


def read(folder):
    found = load.open_pretrained(str(folder))
    model = make_model(found.config)
    mesh = sharding.make_mesh({}, jax.devices()[:1])
    return found, load.load(found, model.specs, params.shardings(model.specs, mesh))


def tensors(folder):
    """Name -> array, of all files of a folder."""
    return {k: x for file in folder.glob("*.safetensors") for k, x in safetensors.numpy.load_file(file).items()}


@pytest.mark.parametrize("name", FOLDERS)
def test_an_import_and_an_export_give_back_every_tensor(name, tmp_path):
    found, values = read(GOLDEN / name)
    family, config = save.choose(found.config, found.json)
    assert config == json.loads((GOLDEN / name / "config.json").read_text())
    dtypes = {name: entry.dtype.name for name, entry in found.entries.items()}
    total = save.save(tmp_path, family, found.config, values, dtypes.get, 10**9).sizes
    ours, theirs = tensors(tmp_path), tensors(GOLDEN / name)
    assert ours.keys() == theirs.keys()
    for key, x in theirs.items():
        assert ours[key].dtype == x.dtype
        np.testing.assert_array_equal(ours[key], x, err_msg=key)
    assert total == {"bfloat16" if "bf16" in name else "float32": sum(x.nbytes for x in theirs.values())}
    assert [p.name for p in tmp_path.iterdir()] == ["model.safetensors"]


@pytest.mark.parametrize("name", ["llama", "mixtral"])
def test_shards_are_as_small_as_asked_for_and_the_index_knows_them(name, tmp_path):
    found, values = read(GOLDEN / "hf_tiny" / name)
    total = save.save(tmp_path, found.family, found.config, values, lambda name: "float32", 20_000).sizes
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    files = sorted(tmp_path.glob("*.safetensors"))
    assert [f.name for f in files] == [
        f"model-{i:05d}-of-{len(files):05d}.safetensors" for i in range(1, len(files) + 1)
    ]
    assert len(files) > 3
    assert index["metadata"]["total_size"] == total["float32"] == sum(x.nbytes for x in tensors(tmp_path).values())
    for file in files:
        held = safetensors.numpy.load_file(file)
        assert sum(x.nbytes for x in held.values()) <= 20_000
        assert all(index["weight_map"][key] == file.name for key in held)
    (tmp_path / "config.json").write_text(json.dumps(found.json))
    jax.tree.map(np.testing.assert_array_equal, read(tmp_path)[1], values)


def test_a_tensor_larger_than_a_shard_has_one_of_its_own(tmp_path):
    found, values = read(GOLDEN / "hf_tiny/llama")
    save.save(tmp_path, found.family, found.config, values, lambda name: "float16", 1)
    files = list(tmp_path.glob("*.safetensors"))
    assert len(files) == len(found.entries)
    assert {x.dtype.name for x in tensors(tmp_path).values()} == {"float16"}


@pytest.mark.parametrize("name", FOLDERS)
def test_what_a_family_writes_it_reads(name):
    """Without the config.json that the checkpoint came with: its family is found, and says the same of the model."""
    found = load.open_pretrained(str(GOLDEN / name))
    written = {"model_type": found.json["model_type"], **found.family.write(found.config)}
    written["architectures"] = found.json["architectures"]
    assert save._same(save._read(found.family, written), found.config)
    family, config = save.choose(found.config, {})
    assert save._same(save._read(family, config), found.config)
    theirs = transformers.AutoConfig.for_model(**config)
    assert theirs.num_hidden_layers == found.config.num_layers
    assert theirs.vocab_size == found.config.vocab_size


LAYERNORM = {"norm": "layernorm", "attention_bias": True, "attention_out_bias": True, "mlp_bias": True}


@pytest.mark.parametrize(
    ("changes", "family"),
    [
        ({}, "llama"),
        ({"tie_embeddings": False, "num_kv_heads": 2, "norm_eps": 1e-5, "rope_theta": 5e5}, "llama"),
        ({"mlp": "geglu_tanh", "head_dim": 48}, "llama"),
        ({"rope_scaling": RopeScaling("llama3", 8.0, 64)}, "llama"),
        ({"rope_scaling": RopeScaling("yarn", 4.0, 64, beta_fast=16.0, truncate=False)}, "llama"),
        ({"remat": "full", "dtype": "bfloat16", "init_std": 0.5, "attention": "reference"}, "llama"),
        ({"num_labels": 3}, "llama"),
        ({"sliding_window": (128,)}, "mistral"),
        ({"attention_bias": True}, "qwen2"),
        ({"qk_norm": "head"}, "qwen3"),
        ({"qk_norm": "full", "block": "post"}, "olmo2"),
        ({"num_experts": 4}, "mixtral"),
        ({"num_experts": 4, "qk_norm": "head", "normalize_router": False}, "qwen3_moe"),
        ({**LAYERNORM, "mlp": "gelu_tanh", "positions": "learned"}, "gpt2"),
        ({**LAYERNORM, "mlp": "gelu", "block": "parallel", "rotary_dim": 8}, "gpt_neox"),
        (
            {"mlp": "geglu_tanh", "block": "sandwich", "norm_offset": 1.0, "embed_scale": True, "logit_softcap": 30.0},
            "gemma2",
        ),
    ],
)
def test_a_model_that_began_with_us_finds_a_family(changes, family, tmp_path):
    c = ModelConfig(vocab_size=96, **{"num_layers": 2, "d_model": 128, **changes})
    module, config = save.choose(c, {})
    assert config["model_type"] == family
    assert module.ARCHITECTURES[0] == config["architectures"][0] or c.num_labels
    assert transformers.AutoConfig.for_model(**config).model_type == family


def test_the_exported_model_of_no_checkpoint_is_read_back(tmp_path):
    c = ModelConfig(
        vocab_size=64, num_layers=2, d_model=32, num_heads=4, num_kv_heads=4, d_ff=48, max_length=32, mlp="gelu",
        block="parallel", **LAYERNORM,
    )  # fmt: skip
    values = params.init(make_model(c).specs, jax.random.key(0))
    family, config = save.choose(c, {})
    save.save(tmp_path, family, c, values, lambda name: "float32", 10**9)
    (tmp_path / "config.json").write_text(json.dumps(config))
    found, again = read(tmp_path)
    assert save._same(found.config, c)
    jax.tree.map(np.testing.assert_array_equal, again, values)


@pytest.mark.parametrize(
    ("changes", "word"),
    [
        ({"mlp": "relu"}, "model.mlp = 'relu'"),
        ({"norm": "layernorm"}, "model.norm = 'layernorm'"),
        ({"logit_softcap": 30.0}, "model.logit_softcap = 30.0"),
        ({"positions": "learned"}, "model.positions = 'learned'"),
        ({"sliding_window": (64, 0)}, "model.sliding_window = (64, 0)"),
        ({"num_experts": 2, "norm": "layernorm"}, "model.num_experts = 2"),
    ],
)
def test_a_model_that_no_family_can_hold(changes, word):
    with pytest.raises(InputError) as error:
        save.choose(ModelConfig(vocab_size=96, **changes), {})
    assert word in str(error.value)
    assert ", ".join(families.names()) in str(error.value)


def test_what_a_run_changed_is_written_into_the_config_that_it_began_with():
    found = load.open_pretrained(str(GOLDEN / "hf_tiny/llama"))
    longer = RopeScaling("linear", 2.0)
    c = dataclasses.replace(found.config, max_length=128, rope_scaling=longer)
    family, config = save.choose(c, found.json)
    assert save._same(save._read(family, config), c)
    assert config["eos_token_id"] == found.json["eos_token_id"]
    with pytest.raises(InputError, match=r"model\.logit_softcap = 5\.0, which 'llama' can't say"):
        save.choose(dataclasses.replace(found.config, logit_softcap=5.0), found.json)


@pytest.mark.slow
@pytest.mark.parametrize("name", [n for n in FOLDERS if n.startswith("hf_tiny/")])
def test_transformers_computes_with_an_export_what_it_computes_with_the_original(name, tmp_path):
    torch = pytest.importorskip("torch")
    found, values = read(GOLDEN / name)
    family, config = save.choose(found.config, {})
    save.save(tmp_path, family, found.config, values, lambda name: "float32", 30_000)
    (tmp_path / "config.json").write_text(json.dumps({**config, "pad_token_id": 0, "dtype": "float32"}))
    tokens = torch.arange(1, 31)[None]

    def logits(folder, architecture):
        model = getattr(transformers, architecture).from_pretrained(folder, dtype=torch.float32).eval()
        with torch.no_grad():
            return model(tokens).logits.numpy()

    ours, theirs = logits(tmp_path, config["architectures"][0]), logits(GOLDEN / name, found.json["architectures"][0])
    np.testing.assert_allclose(ours, theirs, atol=1e-5)


@pytest.mark.parametrize(
    ("value", "dtype", "words"),
    [
        (1e5, "float16", ["100000", "float16 ends at 65504", "--dtype=bfloat16 or float32"]),
        (-65520.0, "float16", ["65520", "float16 ends at 65504"]),
        (3.4e38, "bfloat16", ["3.4e+38", "bfloat16 ends at 3.38953e+38", "--dtype=float32"]),
    ],
)
def test_a_value_that_a_dtype_can_not_hold_is_named(value, dtype, words, tmp_path):
    found, values = read(GOLDEN / "hf_tiny/llama")
    values["layers"]["mlp"]["up"]["kernel"] = values["layers"]["mlp"]["up"]["kernel"].at[1, 3, 5].set(value)
    with pytest.raises(InputError) as error:
        save.save(tmp_path, found.family, found.config, values, lambda name: dtype, 10**9)
    assert str(error.value).startswith("model.layers.1.mlp.up_proj.weight: its largest value is ")
    assert all(word in str(error.value) for word in words), error.value


def test_the_largest_value_of_a_dtype_is_written_and_what_was_not_finite_is_told(tmp_path):
    found, values = read(GOLDEN / "hf_tiny/llama")
    scale = values["layers"]["mlp_norm"]["scale"]
    values["layers"]["mlp_norm"]["scale"] = scale.at[0, 0].set(65504.0).at[1, 1].set(np.nan).at[1, 2].set(-np.inf)
    saved = save.save(tmp_path, found.family, found.config, values, lambda name: "float16", 10**9)
    assert saved.not_finite == ("model.layers.1.post_attention_layernorm.weight",)
    written = tensors(tmp_path)
    assert written["model.layers.0.post_attention_layernorm.weight"][0] == 65504
    assert np.isnan(written[saved.not_finite[0]][1])
    assert written[saved.not_finite[0]][2] == -np.inf
