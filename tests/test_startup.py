"""What a start waits for, and what it doesn't."""

import dataclasses
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_run import load

from research import run, sharding

# What a run needs later or not at all: each takes 0.05 s to seconds.
LATER = (
    *("datasets", "flax", "gguf", "grain", "huggingface_hub", "matplotlib", "orbax", "pandas"),
    *("scipy", "tensorboardX", "tensorstore", "torch", "transformers"),
)


def test_heavy_modules_are_not_imported_before_they_are_needed():
    code = "import sys, research.main, research.run; print(*sys.modules, sep=chr(10))"
    imported = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout.split()
    assert "jax" in imported
    assert [name for name in LATER if name in imported] == []


def test_an_error_of_the_compiler_ends_the_run(tmp_path, monkeypatch):
    def fail(*_, **__):
        raise RuntimeError("no room for this program")

    monkeypatch.setattr(jax.stages.Lowered, "compile", fail)
    with pytest.raises(RuntimeError, match="no room for this program"):
        run.run(load("sft", **{"eval.every": 0, "checkpoint.best_metric": ""}), str(tmp_path))


@pytest.mark.parametrize("seed", [0, 2**31 + 5])
def test_the_first_state_is_that_of_the_key_of_the_seed(seed):
    config = load("sft", ema_decay=0.9)
    mesh = sharding.make_mesh(dataclasses.asdict(config.mesh))
    fields = {k: jax.ShapeDtypeStruct((8, 128), jnp.int32) for k in ("tokens", "segment_ids", "positions")}
    fields |= {"loss_mask": jax.ShapeDtypeStruct((8, 128), jnp.float32)}
    with jax.set_mesh(mesh):
        parts = run.assemble(config, mesh, fields, vocab_size=300)
        keys = jax.random.split(jax.random.PRNGKey(seed))
        jax.tree.map(
            np.testing.assert_array_equal,
            parts.begin(np.uint32(seed)),
            parts.init_state(parts.init(keys[0]), keys[1]),
        )
