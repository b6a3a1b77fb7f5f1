"""Runs of the release in which trained and frozen parameters were one tree go on (see golden/README.md)."""

import contextlib
import json
import shutil
from pathlib import Path

import goldens
import jax
import numpy as np
import pytest
import runs

from research import config, loading
from research.params import path_name
from research.run import assemble, checkpoint, metrics, resolve
from research.run.run import run

OLDER = Path(goldens.__file__).parent / "golden/runs"
ONE = jax.devices()[:1]


@pytest.fixture(params=["plain", "trained"])
def older(request, tmp_path):
    shutil.copytree(OLDER / request.param, tmp_path / request.param)
    return tmp_path / request.param


def config_of(workdir):
    return config.parse(json.loads((workdir / "config.json").read_text())["config"])


def test_parameters_and_moments_come_back_bit_for_bit(older):
    inputs = resolve.resolve(config_of(older), str(older), ONE, step=checkpoint.choose(older))
    parts = assemble.assemble(inputs.config, inputs.terms, inputs.mesh, inputs.source.spec, inputs.data.tokenizer.size)
    with contextlib.closing(checkpoint.Checkpointer(older)) as saver:
        state, _ = saver.restore(parts.state)
    assert int(state.step) == 10
    stored = {
        name.replace("['opt_state']['inner_state']", "['opt_state']"): x for name, x in runs.parameters(older).items()
    }
    fields = {"params": state.params, "opt_state": state.opt_state}
    leaves = jax.tree_util.tree_leaves_with_path(fields)
    by_name = {path_name_of(name): x for name, x in stored.items()}
    for path, leaf in leaves:
        np.testing.assert_array_equal(leaf, by_name[path_name(path)], err_msg=path_name(path))
    trained = {name for name in by_name if name.startswith("params/")} - {path_name(path) for path, _ in leaves}
    assert bool(trained) == (older.name == "trained")


def path_name_of(keystr):
    """jax.tree_util.keystr -> params.path_name."""
    return keystr.strip("[]'").replace("']['", "/").replace("'][", "/").replace("]['", "/").replace("][", "/")


def test_the_losses_go_on(older):
    run(config_of(older), str(older), devices=ONE)
    expected = json.loads((older / "losses.json").read_text())
    losses = {str(r["step"]): r["train/loss"] for r in metrics.read_metrics(str(older)) if "train/loss" in r}
    assert losses.keys() == expected.keys()
    np.testing.assert_allclose([losses[step] for step in expected], list(expected.values()), rtol=1e-6)


def test_it_can_be_loaded(older):
    values = loading.load_model(str(older)).params
    stored = runs.parameters(older)
    for path, leaf in jax.tree_util.tree_leaves_with_path(values):
        np.testing.assert_array_equal(leaf, stored[f"['params']['policy']{jax.tree_util.keystr(path)}"])


def test_one_whose_config_trains_other_parameters_is_refused(tmp_path):
    shutil.copytree(OLDER / "trained", tmp_path / "run")
    record = json.loads((tmp_path / "run/config.json").read_text())["config"]
    other = config.parse({**record, "trainable": "layers/mlp/.*"})
    with pytest.raises(config.InputError, match=r"trainable = .* can't change in .* what was trained"):
        run(other, str(tmp_path / "run"), devices=ONE)
