"""Files of others that are damaged, or made to harm: each is an error that names the file, in no time and memory."""

import json
import os
import shutil
import struct
from pathlib import Path

import goldens
import numpy as np
import pytest
import safetensors.numpy

from research.errors import InputError
from research.pretrained import gguf_file, gguf_model, load, safetensors_file

LLAMA = Path(goldens.__file__).parent / "golden/hf_tiny/llama"


def written(path, header, data=b""):
    """A safetensors file of this header, a text or what is written as JSON."""
    text = (header if isinstance(header, str) else json.dumps(header)).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)
    return path


def tensor(first, last, shape=(2,), kind="F32"):
    return {"dtype": kind, "shape": list(shape), "data_offsets": [first, last]}


@pytest.mark.parametrize(
    ("header", "data"),
    [
        ({"a": tensor(0, 8), "b": tensor(4, 12)}, bytes(12)),  # overlapping
        ({"a": tensor(0, 8), "b": tensor(12, 20)}, bytes(20)),  # a hole
        ({"a": tensor(-8, 0)}, bytes(8)),
        ({"a": tensor(0, 8)}, bytes(16)),  # bytes behind the last
        ({"a": tensor(0, 8)}, bytes(4)),  # cut short
        ('{"a": %s, "a": %s}' % ((json.dumps(tensor(0, 8)),) * 2), bytes(8)),  # a name twice
        ({"a": tensor(0, 8, shape=(2.0,))}, bytes(8)),
        ({"a": tensor(0, 8, shape=(True, 2))}, bytes(8)),
        ({"a": tensor(0, 8, shape=(-1, -2))}, bytes(8)),
        ({"a": tensor(0, 8, shape=(2**62, 8))}, bytes(8)),
        ({"a": tensor(0, 8, kind=5)}, bytes(8)),
        ({"a": 5}, bytes(8)),
        ("[]", b""),
        ("[" * 50_000, b""),
        ('{"a": %s}' % ("9" * 5000), b""),
    ],
)
def test_what_safetensors_refuses_is_refused(tmp_path, header, data):
    file = written(tmp_path / "model.safetensors", header, data)
    with pytest.raises(InputError, match=r"model\.safetensors: .*Copy it anew\.$"):
        safetensors_file.open_file(file)


def test_a_header_that_says_it_is_huge_takes_no_memory(tmp_path):
    file = tmp_path / "model.safetensors"
    file.write_bytes(struct.pack("<Q", 2**62) + b"{}")
    with pytest.raises(InputError, match="is cut short"):
        safetensors_file.open_file(file)


def test_empty_tensors_are_read(tmp_path):
    safetensors.numpy.save_file({"a": np.zeros((0, 3), np.float32)}, tmp_path / "model.safetensors")
    assert safetensors_file.open_file(tmp_path / "model.safetensors")["a"].read().shape == (0, 3)


@pytest.mark.parametrize("name", ["../x.safetensors", "/x.safetensors", "sub/x.safetensors", "x.bin", "..", ""])
def test_an_index_opens_nothing_outside_its_folder(tmp_path, name):
    index = {"weight_map": {"a": name}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(InputError, match=r"index\.json: weight_map: 'a' is in .* beside the index"):
        safetensors_file.open_safetensors(tmp_path)


@pytest.mark.parametrize("value", [[], 5, {"a": 5}, {"a": ["x.safetensors"]}, {"a": None}])
def test_an_index_of_other_types_is_named(tmp_path, value):
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": value}))
    with pytest.raises(InputError, match=r"index\.json: "):
        safetensors_file.open_safetensors(tmp_path)


def test_tensors_come_from_the_file_that_the_index_says(tmp_path):
    for number in (1, 2):
        values = {"a": np.full(2, number, np.float32), f"b{number}": np.zeros(1, np.float32)}
        safetensors.numpy.save_file(values, tmp_path / f"{number}.safetensors")
    index = tmp_path / "model.safetensors.index.json"
    names = {"a": "2.safetensors", "b1": "1.safetensors", "b2": "2.safetensors"}
    index.write_text(json.dumps({"weight_map": names}))
    entries = safetensors_file.open_safetensors(tmp_path)
    assert entries["a"].read().tolist() == [2, 2]
    assert sorted(entries) == ["a", "b1", "b2"]
    index.write_text(json.dumps({"weight_map": names | {"c": "1.safetensors"}}))
    with pytest.raises(InputError, match=r"1\.safetensors: lacks the tensor 'c', which model.safetensors.index.json"):
        safetensors_file.open_safetensors(tmp_path)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("tie_word_embeddings", "false"),
        ("attention_bias", "false"),
        ("hidden_size", "32"),
        ("hidden_size", 32.5),
        ("hidden_size", True),
        ("num_attention_heads", 0),
        ("num_key_value_heads", 0),
        ("num_key_value_heads", 2.5),
        ("head_dim", -8),
        ("num_hidden_layers", 2**31),
        ("num_hidden_layers", 10**30),
        ("vocab_size", -1),
        ("rms_norm_eps", "1e-5"),
        ("rms_norm_eps", 1e400),
        ("rope_theta", 0),
        ("rope_theta", []),
        ("rope_parameters", []),
        ("rope_parameters", {"rope_type": "linear", "factor": "2"}),
        ("rope_parameters", {"rope_type": "llama3"}),
        ("rope_parameters", {"rope_type": ["linear"]}),
        ("rope_parameters", {"rope_type": "longrope", "short_factor": 5, "long_factor": [1.0]}),
        ("hidden_act", ["silu"]),
        ("architectures", "LlamaForCausalLM"),
        ("architectures", [5]),
        ("model_type", 5),
        ("model_type", ["llama"]),
        ("max_position_embeddings", -1),
    ],
)
def test_fields_of_other_types_and_ranges_are_named(tmp_path, field, value):
    folder = tmp_path / "llama"
    shutil.copytree(LLAMA, folder)
    values = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(values | {field: value}))
    with pytest.raises(InputError, match=r"config\.json: "):
        load.open_pretrained(str(folder))


def text(value):
    return struct.pack("<Q", len(value)) + value.encode()


def gguf(*values, tensors=0, count=None, rest=b""):
    """A file of this metadata, of which each is (key, type, bytes)."""
    body = b"".join(text(key) + struct.pack("<I", kind) + data for key, kind, data in values)
    return b"GGUF" + struct.pack("<IQQ", 3, tensors, len(values) if count is None else count) + body + rest


U32 = lambda name, value: (name, 4, struct.pack("<I", value))  # noqa: E731
ARRAY, STRING = 9, 8


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"GGUF",
        gguf(count=2**62),
        gguf(tensors=2**62),
        gguf(("a", STRING, struct.pack("<Q", 2**62))),
        gguf(("a", ARRAY, struct.pack("<IQ", 5, 2**62))),
        gguf(("a", ARRAY, struct.pack("<IQ", STRING, 2**62))),
        gguf(("a", ARRAY, struct.pack("<IQ", ARRAY, 1) * 100_000)),
        gguf(("a", 77, b"")),
        gguf(U32("a", 1), U32("a", 2)),
        gguf(U32("general.alignment", 0), tensors=1, rest=text("x") + struct.pack("<IQIQ", 1, 1, 0, 0)),
        gguf(tensors=1, rest=text("x") + struct.pack("<I", 2**31)),
        gguf(tensors=1, rest=text("x") + struct.pack("<IQIQ", 1, 0, 0, 0)),
        gguf(tensors=1, rest=text("x") + struct.pack("<IQIQ", 1, 2**63, 0, 0)),
        gguf(tensors=1, rest=text("x") + struct.pack("<IQIQ", 1, 1, 0, 2**63)),
        gguf(rest=b"", count=1) + struct.pack("<Q", 1) + b"\xff" + struct.pack("<I", 4) + bytes(4),
    ],
)
def test_gguf_metadata_that_can_not_be(tmp_path, data):
    (tmp_path / "x.gguf").write_bytes(data)
    with pytest.raises(InputError, match=r"x\.gguf: "):
        gguf_file.read_header(tmp_path / "x.gguf")


def model_metadata(**changed):
    values = {"block_count": 1, "embedding_length": 4, "attention.head_count": 1, "feed_forward_length": 4}
    values |= {"context_length": 8} | changed
    fields = [("general.architecture", STRING, text("llama"))]
    fields += [U32(f"llama.{name}", value) for name, value in values.items() if value is not None]
    return [*fields, ("llama.attention.layer_norm_rms_epsilon", 6, struct.pack("<f", 1e-5))]


@pytest.mark.parametrize(
    ("changed", "named"),
    [
        ({"block_count": 2**31}, "block_count"),
        ({"block_count": 0}, "block_count"),
        ({"attention.head_count": 0}, "attention.head_count"),
        ({"attention.head_count_kv": 0}, "attention.head_count_kv"),
        ({"embedding_length": 0}, "embedding_length"),
        ({"embedding_length": None}, "embedding_length"),
        ({"attention.key_length": 0}, "attention.key_length"),
    ],
)
def test_gguf_sizes_that_can_not_be(tmp_path, changed, named):
    info = text("token_embd.weight") + struct.pack("<IQQIQ", 2, 4, 8, 0, 0)
    head = gguf(*model_metadata(**changed), tensors=1, rest=info)
    (tmp_path / "x.gguf").write_bytes(head + bytes(-len(head) % 32) + bytes(4 * 4 * 8))
    with pytest.raises(InputError, match=rf"x\.gguf: .*{named}"):
        gguf_model.open_gguf(tmp_path / "x.gguf")


def test_gguf_tensors_lie_in_the_file_and_apart(tmp_path):
    names = ("token_embd.weight", "output_norm.weight")
    infos = b"".join(text(name) + struct.pack("<IQQIQ", 2, 4, 8, 0, 0) for name in names)
    head = gguf(*model_metadata(), tensors=2, rest=infos)
    file = tmp_path / "x.gguf"
    file.write_bytes(head + bytes(-len(head) % 32) + bytes(4 * 4 * 8))
    with pytest.raises(InputError, match="overlap"):
        gguf_model.open_gguf(file)
    os.truncate(file, file.stat().st_size - 1)
    with pytest.raises(InputError, match="is cut short"):
        gguf_model.open_gguf(file)
