"""A family of checkpoints is one module: put into the folder, it is found, read, run and written again."""

import importlib
import json
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
import safetensors.numpy

from research import params
from research.devices import sharding
from research.errors import InputError
from research.models.transformer import make_model
from research.pretrained import families, load, save

# Other names, kernels stored input first, one tensor for keys and values. docs/models.md shows it.
MODULE = r"""
from research.pretrained.types import Tensor

ARCHITECTURES = ("TortoiseForCausalLM",)
BODY = "shell"
SPARE = (r"shell\.clock",)
_FIELDS = {
    "words": "vocab_size",
    "depth": "num_layers",
    "width": "d_model",
    "heads": "num_heads",
    "inner": "d_ff",
    "reach": "max_length",
}


def read(f):
    values = f.take_all(_FIELDS)
    return {**values, "num_kv_heads": values["num_heads"], "mlp": "relu"}


def write(c):
    return {theirs: getattr(c, ours) for theirs, ours in _FIELDS.items()}


def tensors(c):
    layer, attention = "shell.{layer}.", "layers/attention/"
    kv = (attention + "k/kernel", attention + "v/kernel")
    return [
        Tensor("shell.words", ("embed",), "V D -> V D"),
        Tensor("shell.end", ("final_norm/scale",), "D -> D"),
        Tensor(layer + "look", ("layers/attention_norm/scale",), "D -> D"),
        Tensor(layer + "q", (attention + "q/kernel",), "D (H h) -> D H h"),
        Tensor(layer + "kv", kv, "D (part H h) -> D (part H) h", axis=1, letters={"part": 2}),
        Tensor(layer + "o", (attention + "o/kernel",), "(H h) D -> H h D"),
        Tensor(layer + "think", ("layers/mlp_norm/scale",), "D -> D"),
        Tensor(layer + "up", ("layers/mlp/up/kernel",), "D F -> D F"),
        Tensor(layer + "down", ("layers/mlp/down/kernel",), "F D -> F D"),
    ]
"""
CONFIG = {"model_type": "tortoise", "words": 24, "depth": 2, "width": 16, "heads": 2, "inner": 20, "reach": 32}


@pytest.fixture
def tortoise(tmp_path, monkeypatch):
    """A checkpoint of a family whose module lies in a folder of its own."""
    (tmp_path / "families").mkdir()
    (tmp_path / "families" / "tortoise.py").write_text(MODULE)
    monkeypatch.setattr(families, "__path__", [*families.__path__, str(tmp_path / "families")])
    importlib.invalidate_caches()
    yield _checkpoint(tmp_path / "model")
    sys.modules.pop("research.pretrained.families.tortoise", None)
    vars(families).pop("tortoise", None)


def _checkpoint(folder):
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(CONFIG))
    rng, D, F = np.random.default_rng(0), 16, 20
    shapes = {"look": (D,), "q": (D, D), "kv": (D, 2 * D), "o": (D, D), "think": (D,), "up": (D, F), "down": (F, D)}
    shapes = {f"shell.{i}.{name}": shape for i in range(2) for name, shape in shapes.items()}
    shapes |= {"shell.words": (24, D), "end": (D,), "shell.clock": (3,)}  # one without the body's name, one spare
    arrays = {name: rng.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}
    safetensors.numpy.save_file(arrays, folder / "model.safetensors")
    return folder


def _load(folder):
    checkpoint = load.open_pretrained(str(folder))
    model = make_model(checkpoint.config)
    mesh = sharding.make_mesh({}, jax.devices()[:1])
    return checkpoint, model, load.load(checkpoint, model.specs, params.shardings(model.specs, mesh))


def test_a_new_family_is_read_run_and_written_again(tortoise, tmp_path):
    checkpoint, model, values = _load(tortoise)
    arrays = safetensors.numpy.load_file(tortoise / "model.safetensors")
    attention = values["layers"]["attention"]
    np.testing.assert_array_equal(attention["q"]["kernel"][1], arrays["shell.1.q"].reshape(16, 2, 8))
    np.testing.assert_array_equal(attention["k"]["kernel"][1], arrays["shell.1.kv"][:, :16].reshape(16, 2, 8))
    np.testing.assert_array_equal(attention["v"]["kernel"][1], arrays["shell.1.kv"][:, 16:].reshape(16, 2, 8))
    np.testing.assert_array_equal(values["final_norm"]["scale"], arrays["end"])
    batch = {name: np.arange(6, dtype=np.int32)[None] for name in ("tokens", "positions")}
    hidden = model.hidden(values, {**batch, "segment_ids": np.ones((1, 6), np.int32)})
    assert np.all(np.isfinite(hidden))

    family, config = save.choose(checkpoint.config, checkpoint.json)
    written = tmp_path / "written"
    written.mkdir()
    sizes = save.save(written, family, checkpoint.config, values, lambda name: "float32", 4000).sizes
    (written / "config.json").write_text(json.dumps(config))
    assert sizes == {"float32": 4 * params.count(model.specs)}
    assert len(list(written.glob("*.safetensors"))) > 1
    again, _, same = _load(written)
    assert again.config == checkpoint.config
    jax.tree.map(np.testing.assert_array_equal, same, values)


def test_a_field_that_the_new_family_does_not_read_is_named(tortoise):
    (tortoise / "config.json").write_text(json.dumps({**CONFIG, "hops": 3}))
    with pytest.raises(InputError, match="the field 'hops' = '3' is not known for this architecture"):
        load.open_pretrained(str(tortoise))


def test_a_model_type_that_is_almost_the_new_one_gets_a_hint(tortoise):
    (tortoise / "config.json").write_text(json.dumps({**CONFIG, "model_type": "tortois"}))
    with pytest.raises(InputError, match=r"model_type = 'tortois': no such architecture here.*tortoise"):
        load.open_pretrained(str(tortoise))


def test_the_documentation_shows_this_module():
    page = Path(families.__file__).parents[3] / "docs" / "models.md"
    assert MODULE.strip() in page.read_text()
