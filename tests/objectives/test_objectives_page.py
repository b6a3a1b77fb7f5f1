"""The objectives that docs/objectives.md shows are what it says, and train."""

import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from test_train import INITIAL, MODEL, close, make_batch

from research import objectives, train
from research.errors import InputError
from research.objectives import sft

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "objectives.md").read_text()
BLOCKS = re.findall(r"```python\n(.*?)```", PAGE, flags=re.DOTALL)
MODULES = {match[1]: block for block in BLOCKS if (match := re.match(r'"""(\w+)\.py: ', block))}


@pytest.mark.parametrize("page", ["README.md", "docs/objectives.md"])
def test_the_objective_shown_whole_is_the_one_in_the_repository(page):
    assert f"```python\n{Path(sft.__file__).read_text()}```" in (ROOT / page).read_text()


def test_the_page_lists_all_objectives():
    shown = set(re.findall(r"^\| \[(\w+)\]\(\.\./research/objectives/\1\.py\)", PAGE, flags=re.MULTILINE))
    folder = Path(sft.__file__).parent
    assert shown == {
        path.stem for path in folder.glob("*.py") if re.search(r"^def make\(", path.read_text(), re.MULTILINE)
    }


@pytest.mark.slow
@pytest.mark.parametrize("name", ["denoise", "harder"])
def test_the_objectives_shown_train_the_same_with_microbatches(name, tmp_path, monkeypatch):
    (tmp_path / f"{name}.py").write_text(MODULES[name])
    monkeypatch.syspath_prepend(tmp_path)
    terms, outs = objectives.load({"terms": {name: {"weight": 2.0}}}), []
    for microbatches in (1, 4):
        step = train.TrainStep(terms, {"policy": MODEL}, optax.sgd(1.0), lambda t: jnp.asarray(1.0), microbatches)
        state = train.init_state({"policy": INITIAL}, step.optimizer, jax.random.PRNGKey(1))
        outs.append(jax.jit(step)(state, {}, make_batch()))
    close(outs[1][0].params, outs[0][0].params)
    np.testing.assert_allclose(outs[1][1]["loss"], outs[0][1]["loss"], rtol=1e-4)
    assert float(outs[0][1]["loss"][1]) > 0


def test_the_error_shown_is_the_error(tmp_path, monkeypatch):
    (tmp_path / "denoise.py").write_text(MODULES["denoise"])
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(InputError) as error:
        objectives.load({"terms": {"denoise": {"share": 2}}})
    assert f"`{error.value}`" in PAGE.replace("\n", " ")
