"""Runs that learn from preferences, on real batches: cut, interrupted, and with each kind of reference."""

import jax
import numpy as np
import pytest
import runs

from research.errors import InputError
from research.run import metrics
from research.run.run import run

MODEL = {"num_layers": 1, "d_model": 16, "num_heads": 2, "num_kv_heads": 2, "d_ff": 16}
DATA = {"path": "preferences:reverse/0.1", "examples": 60}
AS_IT_BEGAN = {"reference": {"of": "policy", "sync_every": 1000}}
CASES = {
    "start": {},
    # The sync comes after the checkpoint that the second half begins with, which holds neither policy.
    "synced": {
        "objective": {"terms": {"preference": {"kind": "sigmoid", "beta": 1.0}}},
        "roles": {"reference": {"of": "policy", "sync_every": 1, "sync_weight": 0.25}},
    },
    # Its KL isn't 0: with desirable answers alone, those to other prompts become likelier too.
    "kto": {
        "objective": {"terms": {"preference": {"kind": "kto", "beta": 1.0, "undesirable_weight": 0.1}}},
        "roles": AS_IT_BEGAN,
        "data": {**DATA, "format": "unpaired"},
    },
}
LORA = {
    "objective": {"terms": {"preference": {"kind": "sigmoid", "beta": 1.0}}},
    "adapter": {"kind": "lora", "rank": 2},
}


def config_of(name, **fields):
    return runs.small(**{"model": MODEL, "seq_len": 128, "data": DATA, **CASES.get(name, {}), **fields})


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    return runs.Finished(tmp_path_factory, config_of)


def lines_of(workdir):
    return [line for line in metrics.read_metrics(workdir) if "train/loss" in line]


@pytest.mark.slow
def test_half_a_run_with_a_reference_that_follows_and_the_rest_are_the_whole(finished, tmp_path):
    finished.check_resumed("synced", tmp_path)
    saved = runs.parameters(finished("synced"))
    kept = {name: x for name, x in saved.items() if name.startswith("['synced']")}
    assert kept
    apart = [
        np.abs(x - saved[name.replace("['synced']['reference']", "['params']['policy']")]).max()
        for name, x in kept.items()
    ]
    assert max(apart) > 1e-3


@pytest.mark.slow
def test_kto_is_the_same_in_microbatches_and_on_a_mesh(finished, tmp_path):
    assert max(line["train/kl"] for line in lines_of(finished("kto"))) > 0.01
    finished.check_cut("kto", tmp_path / "cut", mesh={"data": 1, "fsdp": 2, "tensor": 2}, microbatches=2)
    whole, cut = (lines_of(workdir) for workdir in (finished("kto"), tmp_path / "cut"))
    for name in ("loss", "kl", "reward_desirable", "reward_undesirable"):
        a, b = ([line[f"train/{name}"] for line in lines] for lines in (whole, cut))
        np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-4, err_msg=name)


@pytest.mark.slow
def test_the_policy_without_its_adapter_is_the_model_that_it_began_with(finished, tmp_path):
    start = str(finished("start"))
    began = {**LORA, "model": {"init_from": start}}
    roles = {"without": {"of": "policy", "adapter": False}, "own": {"init_from": start}}
    for name, role in roles.items():
        run(config_of("", **began, roles={"reference": role}), str(tmp_path / name), devices=jax.devices()[:1])
    without, own = (lines_of(tmp_path / name) for name in roles)
    assert without[0]["train/loss"] == pytest.approx(np.log(2), rel=1e-5)
    assert min(line["train/loss"] for line in without) < 0.9 * np.log(2)
    for name in ("loss", "margin", "change_chosen"):
        a, b = ([line[f"train/{name}"] for line in lines] for lines in (without, own))
        np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-4, err_msg=name)
    a, b = (runs.parameters(tmp_path / name) for name in roles)
    trained = {name for name in a if name.startswith("['params']")}
    assert trained == {name for name in b if name.startswith("['params']")}
    assert all("['lora']" in name for name in trained)
    for name in trained:
        np.testing.assert_allclose(a[name], b[name], rtol=1e-3, atol=1e-5, err_msg=name)


def test_answers_of_the_policy_do_not_stand_for_compared_ones(tmp_path):
    """What was preferred are the data's answers, and what says so would stand beside others."""
    config = config_of("synced", rollout={"share": 0.5, "max_new_tokens": 4}, data={**DATA, "pack": False})
    with pytest.raises(InputError, match=r"^rollout\.share = 0\.5: the batch field 'pair' is about the data's answers"):
        run(config, str(tmp_path / "run"), devices=jax.devices()[:1])
    assert not (tmp_path / "run").exists()
