"""Runs with parameters in bfloat16, rounded stochastically, and moments in 8 bits: gone on with, cut, and read."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import runs

from research import loading
from research.commands import export
from research.devices import sharding
from research.errors import InputError
from research.loading.trained import open_trained
from research.run import metrics

pytestmark = pytest.mark.slow

MODEL = {"num_layers": 2, "d_model": 64, "num_heads": 4, "num_kv_heads": 2, "d_ff": 128, "vocab_size": 264}


def config_of(name, **fields):
    assert name == "low"
    optimizer = {"learning_rate": 1e-3, "warmup_steps": 1, "moments": "int8", "rounding": "stochastic"}
    return runs.small(model=MODEL, optimizer=optimizer, trained_dtype="bfloat16", ema_decay=0.9, **fields)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    return runs.Finished(tmp_path_factory, config_of)


def test_resumed_is_uninterrupted(finished, tmp_path):
    finished.check_resumed("low", tmp_path)


def test_what_is_saved_and_read(finished):
    values = runs.parameters(finished("low"))
    kernel = "['policy']['layers']['mlp']['up']['kernel']"
    assert values[f"['params']{kernel}"].dtype == jnp.bfloat16
    assert values[f"['ema']{kernel}"].dtype == np.float32
    assert {x.dtype.name for name, x in values.items() if name.startswith("['opt_state']") and kernel in name} == {
        *("int8", "uint8", "float32")
    }
    loaded = loading.load_model(str(finished("low")))
    read = loaded.params["layers"]["mlp"]["up"]["kernel"]
    np.testing.assert_array_equal(read, values[f"['params']{kernel}"].astype(np.float32))
    lines = [r for r in metrics.read_metrics(str(finished("low"))) if "train/moved" in r]
    assert all(line["train/moved"] > 0.2 and line["train/rounded"] == 0 for line in lines[1:])


def test_an_export_has_the_same_numbers(finished, tmp_path):
    assert export.main([f"--model={finished('low')}", f"--output={tmp_path / 'out'}"]) == 0
    own, exported = (loading.load_model(str(name)).params for name in (finished("low"), tmp_path / "out"))
    assert "head" not in own
    jax.tree.map(np.testing.assert_array_equal, own, exported)


def test_moments_in_8_bits_are_refused_where_their_values_are_asked_for(finished):
    run = open_trained(str(finished("low")), sharding.make_mesh({}, jax.devices()[:1]))
    with pytest.raises(InputError, match=r"moments in 8 bits \(optimizer.moments = 'int8'\).*preconditioner = 'none'"):
        run.at(4, moments=True)
    assert run.at(4, moments=False).first is None


def test_in_microbatches_on_a_mesh_it_is_the_same_but_for_last_bits(finished, tmp_path):
    """Gradients are in bfloat16, and of each microbatch. Sums in another order are rounded otherwise now and then."""
    whole, mesh = runs.parameters(finished("low")), {"data": 1, "fsdp": 2, "tensor": 2}
    runs.run(config_of("low", microbatches=2, mesh=mesh), str(tmp_path / "cut"), devices=jax.devices()[:4])
    values = runs.parameters(tmp_path / "cut")
    assert values.keys() == whole.keys()
    for key, x in whole.items():
        if key.startswith("['params']"):
            a, b = values[key].astype(np.float32), x.astype(np.float32)
            assert x.dtype == np.float32 or np.mean(a == b) > 0.7, key
            assert np.linalg.norm(a - b) < 0.005 * np.linalg.norm(b), key
