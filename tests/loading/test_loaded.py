"""Models ready to run."""

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

from research import loading
from research.devices import sharding
from research.errors import InputError
from research.sources.tokenizers import TokenizerSpec, make_tokenizer

TINY = Path(goldens.__file__).parent / "golden/hf_tiny"
BYTES = make_tokenizer(TokenizerSpec("byte"), lambda: iter(()))


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
