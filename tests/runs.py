"""Runs of the experiments in their debug form, and what tests compare of them."""

import importlib
from pathlib import Path

import jax
import numpy as np
import orbax.checkpoint as ocp

from experiments import base
from research import config
from research.run import checkpoint

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
