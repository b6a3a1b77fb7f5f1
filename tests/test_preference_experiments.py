"""experiments/reward.py and preference.py: which runs their studies make, and what goes together."""

import json
from pathlib import Path

import pytest

from experiments import preference, reward
from research import cli
from research.commands.study import main
from research.errors import InputError
from research.run import metrics
from research.sources import preferences
from research.studies import answers, study

RUNS = Path(__file__).parent / "golden/runs"


def plan(tmp_path, name):
    experiment = cli.read_experiment([f"--config=experiments/{name}"])
    return study.plan(experiment.name, experiment.config, str(tmp_path / "w"), experiment.overrides)


def test_rewards_are_learned_from_the_same_pairs_and_judged_by_right_labels_too(tmp_path):
    stages = plan(tmp_path, "reward.py:compare").stages
    assert [stage.name for stage in stages] == [f"{way}-s{seed}" for way in reward.WAYS for seed in range(3)]
    for stage in stages:
        flip, options = reward.WAYS[stage.name.rpartition("-s")[0]]
        data, told = stage.settings["data"], stage.settings["objective"]["terms"]["reward"]
        assert data["path"] == data["eval_path"] == f"preferences:reverse/{flip}"
        assert {**told, **options} == told
        assert stage.settings["eval"]["tasks"] == ["best_of,limit=1000,name=utility:preferences:reverse/0"]


@pytest.mark.parametrize(("arg", "ways"), [("compare", preference.COMPARED), ("noise", preference.NOISY)])
def test_policies_begin_with_the_start_of_their_seed(arg, ways, tmp_path):
    planned = plan(tmp_path, f"preference.py:{arg}")
    stages = {stage.name: stage for stage in planned.stages}
    starts = [stages[f"start-s{seed}"].workdir for seed in range(3)]
    assert len(set(starts)) == 3
    suffix, share = ("-noise", preference.MANY) if arg == "noise" else ("", preference.FEW)
    for way in ways:
        for seed, start in enumerate(starts):
            settings = stages[f"{way}{suffix}-s{seed}"].settings
            assert settings["model"]["init_from"] == start
            assert settings["data"]["path"] == f"{preference.TASK}/{share}"
            assert settings["data"]["eval_path"] == f"{preference.TASK}/0"
            referred = [role["init_from"] for role in settings["roles"].values()]
            assert referred == ([] if way in preference.ALONE else [start])
            if arg == "compare":
                flags = stages[f"answers-{way}-s{seed}"].settings["args"]
                assert (flags["model"], flags["start"]) == (stages[f"{way}-s{seed}"].workdir, start)
    compared = planned.report.args[0]
    assert list(compared) == ([*ways] if arg == "noise" else ["start", *ways])


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (("reward.py:compare,noisy",), "compare, smollm2 and weak_to_strong stand alone"),
        (("reward.py:plain,smoothed",), "two losses"),
        (("reward.py:smollm2",), "--config.model.init_from: is missing"),
        (("reward.py:smollm2", "--config.model.init_from=x"), "--config.data.path: is missing"),
        (("preference.py:dpo",), "--config.model.init_from: is missing"),
        (("preference.py:dpo,kto",), "a run has one way to learn"),
        (("preference.py:compare,smollm2",), "stand alone"),
        (("preference.py:smollm2,kto", "--config.model.init_from=x"), "--config.data.path: is missing"),
    ],
)
def test_what_does_not_go_together_is_refused(flags, words):
    with pytest.raises(InputError) as error:
        cli.read_experiment([f"--config=experiments/{flags[0]}", *flags[1:]])
    assert words in str(error.value)


def test_a_model_that_is_named_is_the_reference_too_and_has_its_own_shape():
    flags = ["--config.model.init_from=x", "--config.data.path=y.jsonl"]
    config = cli.read_experiment(["--config=experiments/preference.py:smollm2,kto", *flags]).config
    assert config.roles.reference.init_from == "x"
    assert (config.data.format, config.optimizer.learning_rate) == ("unpaired", preference.LARGER_RATE)
    assert config.model.d_model != preference.MODEL["d_model"]


def test_answers_have_the_utility_that_is_planted_and_a_divergence_of_0_from_themselves(tmp_path):
    flags = ["--data=preferences:copy/1/0", "--limit=6", "--max_new_tokens=4"]
    found = []
    for start in ("trained", "plain"):
        where = tmp_path / start
        models = [f"--model={RUNS / 'trained'}", f"--start={RUNS / start}"]
        assert answers.main([*models, f"--output={where}", *flags]) == 0
        (line,) = metrics.read_metrics(str(where))
        found.append((line, [json.loads(text) for text in (where / "answers.jsonl").read_text().splitlines()]))
    (same, lines), (other, again) = found
    assert abs(same["answers/kl"]) < 1e-4 < abs(other["answers/kl"])
    assert [line["completion"] for line in lines] == [line["completion"] for line in again]
    asked = list(preferences.records("copy/1/0", 6, seed=answers.PROMPT_SEED))
    assert [line["prompt"] for line in lines] == [record["prompt"] for record in asked]
    planted = [preferences.utility(record, line["completion"]) for record, line in zip(asked, lines, strict=True)]
    assert same["answers/utility"] == pytest.approx(sum(planted) / 6)
    assert same["answers/length"] <= 4


def test_students_learn_from_the_rewards_of_the_weak_models_of_their_seed(tmp_path):
    planned = plan(tmp_path, "reward.py:weak_to_strong,debug")
    stages = {stage.name: stage for stage in planned.stages}
    parts = stages["split"].workdir
    for seed in range(2):
        weak, policy, start = (
            stages[f"weak-{name}"] for name in (f"s{seed}", f"policy-s{seed}", f"policy-s{seed}-start")
        )
        assert {stage.settings["data"]["path"] for stage in (weak, policy, start)} == {f"{parts}/weak{seed}.jsonl"}
        assert (
            policy.settings["model"]["init_from"] == policy.settings["roles"]["reference"]["init_from"] == start.workdir
        )
        flags = {
            "reward-model": {"model": weak.workdir},
            "policy": {"model": policy.workdir, "reference": start.workdir},
        }
        for kind, student in (("reward-model", "soft"), ("reward-model", "confidence"), ("policy", "hard")):
            labels, run = stages[f"labels-{kind}-s{seed}"], stages[f"{student}-{kind}-s{seed}"].settings
            assert labels.settings["args"]["data"] == f"{parts}/strong.jsonl"
            assert flags[kind].items() <= labels.settings["args"].items()
            assert run["data"]["path"] == f"{labels.workdir}/rewards.jsonl"
            assert run["data"]["fields"] == {"rewards": "rewards"}
            assert run["objective"]["terms"]["weak_to_strong"]["head"] == "pairs"
        for name, path in (
            (f"dpo-policy-s{seed}", f"{labels.workdir}/rewards.jsonl"),
            (f"ceiling-policy-s{seed}", f"{parts}/strong.jsonl"),
        ):
            begun, learned = stages[f"{name}-start"], stages[name].settings
            assert begun.settings["data"] == learned["data"]  # answers as the labels want it, and not as the truth does
            assert (learned["data"]["path"], bool(learned["data"]["fields"])) == (path, "dpo" in name)
            assert learned["roles"]["reference"]["init_from"] == begun.workdir
        assert stages[f"ceiling-s{seed}"].settings["data"] | {"path": "", "fields": {}} == run["data"] | {
            "path": "",
            "fields": {},
        }
    cells = planned.report.args[0]
    assert [(cell["seed"], cell["weak_size"], cell["loss"]) for cell in cells[:4]] == [
        (0, "reward model", "soft"),
        (0, "reward model", "confidence"),
        (0, "policy", "hard"),
        (0, "policy", "dpo"),
    ]
    assert [cell["strong_size"] for cell in cells[:4]] == [*["reward model"] * 3, "policy"]
    assert len({cell["ceiling"] for cell in cells[:4]}) == 2
    assert all(cell[part].endswith("/rewards.jsonl") for cell in cells for part in ("weak", "student", "ceiling"))


@pytest.mark.slow
@pytest.mark.usefixtures("one_device")
def test_the_study_of_learning_from_a_weak_model_has_a_table(tmp_path, capsys):
    flags = [f"--workdir={tmp_path}/w", "--config.study.seeds=1", "--config.study.students=('confidence',)"]
    assert main(["--config=experiments/reward.py:weak_to_strong,debug", *flags]) == 0
    groups = json.loads((tmp_path / "w/table.json").read_text())["groups"]
    assert [(group["weak_size"], group["loss"], group["examples"]) for group in groups] == [
        ("reward model", "confidence", 20),
        ("policy", "hard", 20),
        ("policy", "dpo", 20),
    ]
    assert "reward model  reward model  confidence" in capsys.readouterr().out
