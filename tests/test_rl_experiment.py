"""experiments/rl.py: which runs its study makes, and what goes together."""

import pytest

from experiments import rl
from research import cli
from research import config as config_lib
from research.errors import InputError
from research.studies import study


def test_ways_begin_with_the_start_of_their_seed(tmp_path):
    experiment = cli.read_experiment(["--config=experiments/rl.py:compare"])
    planned = study.plan(experiment.name, experiment.config, str(tmp_path / "w"), experiment.overrides)
    stages = {stage.name: stage for stage in planned.stages}
    assert len(stages) == 3 * (2 + len(rl.COMPARED))
    for seed in range(3):
        start = stages[f"start-s{seed}"]
        assert start.settings["rewards"] == {}
        again = stages[f"sft-s{seed}"].settings
        assert again["model"]["init_from"] == start.workdir
        assert again["data"] == start.settings["data"]
        for way in rl.COMPARED:
            settings = stages[f"{way}-s{seed}"].settings
            assert settings["model"]["init_from"] == start.workdir
            assert settings["rewards"] == {"exact_match": 1.0}
            references = [role["init_from"] for name, role in settings["roles"].items() if name == "reference"]
            assert references == ([] if way == "reinforce" else [start.workdir])
            assert ("critic" in settings["roles"]) == (way == "ppo")


@pytest.mark.parametrize("way", rl.WAYS)
@pytest.mark.parametrize("arg", ["", "smollm2,", "debug,"])
def test_each_way_is_a_config_that_can_be(arg, way):
    config = rl.get_config(arg + way)
    config.data.path = config.data.path or "prompts.jsonl"
    config = config_lib.parse(config.to_dict())
    config_lib.check(config, num_devices=1)
    loss = config.objective["terms"]["preference" if way == "online_dpo" else "policy_gradient"]
    assert loss.get("budget", config.rollout.max_new_tokens) == config.rollout.max_new_tokens


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (("rl.py:grpo,ppo",), "one way to learn"),
        (("rl.py:smollm2,compare",), "compare and start stand alone"),
        (("rl.py:grpo",), "--config.model.init_from: is missing"),
        (("rl.py:smollm2,grpo", "--config.model.init_from=runs/x"), "--config.data.path: is missing"),
    ],
)
def test_what_does_not_go_together_is_refused(flags, words):
    with pytest.raises(InputError) as error:
        cli.read_experiment([f"--config=experiments/{flags[0]}", *flags[1:]])
    assert words in str(error.value)
