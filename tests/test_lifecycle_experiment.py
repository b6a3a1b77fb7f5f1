"""experiments/lifecycle.py: which stages its variants have, and what goes together."""

import json
from pathlib import Path

import pytest

from experiments import lifecycle
from research import cli
from research import config as config_lib
from research.commands.study import main
from research.errors import InputError
from research.studies import study
from research.studies.stages import COST, finished

TINY = str(Path(__file__).parent / "golden/hf_tiny/llama")


def plan(tmp_path, arg="", *flags):
    experiment = cli.read_experiment([f"--config=experiments/lifecycle.py{arg}", *flags])
    return study.plan(experiment.name, experiment.config, str(tmp_path / "w"), experiment.overrides)


def by_name(planned):
    return {stage.name: stage for stage in planned.stages}


def test_each_stage_begins_with_the_one_before_of_its_seed(tmp_path):
    planned = plan(tmp_path)
    stages = by_name(planned)
    assert len(stages) == 3 * 12
    for seed in range(3):
        at = {name: stages[f"{name}-s{seed}"].workdir for name in ("pretrain", "sft", "reward", "ppo", "grpo", "dpo")}
        starts = {name: stages[f"{name}-s{seed}"].settings["model"]["init_from"] for name in at}
        assert starts == {"pretrain": "", "sft": at["pretrain"]} | dict.fromkeys(
            ("reward", "ppo", "grpo", "dpo"), at["sft"]
        )
        for way in ("ppo", "grpo"):
            settings = stages[f"{way}-s{seed}"].settings
            roles = {name: role["init_from"] for name, role in settings["roles"].items()}
            critic = {"critic": at["reward"]} if way == "ppo" else {}
            assert roles == {"reference": at["sft"], "reward": at["reward"], **critic}
            assert settings["rewards"]["true"]["weight"] == 0  # it is reported, and never learned from
        pairs, policy = (stages[f"{name}-s{seed}"].settings["data"] for name in ("reward", "dpo"))
        assert pairs == policy  # DPO learns from what the reward model does
        for name in at.keys() - {"reward"}:
            flags = stages[f"{name}-answers-s{seed}"].settings["args"]
            assert (flags["model"], flags["start"], flags["reward"]) == (at[name], at["sft"], at["reward"])
    phases, start = planned.report.args
    assert start == "sft"
    names = ["pretrain", "sft", "reward model", "ppo", "grpo", "dpo", "best of 16"]
    assert [phase.name for phase in phases] == names
    assert {phase.seeds for phase in phases} == {3}


def test_variants_share_what_they_have_in_common(tmp_path):
    whole = {stage.digest for stage in plan(tmp_path).stages}
    for arg, shared in (("dpo", 21), ("grpo,best_of", 24), ("lora", 3), ("no_sft", 3), ("denoise", 0)):
        assert len(whole & {stage.digest for stage in plan(tmp_path, f":{arg}").stages}) == shared, arg


def test_without_sft_what_is_learned_from_rewards_begins_as_pretrained(tmp_path):
    planned = plan(tmp_path, ":no_sft,ppo")
    stages = by_name(planned)
    start = stages["pretrain-s1"].workdir
    for name in ("reward", "ppo"):
        assert stages[f"{name}-no_sft-s1"].settings["model"]["init_from"] == start
    assert stages["ppo-no_sft-s1"].settings["roles"]["reference"]["init_from"] == start
    phases, begun = planned.report.args
    assert (begun, [phase.name for phase in phases]) == ("pretrain", ["pretrain", "reward model", "ppo"])


def test_adapters_leave_the_rest_as_it_was(tmp_path):
    stages = by_name(plan(tmp_path, ":lora"))
    assert stages["pretrain-s0"].settings["adapter"] == {}
    for name in ("sft", "reward", "ppo", "grpo", "dpo"):
        settings = stages[f"{name}-lora-s0"].settings
        assert settings["adapter"] == {"kind": "lora", "rank": 8} | ({"also": "head"} if name == "reward" else {})
        if "reference" in settings["roles"]:
            assert settings["roles"]["reference"]["of"] == "policy"
        assert settings["optimizer"]["learning_rate"] == lifecycle.LORA_RATES[name]


def test_denoising_is_learned_from_its_own_source(tmp_path):
    settings = by_name(plan(tmp_path, ":denoise"))["pretrain-denoise-s0"].settings
    assert settings["data"]["sources"]["holes"]["view"] == {"kind": "denoise"}
    assert settings["objective"]["terms"] == {
        "next_token": {"sources": ["dialogues", "programs"]},
        "restored": {"objective": "sft", "sources": ["holes"]},
    }


@pytest.mark.parametrize("arg", ["", ":debug"])
def test_a_model_that_is_named_is_the_first_stage(arg, tmp_path):
    variants = f"{arg},smollm2,lora" if arg else ":smollm2,lora"
    planned = plan(tmp_path, variants, f"--config.model.init_from={TINY}")
    stages = by_name(planned)
    assert not any(stage.kind == "train" and stage.name.startswith("pretrain") for stage in stages.values())
    shape, defaults = stages["sft-lora-s0"].settings["model"], config_lib.defaults()["model"]
    assert (shape["init_from"], shape["d_model"]) == (TINY, defaults["d_model"])
    assert "name=text:builtin:python_docs" in stages["sft-lora-answers-s0"].settings["args"]["task"][0]
    phases, start = planned.report.args
    assert (start, phases[0].name, phases[0].runs) == ("sft", "as it is", ())


@pytest.mark.parametrize("arg", ["", ":no_sft", ":lora", ":denoise", ":debug", ":debug,lora,no_sft"])
def test_every_stage_is_a_config_that_can_be(arg, tmp_path):
    for stage in plan(tmp_path, arg).stages:
        if stage.kind == "train" and not stage.settings["model"]["init_from"]:
            config_lib.check(config_lib.parse(stage.settings), num_devices=1)
        if stage.kind == "train" and arg.startswith(":debug"):
            assert stage.settings["steps"] == 2


@pytest.mark.parametrize(
    ("arg", "flags", "words"),
    [
        (":smollm2", (), "--config.model.init_from: is missing"),
        (":smollm2,denoise", (), "a model that is named isn't pretrained"),
        (":denoise", ("--config.model.init_from=x",), "a model that is named isn't pretrained"),
        ("", ("--config.study.ways=('dop',)",), "there is no way 'dop'. Use some of ppo, grpo, dpo, best_of"),
        (":rloo", (), "no such variant"),
    ],
)
def test_what_does_not_go_together_is_refused(arg, flags, words):
    with pytest.raises(InputError) as error:
        cli.read_experiment([f"--config=experiments/lifecycle.py{arg}", *flags])
    assert words in str(error.value)


@pytest.mark.slow
@pytest.mark.usefixtures("one_device")
def test_the_study_runs_to_its_report(tmp_path, capfd):
    assert main(["--config=experiments/lifecycle.py:debug", f"--workdir={tmp_path}/w"]) == 0
    names = ["pretrain", "sft", "reward model", "ppo", "grpo", "dpo", "best of 4"]
    content = json.loads((tmp_path / "w/table.json").read_text())
    assert [stage["name"] for stage in content["stages"]] == names
    assert set(content["curves"]) == {"ppo", "grpo", "best of 4"}
    sft = next(stage for stage in content["stages"] if stage["name"] == "sft")
    assert abs(sft["answers/kl"][0]) < 1e-3  # it is measured against itself
    assert sft["answers/reward"] == pytest.approx(sft["answers/utility"], abs=1e-6)
    for stage in plan(tmp_path, ":debug").stages:
        assert finished(stage) is not None
        assert json.loads((Path(stage.workdir) / COST).read_text())["cpu_seconds"] > 0
    assert "What each stage gave" in (tmp_path / "w/table.md").read_text()
    assert main(["--config=experiments/lifecycle.py:debug", f"--workdir={tmp_path}/w"]) == 0
    assert capfd.readouterr().out.count("done already") == len(plan(tmp_path, ":debug").stages)
