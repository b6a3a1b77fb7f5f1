"""Runs of the experiments in their debug form and of small configs, and what tests compare of them."""

import importlib
import math
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp

from experiments import base
from research import config, objectives
from research.devices import sharding
from research.rollouts.experience import Place
from research.run import assemble, checkpoint
from research.run.run import run

EXPERIMENTS = sorted(p.stem for p in (Path(base.__file__).parent).glob("*.py") if p.stem not in ("base", "__init__"))


def values_of(name, arg="debug", **overrides):
    values = importlib.import_module(f"experiments.{name}").get_config(arg)
    values.update_from_flattened_dict(overrides)
    return values


STUDIES = [name for name in EXPERIMENTS if "study" in values_of(name)]


def load(name, arg="debug", **overrides):
    values = values_of(name, arg, **overrides).to_dict()
    values.pop("study", None)
    return config.parse(values)


def parameters(workdir):
    """Every array of the newest checkpoint, by name."""
    step = checkpoint.steps(workdir)[-1]
    with ocp.StandardCheckpointer() as reader:
        tree = reader.restore(Path(workdir).resolve() / checkpoint.FOLDER / str(step) / "state")
    return {jax.tree_util.keystr(k): np.asarray(v) for k, v in jax.tree_util.tree_leaves_with_path(tree)}


def assert_same(a, b):
    a, b = parameters(a), parameters(b)
    assert a.keys() == b.keys()
    for name in a:
        np.testing.assert_array_equal(a[name], b[name], err_msg=name)


def restored(state, folder):
    """A train state after it was saved and read again."""
    saver = checkpoint.Checkpointer(folder)
    saver.save(state, Place({}), {}, {})
    saver.wait()
    like = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state)
    again, _ = saver.restore(like)
    saver.close()
    return again


def check_resumed(c, whole, cut, **options):
    """A run that loses its last checkpoint goes on from the one before, and ends as it did; returns its metrics."""
    shutil.copytree(whole, cut)
    shutil.rmtree(cut / checkpoint.FOLDER / str(c.steps))
    (cut / "done.json").unlink(missing_ok=True)
    metrics = run(c, str(cut), **options)
    assert_same(whole, cut)
    return metrics


def small(**fields):
    """A config of four steps on short copies, with a checkpoint after the second and the fourth."""
    values = {
        "steps": 4,
        "batch_size": 4,
        "seq_len": 32,
        "data": {"path": "tasks:copy", "examples": 40},
        "objective": {"terms": {"next_token": 1.0}},
        "optimizer": {"learning_rate": 1e-2, "warmup_steps": 1},
        "checkpoint": {"every": 2, "keep_last": 9},
        "eval": {"every": 0},
        "log": {"every": 1, "tensorboard": False},
    }
    return config.parse(values | fields)


def parts_of(c):
    """What a run of a small config is assembled of, on one device."""
    config.check(c, num_devices=1)
    mesh = sharding.make_mesh({}, jax.devices()[:1])
    batch = {name: jax.ShapeDtypeStruct((4, 32), jnp.int32) for name in ("tokens", "segment_ids", "positions")}
    return assemble.assemble(c, objectives.load(c.objective), mesh, batch, 264)


class Finished:
    """The workdirs of runs on one device, each of which is run when it is first asked for.

    Args:
      tmp_path_factory: of pytest.
      config_of: (name, **fields) -> a small config.
    """

    def __init__(self, tmp_path_factory, config_of):
        self._folders, self._config_of, self._done = tmp_path_factory, config_of, {}

    def __call__(self, name):
        if name not in self._done:
            self._done[name] = self._folders.mktemp("run") / "whole"
            run(self._config_of(name), str(self._done[name]), devices=jax.devices()[:1])
        return self._done[name]

    def check_resumed(self, name, tmp_path):
        """Half a run and the rest are the whole, bit for bit."""
        check_resumed(self._config_of(name), self(name), tmp_path / "half", devices=jax.devices()[:1])

    def check_cut(self, name, workdir, **fields):
        """A run in other microbatches, or on another mesh, has the same parameters."""
        devices = jax.devices()[: math.prod(fields.get("mesh", {}).values())]
        run(self._config_of(name, **fields), str(workdir), devices=devices)
        whole, values = parameters(self(name)), parameters(workdir)
        assert values.keys() == whole.keys()
        for key in whole:
            if key.startswith("['params']"):
                np.testing.assert_allclose(values[key], whole[key], rtol=1e-3, atol=1e-4, err_msg=key)
