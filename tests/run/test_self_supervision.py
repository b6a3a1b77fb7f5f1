"""Every way to learn from plain text, in experiments/denoise.py and in docs/self_supervision.md, runs as it says."""

import re
from pathlib import Path

import numpy as np
import pytest
from runs import load, values_of

from experiments import denoise
from research import config
from research.errors import InputError
from research.run import resolve, run
from research.sources import special_tokens
from research.studies import study

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("one_device")]

PAGE = Path(__file__).parents[2] / "docs/self_supervision.md"
SMALL = {"data.max_records": 20, "eval.tasks": ()}


@pytest.mark.slow
@pytest.mark.parametrize("way", denoise.WAYS)
def test_every_way_takes_two_steps(way, tmp_path):
    final = run.run(load("denoise", f"{way},debug", **SMALL), str(tmp_path / "w"))
    assert np.isfinite(final["train/loss"])
    assert np.isfinite(final["eval/loss"])
    vocabulary = (tmp_path / "w/tokenizer.json").read_text()
    marks = {"mlm": special_tokens.MASK, "span": special_tokens.SENTINEL.format(0), "fim": "<|fim_middle|>"}
    marks["ul2"] = marks["span"]
    for mark in marks.values():
        assert (mark in vocabulary) == (mark == marks.get(way))


def test_the_study_compares_all_ways_on_the_same_texts_and_tokens(tmp_path):
    plan = study.Plan(str(tmp_path / "store"))
    denoise.study(values_of("denoise", "compare"), plan)
    assert [stage.name for stage in plan.stages] == [f"{way}-s{seed}" for way in denoise.WAYS for seed in range(3)]
    configs = [config.parse(stage.settings) for stage in plan.stages]
    alone = [load("denoise", way, **{"log.tensorboard": False}) for way in denoise.WAYS]
    assert configs[::3] == alone  # a stage is the run of that variant
    for field in ("steps", "batch_size", "seq_len"):
        assert len({getattr(each, field) for each in configs}) == 1
    assert len({each.data.sources["text"]["path"] for each in configs}) == 1
    shapes = {
        tuple(getattr(each.model, name) for name in ("num_layers", "d_model", "num_heads", "d_ff")) for each in configs
    }
    assert len(shapes) == 1


@pytest.mark.parametrize("variants", ["mlm,span", "compare,fim", "compare,prose"])
def test_two_ways_in_one_run_are_refused(variants):
    with pytest.raises(InputError, match=f"--config=...:.*{variants.split(',')[1]}.*: a run has one way to learn"):
        denoise.get_config(variants)


@pytest.mark.slow
def test_the_study_runs_to_its_table(tmp_path, capfd):
    values = values_of("denoise", "compare,debug", **{"study.ways": ("mlm", "ul2", "fim"), "study.seeds": 1})
    plan = study.Plan(str(tmp_path / "store"))
    report = denoise.study(values, plan)
    assert study.run_stages(plan.stages) == {}
    report(str(tmp_path / "w"))
    lines = [line.split() for line in capfd.readouterr().out.splitlines()]
    cells = {line[0]: line[1:] for line in lines if line and line[0] in denoise.WAYS}
    assert cells["mlm"][1] == "-"  # an encoder predicts no next token
    assert "-" not in cells["ul2"] + cells["fim"]


@pytest.fixture(scope="module")
def shown():
    """The experiment of three kinds of text that the page shows, in its debug form."""
    (code,) = (
        block for block in re.findall(r"^```python\n(.*?)^```", PAGE.read_text(), re.M | re.S) if "notes" in block
    )
    names = {}
    exec(code, names)
    return config.parse(names["get_config"]("debug").to_dict())


@pytest.mark.slow
def test_three_kinds_of_text_learn_each_in_its_way(shown, tmp_path):
    final = run.run(shown, str(tmp_path / "w"))
    weights = {"fill": 1.0, "read": 1.0, "restore": 0.5}
    for part in ("train", "eval"):
        total = sum(weight * final[f"{part}/{term}/loss"] for term, weight in weights.items())
        np.testing.assert_allclose(final[f"{part}/loss"], total, rtol=1e-4)
        for term, source in (("fill", "code"), ("read", "prose"), ("restore", "notes")):
            assert final[f"{part}/{term}/loss/{source}"] == final[f"{part}/{term}/loss"]
            assert [name for name in final if name.startswith(f"{part}/{term}/loss/")] == [
                f"{part}/{term}/loss/{source}"
            ]
            assert final[f"{part}/tokens/{source}"] > 0


def test_each_source_is_seen_in_its_way_alone(shown, tmp_path):
    inputs = resolve.resolve(shown, str(tmp_path / "w"))
    tokenizer, names = inputs.data.tokenizer, inputs.data.source_names
    middle = special_tokens.fim_tokens(tokenizer).middle
    (hole,) = special_tokens.sentinels(tokenizer, 1)
    seen, state = {"middle": set(), "hole": set(), "prefix": set()}, inputs.source.init()
    for _ in range(8):
        batch, state = inputs.source.next(state)
        for what, places in (
            ("middle", batch["tokens"] == middle),
            ("hole", batch["tokens"] == hole),
            ("prefix", batch["prefix"] > 0),
        ):
            seen[what] |= {names[i] for i in batch["source"][places]}
    assert seen == {"middle": {"code"}, "hole": {"notes"}, "prefix": {"notes"}}
