"""Runs that select while they train: resumed they are the runs that weren't stopped; what can't work is refused."""

import json

import jax
import numpy as np
import pytest
import runs

from research.errors import InputError
from research.run.metrics import read_metrics
from research.run.run import run

ONE = jax.devices()[:1]
MODEL = {"num_layers": 1, "d_model": 16, "num_heads": 2, "num_kv_heads": 2, "d_ff": 16}
SOURCES = {
    "easy": {"path": "tasks:copy", "weight": 1.0},
    "hard": {"path": "tasks:sort_numbers", "weight": 1.0},
    "more": {"path": "tasks:upper", "weight": 1.0},
}
NAMES = tuple(SOURCES)
DATA = {"path": "", "sources": SOURCES, "examples": 40}


@pytest.fixture(scope="module")
def reference(tmp_path_factory):
    folder = tmp_path_factory.mktemp("reference") / "run"
    run(runs.small(model=MODEL, seed=7), str(folder), devices=ONE)
    return str(folder)


def bandit(**fields):
    options = {"names": NAMES, "smoothing": 0.0}
    objective = {"terms": {"bandit": options}}
    return runs.small(**{"model": MODEL, "data": DATA, "objective": objective, "steps": 8, **fields})


@pytest.fixture(scope="module")
def drawn(tmp_path_factory):
    folder = tmp_path_factory.mktemp("drawn") / "whole"
    run(bandit(checkpoint={"every": 4, "keep_last": 9}), str(folder), devices=ONE)
    return folder


@pytest.mark.slow
def test_a_bandit_that_goes_on_draws_what_it_would_have_drawn(drawn, tmp_path):
    c = bandit(checkpoint={"every": 4, "keep_last": 9})
    runs.check_resumed(c, drawn, tmp_path / "cut", devices=ONE)
    whole, cut = (
        {r["step"]: r for r in read_metrics(str(folder)) if "train/loss" in r} for folder in (drawn, tmp_path / "cut")
    )
    for step in range(5, 9):
        for name in NAMES:
            assert cut[step][f"train/tokens/{name}"] == whole[step][f"train/tokens/{name}"]


def test_a_bandits_chances_move_and_its_batches_follow(drawn):
    records = [r for r in read_metrics(str(drawn)) if "train/loss" in r]
    chances = np.array([[r[f"train/weight/{name}"] for name in NAMES] for r in records])
    np.testing.assert_allclose(chances[0], 1 / 3, rtol=1e-5)
    np.testing.assert_allclose(chances.sum(axis=1), 1, rtol=1e-5)
    assert np.ptp(chances[-1]) > 0.01


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"objective": {"terms": {"bandit": {"names": ("easy", "hard")}}}}, "weighs the sources easy, hard, and"),
        ({"objective": {"terms": {"bandit": {"names": ("easy",)}}}}, "names = ['easy']: names the sources"),
        ({"data": DATA | {"sources": {n: {"path": s["path"]} for n, s in SOURCES.items()}}}, "a weight each"),
        (
            {"objective": {"terms": {n: {"objective": "bandit", "names": NAMES} for n in "ab"}}},
            "objective.terms.a: draws the rows, and so does objective.terms.b",
        ),
    ],
)
def test_a_bandit_that_cannot_draw_is_refused(fields, words, tmp_path):
    with pytest.raises(InputError) as error:
        run(bandit(**fields), str(tmp_path / "w"), devices=ONE)
    assert words in str(error.value)
    assert not (tmp_path / "w").exists()


def selecting(name, reference, **fields):
    options = {"rho1": {"keep": 0.5}, "rho": {"keep": 0.5}, "doremi": {"weights": dict.fromkeys(NAMES, 1.0)}}[name]
    data = DATA if name == "doremi" else {"path": "tasks:copy", "examples": 40}
    base = {"model": MODEL, "data": data, "objective": {"terms": {name: options}}}
    return runs.small(**base, roles={"reference": {"init_from": reference}}, **fields)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["rho1", "rho", "doremi"])
def test_runs_that_select_are_resumed_and_cut_alike(name, reference, tmp_path):
    run(selecting(name, reference), str(tmp_path / "whole"), devices=ONE)
    runs.check_resumed(selecting(name, reference), tmp_path / "whole", tmp_path / "cut", devices=ONE)
    parts = selecting(name, reference, microbatches=2, mesh={"data": 2})
    run(parts, str(tmp_path / "parts"), devices=jax.devices()[:2])
    whole, values = runs.parameters(tmp_path / "whole"), runs.parameters(tmp_path / "parts")
    for key in whole:
        np.testing.assert_allclose(values[key], whole[key], rtol=1e-3, atol=1e-4, err_msg=key)


@pytest.mark.slow
def test_doremis_weights_are_among_the_last_metrics(reference, tmp_path):
    c = selecting("doremi", reference, eval={"every": 4, "batches": 1})
    last = run(c, str(tmp_path / "w"), devices=ONE)
    averages = [last[f"eval/average/{name}"] for name in NAMES]
    np.testing.assert_allclose(sum(averages), 1, rtol=1e-5)
    assert json.loads((tmp_path / "w" / "done.json").read_text())["metrics"]["eval/average/easy"] == averages[0]
