"""Reading checkpoints: onto a mesh, in little memory, from the hub's cache; and what is wrong with a checkpoint."""

import dataclasses
import json
import shutil
import struct
import tracemalloc
from pathlib import Path

import goldens
import huggingface_hub.constants
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

from research import params
from research.devices import sharding
from research.errors import InputError
from research.models import transformer
from research.models.config import ModelConfig
from research.models.specs import make_specs
from research.ops import quantized
from research.pretrained import export, load, save
from research.pretrained.families import llama

GOLDEN = Path(goldens.__file__).parent / "golden"
FOLDERS = [f"{p.parent.name}/{p.name}" for p in sorted([*GOLDEN.glob("hf_tiny/*"), *GOLDEN.glob("hf_tiny_v4/*")])]
FUSED = ["hf_tiny/gpt2", "hf_tiny/gpt_neox", "hf_tiny/llama", "hf_tiny/mixtral", "hf_tiny/olmo2", "hf_tiny/phi3"]


def read(name, mesh, dtype=None):
    found = load.open_pretrained(str(GOLDEN / name))
    specs = make_specs(found.config)
    if dtype:
        specs = params.tree_map(lambda s: dataclasses.replace(s, dtype=dtype) if s.contracts else s, specs)
    return found, load.load(found, specs, params.shardings(specs, mesh))


def one_device():
    return sharding.make_mesh({}, jax.devices()[:1])


def four_devices():
    return sharding.make_mesh({"fsdp": 2, "tensor": 2}, jax.devices()[:4])


@pytest.mark.parametrize("name", [pytest.param(n, marks=() if n in FUSED else pytest.mark.slow) for n in FOLDERS])
def test_a_mesh_gets_the_parameters_of_one_device_bit_for_bit(name):
    _, alone = read(name, one_device())
    found, parts = read(name, four_devices())
    placed = params.shardings(make_specs(found.config), four_devices())
    jax.tree.map(np.testing.assert_array_equal, parts, alone)
    assert jax.tree.map(lambda x: x.sharding, parts) == placed
    q = parts["layers"]["attention"]["q"]["kernel"]
    assert q.addressable_shards[0].data.size * 4 == q.size


def test_kernels_in_another_dtype_are_those_of_the_checkpoint_rounded():
    _, exact = read("hf_tiny/llama", one_device())
    _, values = read("hf_tiny/llama", four_devices(), jnp.bfloat16)
    up = values["layers"]["mlp"]["up"]["kernel"]
    assert (up.dtype, values["embed"].dtype, values["final_norm"]["scale"].dtype) == ("bfloat16", "bfloat16", "float32")
    np.testing.assert_array_equal(up, exact["layers"]["mlp"]["up"]["kernel"].astype("bfloat16"))


@pytest.mark.parametrize("learning", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_a_mixture_of_experts_on_a_mesh_is_that_of_one_device(learning):
    batch = {"tokens": np.arange(32, dtype=np.int32).reshape(4, 8), "segment_ids": np.ones((4, 8), np.int32)}
    batch["positions"] = np.tile(np.arange(8, dtype=np.int32), (4, 1))

    def measure(mesh):
        found, values = read("hf_tiny/qwen3_moe", mesh)
        model = transformer.make_model(found.config)
        with jax.set_mesh(mesh):
            rows = jax.device_put(batch, sharding.named(mesh, ("batch", "time")))
            hidden = jax.jit(lambda values: model.hidden(values, rows))
            gradient = jax.jit(jax.grad(lambda values: jnp.sum(jnp.square(hidden(values)))))
            return jax.device_get((gradient if learning else hidden)(values))

    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4),
        measure(four_devices()),
        measure(one_device()),
    )


@pytest.mark.slow
def test_the_host_holds_few_tensors_at_once(tmp_path, monkeypatch):
    """Writing and reading 17 MB with 1 MB at a time takes a few MB of numpy's memory."""
    c = ModelConfig(vocab_size=64, num_layers=16, d_model=128, d_ff=512, tie_embeddings=False)
    model = transformer.make_model(c)
    values = params.init(model.specs, jax.random.key(0))
    size = 4 * params.count(model.specs)

    def peak(f):
        tracemalloc.start()
        result = f()
        _, most = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        return result, most

    def whole(entry):
        return entry._replace(read=lambda: np.array(entry.read()))  # numpy's memory, which is counted; a map isn't

    _, most = peak(lambda: save.save(tmp_path, llama, c, values, lambda name: "float32", 2**20))
    assert most < size / 3
    monkeypatch.setattr(load, "_IN_FLIGHT", 2**20)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama", **llama.write(c)}))
    found = load.open_pretrained(str(tmp_path))
    found = found._replace(entries={name: whole(entry) for name, entry in found.entries.items()})
    again, most = peak(lambda: load.load(found, model.specs, params.shardings(model.specs, one_device())))
    assert most < size / 3
    jax.tree.map(np.testing.assert_array_equal, again, values)
    held = quantized.held_in(model.specs, "nf4")
    again, most = peak(lambda: load.load(found, held, params.shardings(held, one_device())))
    assert most < size / 3
    assert sum(x.nbytes for x in jax.tree.leaves(again["layers"])) < size / 6
    jax.tree.map(np.testing.assert_array_equal, again, quantized.hold(values, held))


# What may be wrong with a folder. Each case spoils a copy of a checkpoint.


def copy(tmp_path, name="llama"):
    folder = tmp_path / name
    shutil.copytree(GOLDEN / "hf_tiny" / name, folder)
    return folder


def with_config(folder, **fields):
    config = json.loads((folder / "config.json").read_text()) | fields
    config = {name: value for name, value in config.items() if value != "absent"}
    (folder / "config.json").write_text(json.dumps(config))


def with_tensors(folder, change):
    file = folder / "model.safetensors"
    tensors = safetensors.numpy.load_file(file)
    change(tensors)
    safetensors.numpy.save_file(tensors, file)


def with_bytes(folder, change):
    file = folder / "model.safetensors"
    file.write_bytes(change(file.read_bytes()))


def with_header(folder, change):
    def spoil(data):
        length = struct.unpack("<Q", data[:8])[0]
        header = json.loads(data[8 : 8 + length])
        change(header)
        text = json.dumps(header).encode()
        return struct.pack("<Q", len(text)) + text + data[8 + length :]

    with_bytes(folder, spoil)


Q = "model.layers.1.self_attn.q_proj.weight"
FAULTS = {
    "header cut": (lambda f: with_bytes(f, lambda b: b[:100]), ["model.safetensors", "cut short", "anew"]),
    "no header": (lambda f: with_bytes(f, lambda b: b[:4]), ["model.safetensors", "cut short", "anew"]),
    "data cut": (lambda f: with_bytes(f, lambda b: b[:-1]), ["model.safetensors", "cut short", "anew"]),
    "damaged header": (
        lambda f: with_bytes(f, lambda b: b[:20] + b"\xff\x00" + b[22:]),
        ["model.safetensors", "header is damaged", "anew"],
    ),
    "header that isn't one": (
        lambda f: with_header(f, lambda h: h[Q].pop("dtype")),
        ["model.safetensors", "header is damaged", "anew"],
    ),
    "another file": (lambda f: with_bytes(f, lambda b: b"<!DOCTYPE html>" + bytes(99)), ["model.safetensors", "anew"]),
    "bytes that aren't the shape's": (
        lambda f: with_header(f, lambda h: h[Q].update(shape=[31, 32])),
        [Q, "[31, 32]", "anew"],
    ),
    "a quantised tensor": (
        lambda f: with_tensors(f, lambda t: t.update({Q: t[Q].astype(np.int8)})),
        [Q, "I8", "isn't quantised"],
    ),
    "wrong shape": (
        lambda f: with_tensors(f, lambda t: t.update({Q: t[Q][:16].copy()})),
        [Q, "[16, 32]", "[32, 32]", "don't belong together"],
    ),
    "missing tensor": (lambda f: with_tensors(f, lambda t: t.pop(Q)), [f"lacks the tensor '{Q}'", "anew"]),
    "superfluous tensor": (
        lambda f: with_tensors(f, lambda t: t.update({"model.layers.9.x": t[Q].copy()})),
        ["holds 1 tensors", "model.layers.9.x", "don't belong together"],
    ),
    "a tensor twice": (
        lambda f: shutil.copy(f / "model.safetensors", f / "other.safetensors"),
        ["is in several files", "Remove"],
    ),
    "pickle": (
        lambda f: (f / "model.safetensors").rename(f / "pytorch_model.bin"),
        ["pickle", "pytorch_model.bin", "safetensors"],
    ),
    "no weights": (lambda f: (f / "model.safetensors").unlink(), ["holds no .safetensors file"]),
    "no config": (lambda f: (f / "config.json").unlink(), ["holds no config.json", "save_pretrained"]),
    "config that isn't JSON": (lambda f: (f / "config.json").write_text("{"), ["config.json", "is no JSON"]),
    "config that is a list": (lambda f: (f / "config.json").write_text("[]"), ["config.json", "is no JSON object"]),
    "unknown model type": (
        lambda f: with_config(f, model_type="lama"),
        ["config.json", "model_type = 'lama'", "Did you mean 'llama'"],
    ),
    "no model type": (lambda f: with_config(f, model_type="absent"), ["config.json", "model_type"]),
    "unknown class": (
        lambda f: with_config(f, architectures=["LlamaForTokenClassification"]),
        ["LlamaForTokenClassification", "LlamaForCausalLM"],
    ),
    "unknown field": (
        lambda f: with_config(f, attention_sinks=4),
        ["config.json", "'attention_sinks' = '4'", "remove it"],
    ),
    "missing field": (lambda f: with_config(f, hidden_size="absent"), ["config.json", "lacks the field 'hidden_size'"]),
    "field of another type": (
        lambda f: with_config(f, num_hidden_layers="two"),
        ["config.json", "num_hidden_layers", "'two'"],
    ),
    "field that can't be": (
        lambda f: with_config(f, num_key_value_heads=3),
        ["config.json", "num_kv_heads = 3", "num_heads = 4"],
    ),
    "unknown activation": (lambda f: with_config(f, hidden_act="mish"), ["hidden_act = 'mish'", "silu"]),
    "unsupported rope": (
        lambda f: with_config(f, rope_parameters={"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}),
        ["config.json", "rope_type = 'dynamic'", "llama3"],
    ),
    "unknown field of rope": (
        lambda f: with_config(f, rope_parameters={"rope_type": "linear", "factor": 2.0, "mrope_section": [1, 2]}),
        ["config.json: rope_parameters", "mrope_section"],
    ),
    "quantised": (
        lambda f: with_config(f, quantization_config={"quant_method": "gptq", "bits": 4}),
        ["config.json", "quantization_config", "gptq", "isn't quantised"],
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_what_is_wrong_is_named(fault, tmp_path):
    spoil, words = FAULTS[fault]
    folder = copy(tmp_path)
    spoil(folder)
    with pytest.raises(InputError) as error:
        load.open_pretrained(str(folder))
    assert all(word in str(error.value) for word in [*words, str(folder)]), error.value


def test_a_field_that_is_switched_off_or_harmless_is_let_pass(tmp_path):
    folder = copy(tmp_path)
    with_config(folder, attention_sinks=None, use_new_thing=False, torch_dtype="float32", unsloth_version="1")
    assert load.open_pretrained(str(folder)).config == load.open_pretrained(str(GOLDEN / "hf_tiny/llama")).config


def test_a_missing_shard_is_named(tmp_path):
    folder = copy(tmp_path, "qwen3")
    (folder / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(InputError, match=r"model-00002-of-00002\.safetensors: this shard, of \d+ tensors, is missing"):
        load.open_pretrained(str(folder))


def test_an_index_that_says_nothing(tmp_path):
    folder = copy(tmp_path, "qwen3")
    (folder / "model.safetensors.index.json").write_text("{}")
    with pytest.raises(InputError, match=r"model\.safetensors\.index\.json: .*weight_map"):
        load.open_pretrained(str(folder))


def test_names_of_older_checkpoints_are_known(tmp_path):
    """GPT-2's hub files lack the name of the body and hold masks; BERT's first ones say gamma and beta."""

    def gpt2(tensors):
        for name in list(tensors):
            tensors[name.removeprefix("transformer.")] = tensors.pop(name)
        tensors["h.0.attn.bias"] = np.ones((1, 1, 4, 4), np.float32)

    def bert(tensors):
        for name in [n for n in tensors if "LayerNorm" in n]:
            tensors[name.replace("LayerNorm.weight", "LayerNorm.gamma").replace("norm.bias", "")] = tensors.pop(name)
        tensors["bert.pooler.dense.weight"] = np.ones((4, 4), np.float32)

    for name, change in (("gpt2", gpt2), ("bert_mlm", bert)):
        folder = copy(tmp_path, name)
        with_tensors(folder, change)
        assert load.open_pretrained(str(folder)).entries.keys() == (
            load.open_pretrained(str(GOLDEN / "hf_tiny" / name)).entries.keys()
        )


def test_names_of_no_model(tmp_path):
    (tmp_path / "weights.bin").write_bytes(b"")
    for name, words in (
        (str(tmp_path / "nowhere"), "no such file or folder"),
        ("nowhere", "no such file or folder, and no hub name"),
        ("./a/b", "no such file or folder"),
        (str(tmp_path / "weights.bin"), "neither a folder nor a .gguf file"),
    ):
        with pytest.raises(InputError, match=words):
            load.open_pretrained(name)


@pytest.fixture
def offline(tmp_path, monkeypatch):
    """An empty cache of the hub, and no network."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    return tmp_path / "hub"


def test_a_model_in_the_hubs_cache_needs_no_network(offline):
    revision = "0123456789abcdef0123456789abcdef01234567"
    snapshot = offline / "models--someone--tiny" / "snapshots" / revision
    shutil.copytree(GOLDEN / "hf_tiny/llama", snapshot)
    reference = offline / "models--someone--tiny" / "refs" / "main"
    reference.parent.mkdir()
    reference.write_text(revision)
    for name in ("someone/tiny", "someone/tiny@main", f"someone/tiny@{revision}"):
        assert load.open_pretrained(name).where == snapshot
    with pytest.raises(InputError, match=r"someone/tiny@v2: .*HF_HUB_OFFLINE is set"):
        load.open_pretrained("someone/tiny@v2")


def test_a_model_that_is_not_in_the_cache_offline(offline):
    with pytest.raises(InputError, match=r"someone/other: there is no such folder.*HF_HUB_OFFLINE is set\. Check"):
        load.open_pretrained("someone/other")


@pytest.mark.parametrize("name", ["llama3_scaled_tied_bias", "gpt2", "qwen2", "gemma2"])
def test_a_head_that_is_not_the_embedding_is_read_as_untied_and_exported(name, tmp_path):
    """Whatever tie_word_embeddings says; a copy of the embedding is no head of its own."""
    plain = load.open_pretrained(str(GOLDEN / "hf_tiny" / name))
    embedding = next(t.name for t in plain.family.tensors(plain.config) if t.paths == ("embed",))
    folder = copy(tmp_path, name)
    with_tensors(folder, lambda tensors: tensors.update({"lm_head.weight": tensors[embedding].copy()}))
    found = load.open_pretrained(str(folder))
    assert found.config == plain.config
    assert found.config.tie_embeddings
    with_tensors(folder, lambda tensors: tensors.update({"lm_head.weight": -tensors[embedding]}))
    found = load.open_pretrained(str(folder))
    assert found.config == dataclasses.replace(plain.config, tie_embeddings=False)
    model, mesh = transformer.make_model(found.config), sharding.make_mesh({}, jax.devices()[:1])
    values = load.load(found, model.specs, params.shardings(model.specs, mesh))
    np.testing.assert_array_equal(values["head"], -values["embed"].T)
    out = tmp_path / "out"
    export.export(out, found.config, values, {"config": found.json}, None)
    assert json.loads((out / "config.json").read_text())["tie_word_embeddings"] is False
    written = safetensors.numpy.load_file(out / "model.safetensors")
    np.testing.assert_array_equal(written["lm_head.weight"], -written[embedding])
    assert not load.open_pretrained(str(out)).config.tie_embeddings


@pytest.mark.parametrize("part", ["weight", "bias"])
def test_a_family_without_a_head_of_its_own_refuses_one(part, tmp_path):
    folder = copy(tmp_path, "bert_mlm")
    original = {"weight": "bert.embeddings.word_embeddings.weight", "bias": "cls.predictions.bias"}[part]
    name = f"cls.predictions.decoder.{part}"
    with_tensors(folder, lambda tensors: tensors.update({name: tensors[original].copy()}))
    assert load.open_pretrained(str(folder)).config.tie_embeddings
    with_tensors(folder, lambda tensors: tensors.update({name: tensors[original] + 1}))
    with pytest.raises(InputError, match=rf"'{name}' has other values than '{original}'"):
        load.open_pretrained(str(folder))


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["int8", "nf4"])
@pytest.mark.parametrize("name", ["hf_tiny/llama", "hf_tiny/mixtral"])
def test_kernels_are_quantised_as_they_are_read_the_same_on_a_mesh(name, kind):
    found, exact = read(name, one_device())
    specs = quantized.held_in(make_specs(found.config), kind)
    several = sharding.make_mesh({"fsdp": 2, "expert": 2}, jax.devices()[:4])
    alone, parts = (load.load(found, specs, params.shardings(specs, mesh)) for mesh in (one_device(), several))
    jax.tree.map(np.testing.assert_array_equal, parts, alone)
    jax.tree.map(np.testing.assert_array_equal, alone, quantized.hold(exact, specs))
    assert jax.tree.map(lambda x: x.sharding, parts) == params.shardings(specs, several)
    down = parts["layers"]["mlp"]["down"]["kernel"][kind]
    assert down.addressable_shards[0].data.size * (4 if "mixtral" in name else 2) == down.size
