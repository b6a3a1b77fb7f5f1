"""Files as llama.cpp's converter writes them hold the model of the safetensors that they were made from."""

import dataclasses
import json
import shutil
from pathlib import Path

import gguf
import goldens
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

from research import params
from research.devices import sharding
from research.errors import InputError
from research.models import transformer
from research.models.specs import make_specs
from research.ops import rope
from research.pretrained import load

GOLDEN = Path(goldens.__file__).parent / "golden"
ARCHITECTURES = {"gemma3_text": "gemma3"}  # model_type -> GGUF's name, where it is another
SCALINGS = {"linear": gguf.RopeScalingType.LINEAR, "yarn": gguf.RopeScalingType.YARN}


def copy(tmp_path, name, **fields):
    """A checkpoint of tests/golden with other fields in its config.json."""
    folder = tmp_path / name
    shutil.copytree(GOLDEN / "hf_tiny" / name, folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | fields))
    return folder


def interleave(x, heads):
    """Rows (i, i + h/2) of each head side by side: Llama's queries and keys as Meta's code and llama.cpp turn them."""
    halves = x.reshape(heads, 2, -1, *x.shape[1:])
    return halves.swapaxes(1, 2).reshape(x.shape)


def convert(folder, path, kind="F32", *, arrays=None, told=None):
    """Writes a folder's model as GGUF.

    Args:
      folder: as transformers saves it.
      path: of the file.
      kind: type of matrices, where the length of their rows allows it.
      arrays: further tensors, by name.
      told: {the end of a GGUFWriter's add_ method: value}, further metadata.
    """
    c = json.loads((folder / "config.json").read_text())
    arch = ARCHITECTURES.get(c["model_type"], c["model_type"])
    layers, heads = c["num_hidden_layers"], c["num_attention_heads"]
    tensors = {}
    for file in folder.glob("*.safetensors"):
        tensors |= safetensors.numpy.load_file(file)

    writer = gguf.GGUFWriter(path, arch)
    metadata = {
        "block_count": layers,
        "context_length": c["max_position_embeddings"],
        "embedding_length": c["hidden_size"],
        "feed_forward_length": c["intermediate_size"],
        "head_count": heads,
        "head_count_kv": c["num_key_value_heads"],
        "layer_norm_rms_eps": c["rms_norm_eps"],
    }
    ropes = c["rope_parameters"]
    ropes = ropes.get("full_attention", ropes)
    metadata["rope_freq_base"] = ropes["rope_theta"]
    if "head_dim" in c:
        metadata |= {"key_length": c["head_dim"], "value_length": c["head_dim"], "rope_dimension_count": c["head_dim"]}
    if c["model_type"] == "gemma2":
        metadata["attn_logit_softcapping"] = c["attn_logit_softcapping"]
        metadata["final_logit_softcapping"] = c["final_logit_softcapping"]
    if c.get("sliding_window"):
        metadata["sliding_window"] = c["sliding_window"]
    if ropes["rope_type"] in SCALINGS:
        metadata |= {"rope_scaling_type": SCALINGS[ropes["rope_type"]], "rope_scaling_factor": ropes["factor"]}
    if ropes["rope_type"] == "yarn":
        metadata["rope_scaling_orig_ctx_len"] = ropes["original_max_position_embeddings"]
    for name, value in (metadata | (told or {})).items():
        getattr(writer, f"add_{name}")(value)

    names = gguf.get_tensor_name_map(next(a for a, n in gguf.MODEL_ARCH_NAMES.items() if n == arch), layers)
    for name, x in tensors.items():
        if arch == "llama" and "q_proj" in name:
            x = interleave(x, heads)
        if arch == "llama" and "k_proj" in name:
            x = interleave(x, c["num_key_value_heads"])
        if arch.startswith("gemma") and name.endswith("norm.weight"):
            x = x + np.float32(1)
        stored = gguf.GGMLQuantizationType[kind if x.ndim == 2 else "F32"]
        if x.shape[-1] % gguf.GGML_QUANT_SIZES[stored][0]:
            stored = gguf.GGMLQuantizationType.F16
        writer.add_tensor(
            names.get_name(name, try_suffixes=(".weight", ".bias")), gguf.quants.quantize(x, stored), raw_dtype=stored
        )
    for name, x in (arrays or {}).items():
        writer.add_tensor(name, x)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def read(path):
    """(config, parameters) of a checkpoint; numbers of the config as float32, as GGUF holds them."""
    found = load.open_pretrained(str(path))
    specs = make_specs(found.config)
    values = load.load(found, specs, params.shardings(specs, sharding.make_mesh({}, jax.devices()[:1])))
    single = {k: float(np.float32(v)) for k, v in dataclasses.asdict(found.config).items() if isinstance(v, float)}
    return dataclasses.replace(found.config, **single), values


def compare(a, b, **tolerance):
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, **tolerance), a, b)


@pytest.mark.parametrize(
    ("name", "fields", "told"),
    [
        ("llama", {}, {}),
        ("llama_linear", {}, {}),
        ("llama_yarn", {}, {}),
        ("qwen2", {}, {}),
        ("qwen3", {}, {}),
        ("olmo2", {}, {}),
        ("phi3", {}, {}),
        # llama.cpp knows Gemma's scale of scores and Gemma 3's pattern of windows by heart.
        ("gemma2", {"query_pre_attn_scalar": 16}, {}),
        ("gemma3_text", {"query_pre_attn_scalar": 16, "layer_types": ["sliding_attention"] * 3}, {}),
        ("gemma3_text", {"query_pre_attn_scalar": 16}, {"sliding_window_pattern": 3}),
    ],
)
def test_a_file_is_the_model_that_it_was_made_from(name, fields, told, tmp_path):
    folder = copy(tmp_path, name, **fields)
    config, values = read(convert(folder, tmp_path / "model.gguf", told=told))
    wanted, expected = read(folder)
    assert config == wanted
    compare(values, expected, rtol=0, atol=2e-7 if name.startswith("gemma") else 0)  # its norms are written as 1 + w


def test_yarn_with_settings_of_its_own(tmp_path):
    settings = {"beta_fast": 16.0, "beta_slow": 2.0, "attention_factor": 1.25}
    ropes = json.loads((GOLDEN / "hf_tiny/llama_yarn/config.json").read_text())["rope_parameters"]
    folder = copy(tmp_path, "llama_yarn", rope_parameters=ropes | settings)
    told = {"rope_scaling_yarn_beta_fast": 16.0, "rope_scaling_yarn_beta_slow": 2.0}
    told |= {"rope_scaling_yarn_attn_factor": 1.25, "rope_scaling_yarn_ext_factor": 1.0}
    assert read(convert(folder, tmp_path / "model.gguf", told=told))[0] == read(folder)[0]
    told["rope_scaling_yarn_ext_factor"] = 0.5
    with pytest.raises(InputError, match=r"extrapolation_factor = 0\.5"):
        read(convert(folder, tmp_path / "other.gguf", told=told))


def test_llama_3_has_its_frequencies_as_a_tensor(tmp_path):
    """Llama 3.1's rule of the wavelengths, written out, gives what a frequency is divided by."""
    folder = GOLDEN / "hf_tiny/llama3_scaled_tied_bias"
    wavelengths = 2 * np.pi * 500_000.0 ** (np.arange(4) / 4)
    factors = []
    for wavelength in wavelengths:
        if wavelength < 16 / 4:
            factors.append(1.0)
        elif wavelength > 16 / 1:
            factors.append(8.0)
        else:
            smooth = (16 / wavelength - 1) / (4 - 1)
            factors.append(1 / ((1 - smooth) / 8 + smooth))
    assert 1 < factors[0] < factors[-1] == 8
    file = convert(folder, tmp_path / "model.gguf", arrays={"rope_freqs.weight": np.array(factors, np.float32)})
    (config, values), (wanted, expected) = read(file), read(folder)
    compare(values, expected, rtol=0)
    for long in (False, True):
        ours = rope.frequencies(config.rope_theta, 8, config.rope_scaling, long=long)
        np.testing.assert_allclose(ours, rope.frequencies(wanted.rope_theta, 8, wanted.rope_scaling), rtol=1e-6)
    assert rope.attention_factor(config.rope_scaling) == 1
    same = {"rope_scaling": rope.RopeScaling()}
    assert dataclasses.replace(config, **same) == dataclasses.replace(wanted, **same)


def test_phi_3_has_its_two_lists_as_tensors(tmp_path):
    folder = GOLDEN / "hf_tiny/phi3_longrope"
    ropes = json.loads((folder / "config.json").read_text())["rope_parameters"]
    arrays = {
        f"rope_factors_{kind}.weight": np.array(ropes[f"{kind}_factor"], np.float32) for kind in ("long", "short")
    }
    factor = np.sqrt(1 + np.log(64 / 16) / np.log(16))
    told = {"rope_dimension_count": 8, "rope_scaling_orig_ctx_len": 16, "rope_scaling_attn_factors": factor}
    config, values = read(convert(folder, tmp_path / "model.gguf", arrays=arrays, told=told))
    wanted, expected = read(folder)
    compare(values, expected, rtol=0)
    for long in (False, True):
        ours, theirs = (rope.frequencies(c.rope_theta, 8, c.rope_scaling, long=long) for c in (config, wanted))
        np.testing.assert_allclose(ours, theirs, rtol=1e-6)
    ours, theirs = (rope.attention_factor(c.rope_scaling) for c in (config, wanted))
    assert ours == pytest.approx(theirs)
    assert (config.rope_scaling.original_length, config.max_length) == (16, 64)


@pytest.mark.parametrize("kind", ["F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1"])
def test_half_precision_and_quantised(kind, tmp_path):
    """What is read is what the quantised bytes stand for, and is near to what was quantised."""
    folder = GOLDEN / "hf_tiny/llama"
    _, values = read(convert(folder, tmp_path / "model.gguf", kind))
    _, exact = read(folder)
    whole = safetensors.numpy.load_file(folder / "model.safetensors")
    up = whole["model.layers.1.mlp.up_proj.weight"]
    type = gguf.GGMLQuantizationType[kind]
    np.testing.assert_array_equal(
        values["layers"]["mlp"]["up"]["kernel"][1], gguf.dequantize(gguf.quantize(up, type), type).T
    )
    step = {"F16": 2**-10, "BF16": 2**-8, "Q8_0": 2**-7, "Q5_0": 2**-4, "Q5_1": 2**-4, "Q4_0": 2**-3, "Q4_1": 2**-3}
    compare(values, exact, rtol=0, atol=step[kind] * max(float(np.abs(x).max()) for x in whole.values()))
    with pytest.raises(AssertionError):
        compare(values, exact, rtol=0)


def test_blocks_of_256(tmp_path):
    """Q4_K: 256 numbers of 4 bits in 8 blocks, the low halves of 32 bytes and then their high halves; times d times
    the block's scale, here 1."""
    rows, width = 4, 512
    rng = np.random.default_rng(0)
    bits = rng.integers(0, 256, (rows, width // 256, 4, 32), np.uint8)
    d = np.float16(0.25)
    head = np.concatenate([np.frombuffer(d.tobytes() + bytes(2), np.uint8), np.repeat([1, 0, 1], 4).astype(np.uint8)])
    blocks = [np.concatenate([head, block.reshape(-1)]) for row in bits for block in row]
    expected = np.stack([bits & 15, bits >> 4], axis=3).reshape(rows, width) * np.float32(d)

    writer = gguf.GGUFWriter(tmp_path / "model.gguf", "llama")
    told = {"block_count": 1, "context_length": 8, "embedding_length": width, "feed_forward_length": 4}
    for name, value in (told | {"head_count": 4, "layer_norm_rms_eps": 1e-5}).items():
        getattr(writer, f"add_{name}")(value)
    raw = np.stack(blocks).reshape(rows, -1)
    for name in ("token_embd", "blk.0.ffn_up", "blk.0.ffn_gate"):
        writer.add_tensor(f"{name}.weight", raw, raw_dtype=gguf.GGMLQuantizationType.Q4_K)
    for name in ("q", "k", "v", "output"):
        writer.add_tensor(f"blk.0.attn_{name}.weight", np.zeros((width, width), np.float16))
    writer.add_tensor("blk.0.ffn_down.weight", np.zeros((width, 4), np.float32))
    for name in ("blk.0.attn_norm", "blk.0.ffn_norm", "output_norm"):
        writer.add_tensor(f"{name}.weight", np.ones(width, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    config, values = read(tmp_path / "model.gguf")
    assert config.tie_embeddings
    np.testing.assert_array_equal(values["embed"], expected)
    np.testing.assert_array_equal(values["layers"]["mlp"]["up"]["kernel"][0], expected.T)


def test_logits_of_a_file_are_those_that_transformers_computes(tmp_path):
    case = goldens.load("checkpoints")["hf_tiny/llama"]
    config, values = read(convert(GOLDEN / "hf_tiny/llama", tmp_path / "model.gguf"))
    tokens = jnp.asarray(case.inputs["input_ids"])
    positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
    batch = {"tokens": tokens, "segment_ids": jnp.ones_like(tokens), "positions": positions}
    model = transformer.make_model(config)
    logits = jax.jit(lambda values: model.hidden(values, batch) @ model.unembed(values).kernel)(values)
    np.testing.assert_allclose(logits, case.outputs["logits"], rtol=0, atol=1e-4)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    return convert(GOLDEN / "hf_tiny/llama", tmp_path_factory.mktemp("gguf") / "model.gguf").read_bytes()


@pytest.mark.parametrize("size", [3, 20, 300, -4])
def test_a_file_that_is_cut_short(whole, size, tmp_path):
    (tmp_path / "cut.gguf").write_bytes(whole[:size])
    with pytest.raises(InputError, match=r"cut\.gguf: .* Copy .* anew"):
        load.open_pretrained(str(tmp_path / "cut.gguf"))


@pytest.mark.parametrize(
    ("told", "words"),
    [
        ({"expert_count": 8}, "mixtures of experts"),
        ({"rope_scaling_type": gguf.RopeScalingType.YARN}, r"lacks the field 'llama\.rope\.scaling\.factor'"),
        ({"head_count_kv": 4}, r"k_proj\.weight' has the shape \[16, 32\].*asks for \[32, 32\]"),
        ({"block_count": 3}, r"lacks the tensor 'model\.layers\.2"),
        ({"block_count": 1}, "holds 9 tensors that a model of type 'llama' doesn't use"),
    ],
)
def test_metadata_that_the_tensors_or_we_can_not_follow(told, words, tmp_path):
    file = convert(GOLDEN / "hf_tiny/llama", tmp_path / "model.gguf", told=told)
    with pytest.raises(InputError, match=rf"model\.gguf: .*{words}"):
        load.open_pretrained(str(file))


def write_metadata(path, arch, **told):
    writer = gguf.GGUFWriter(path, arch)
    for name, value in told.items():
        writer.add_uint16(name.replace("__", "."), value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    return str(path)


def test_files_without_a_model_that_is_known(tmp_path):
    for file, words in (
        (write_metadata(tmp_path / "a.gguf", "qwen"), r"a\.gguf: general\.architecture = 'qwen'.* Did you mean 'qwen"),
        (write_metadata(tmp_path / "b.gguf", "llama"), r"b\.gguf: lacks the tensor 'token_embd\.weight'"),
        (write_metadata(tmp_path / "c.gguf", "llama", split__count=3), r"c\.gguf: is one of 3 parts.*--merge"),
    ):
        with pytest.raises(InputError, match=words):
            load.open_pretrained(file)
