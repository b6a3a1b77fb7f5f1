"""experiments/adapt.py: which runs its study makes, and what goes together."""

import json
from pathlib import Path

import pytest

from experiments import adapt
from research import cli
from research.commands.study import main
from research.errors import InputError
from research.studies import study


def plan(tmp_path, *flags, arg=":compare"):
    experiment = cli.read_experiment([f"--config=experiments/adapt.py{arg}", *flags])
    return study.plan(experiment.name, experiment.config, str(tmp_path / "w"), experiment.overrides)


def finish(stage, loss):
    folder = Path(stage.workdir)
    folder.mkdir(parents=True, exist_ok=True)
    if loss is None:
        (folder / "failed.json").write_text(json.dumps({"error": "not finite", "diverged": True}))
        return
    (folder / "done.json").write_text(json.dumps({"step": stage.settings["steps"], "metrics": {"eval/loss": loss}}))


def test_each_way_is_compared_at_the_best_of_its_rates(tmp_path):
    first = plan(tmp_path)
    names = [stage.name for stage in first.stages]
    assert names == ["base"] + [f"{way}-{rate:g}-s0" for way, rates in adapt.RATES.items() for rate in rates]
    base, *tried = first.stages
    for stage in tried:
        assert stage.settings["model"]["init_from"] == base.workdir
        assert stage.settings["model"]["d_model"] != adapt.MODEL["d_model"]  # the base decides
        way = stage.name.rpartition("-s")[0].rpartition("-")[0]
        assert {**stage.settings["adapter"], **adapt.WAYS[way]} == stage.settings["adapter"]
    assert len({json.dumps(stage.settings["data"], sort_keys=True) for stage in tried}) == 1
    finish(base, 1.0)
    for stage in tried:
        best = stage.settings["optimizer"]["learning_rate"] == adapt.RATES[stage.name.partition("-")[0]][2]
        finish(stage, 0.25 if best else float("nan"))
    again = plan(tmp_path)
    more = [stage.name for stage in again.stages[len(names) :]]
    assert more == [f"{way}-{rates[2]:g}-s{seed}" for way, rates in adapt.RATES.items() for seed in (1, 2)]
    for stage in again.stages[len(names) :]:
        finish(stage, 0.5)
    done = plan(tmp_path)
    assert done.rounds is None
    (ways, metrics) = done.report.args
    assert tuple(metrics) == adapt.METRICS
    assert [way.name for way in ways] == list(adapt.WAYS)
    assert all(way.rate == max(way.rates) and way.at_the_edge and len(way.runs) == 3 for way in ways)


def test_a_rate_that_diverges_is_the_worst_in_the_search_alone(tmp_path):
    flags = ["--config.model.init_from=MODEL", "--config.study.ways=('norms','bias')", "--config.study.seeds=2"]
    tried = plan(tmp_path, *flags).stages
    for stage, loss in zip(tried, (None, 0.5, 0.75, None, None, 0.25), strict=True):
        finish(stage, loss)
    (norms, bias) = (plan(tmp_path, *flags)).stages[6:]
    assert [norms.name, bias.name] == ["norms-0.1-s1", "bias-0.1-s1"]
    assert (tried[0].may_diverge, norms.may_diverge) == (True, False)
    for stage in (norms, bias):
        finish(stage, 0.5)
    ways = plan(tmp_path, *flags).report.args[0]
    assert [way.diverged for way in ways] == [[0.03], [0.01, 0.03]]
    for stage in tried[:3]:
        finish(stage, None)
        Path(stage.workdir, "done.json").unlink(missing_ok=True)
    with pytest.raises(InputError, match=r"study\.rates\.norms = .*diverges at each. Give lower"):
        plan(tmp_path, *flags)


def test_a_run_alone_is_that_of_the_study_at_its_middle_rate(tmp_path):
    stages = {stage.name: stage for stage in plan(tmp_path).stages}
    alone = cli.read_experiment(["--config=experiments/adapt.py:prefix_text", "--config.model.init_from=x"]).config
    stage = stages["prefix_text-0.1-s0"]
    ours = json.loads(alone.to_json_best_effort())
    for section in ("steps", "adapter", "optimizer", "objective", "eval"):
        assert stage.settings[section] == ours[section]


@pytest.mark.parametrize(
    ("arg", "message"),
    [
        (":lora,dora", "a run has one way to adapt"),
        (":compare,dora", "a run has one way to adapt"),
        (":base,smollm2", "base has none"),
        ("", "--config.model.init_from: is missing"),
        (":ia3", "--config.model.init_from: is missing"),
        (":smollm2,compare", "--config.data.path: is missing"),
    ],
)
def test_what_does_not_go_together(arg, message):
    with pytest.raises(InputError, match=message):
        cli.read_experiment([f"--config=experiments/adapt.py{arg}"])


def test_a_model_and_data_of_ones_own(tmp_path):
    (tmp_path / "x.jsonl").write_text(json.dumps({"prompt": "a", "response": "b"}) + "\n")
    flags = ["--config.model.init_from=MODEL", f"--config.data.path={tmp_path}/x.jsonl"]
    stages = plan(tmp_path, *flags, arg=":smollm2,compare").stages
    assert len(stages) == 15
    assert {stage.settings["model"]["init_from"] for stage in stages} == {"MODEL"}
    rates = [stage.settings["optimizer"]["learning_rate"] for stage in stages if stage.name.startswith("lora")]
    assert tuple(rates) == adapt.LARGER["lora"]
    lengths = {stage.name.partition("-")[0]: stage.settings["seq_len"] for stage in stages}
    assert lengths == dict.fromkeys(("full", "lora", "prefix_text", "norms"), 256) | {"prompt_text": 276}


@pytest.mark.slow
@pytest.mark.usefixtures("one_device")
def test_the_study_runs_to_its_table(tmp_path, capfd):
    flags = ["--config=experiments/adapt.py:compare,debug", "--config.study.ways=('prompt_text','norms')"]
    flags += [f"--config.study.rates.{way}=(0.03, 0.1)" for way in ("prompt_text", "norms")]
    assert main([*flags, f"--workdir={tmp_path}/x"]) == 0
    table = json.loads((tmp_path / "x/table.json").read_text())
    assert [row["name"] for row in table] == ["prompt_text", "norms"]
    prompt, norms = (row["trained"] for row in table)
    assert (prompt, norms) == (16 * 64, 5 * 64)  # P rows; two norms of two layers, and the last one
    assert "prompt_text" in capfd.readouterr().out
