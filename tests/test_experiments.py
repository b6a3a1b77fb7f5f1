"""Experiments do what their docstrings say."""

import json
from pathlib import Path

import pytest

from research import cli
from research import config as config_lib
from research.errors import InputError
from research.studies import study

TINY = str(Path(__file__).parent / "golden/hf_tiny/llama")


def plan(tmp_path, *flags, arg=":debug"):
    """The stages of the study of weak_to_strong.py, by name."""
    experiment = cli.read_experiment([f"--config=experiments/weak_to_strong.py{arg}", *flags])
    planned = study.plan(experiment.name, experiment.config, str(tmp_path / "w"), experiment.overrides)
    return {stage.name: stage for stage in planned.stages}


def write(path, labels):
    path.write_text("".join(json.dumps({"text": f"text {i}", "label": x}) + "\n" for i, x in enumerate(labels)))
    return f"--config.study.data={path}"


@pytest.mark.parametrize(
    ("labels", "names", "count"),
    [([0, 1] * 80, [], 2), (["sad", "glad", "mad"] * 50, ["glad", "mad", "sad"], 3), ([True, False] * 80, [], 2)],
)
def test_classes_are_those_of_the_data(labels, names, count, tmp_path):
    stages = plan(tmp_path, write(tmp_path / "x.jsonl", labels))
    for stage in stages.values():
        if stage.kind == "train" and not stage.name.startswith("pretrain"):
            assert (stage.settings["model"]["num_labels"], stage.settings["data"]["labels"]) == (count, names)


def test_classes_of_the_builtin_topics_are_in_their_order(tmp_path):
    settings = plan(tmp_path)["weak-xs-s0"].settings
    assert settings["data"]["labels"] == ["language", "interfaces", "concurrency", "internet"]
    assert settings["model"]["num_labels"] == 4


@pytest.mark.parametrize(
    ("labels", "flags", "words"),
    [
        ([0, 2] * 80, [], "no record has the label 1"),
        ([0] * 160, [], "all records have one label"),
        (["a", "b"] * 80, ["--config.study.labels=('a', 'b', 'c')"], "no record has the label 'c'"),
        (["a", "b", "d"] * 80, ["--config.study.labels=('a', 'b')"], "there is a label ['d']"),
        ([0, "b"] * 80, [], "some labels are numbers and some names"),
        ([0.0, 1.0] * 80, [], "x.jsonl:1: label = 0.0: must be a number from 0 on, or a name"),
        ([0, 1] * 80, ["--config.model.num_labels=4"], "the classes are those of --config.study.data"),
    ],
)
def test_classes_without_records_and_labels_that_are_none(labels, flags, words, tmp_path):
    with pytest.raises(InputError) as error:
        plan(tmp_path, write(tmp_path / "x.jsonl", labels), *flags)
    assert words in str(error.value)


def test_no_pretraining_is_none_and_the_test_part_is_never_read(tmp_path):
    data = write(tmp_path / "x.jsonl", [0, 1] * 80)
    none = plan(tmp_path, data, "--config.study.pretrain_data=")
    assert not any(name.startswith("pretrain") for name in none)
    weak = none["weak-xs-s0"].settings["model"]
    assert (weak["init_from"], weak["d_model"]) == ("", 32)
    own = plan(tmp_path, data, f"--config.study.pretrain_data={tmp_path}/x.jsonl")
    path = own["pretrain-xs"].settings["data"]["path"]
    assert [Path(part).name for part in path.split(",")] == ["weak.jsonl", "strong.jsonl"]
    small = plan(tmp_path, data, "--config.study.strong=l", arg=":debug,smollm2")  # by default the study's own
    assert [Path(part).name for part in small["pretrain-s"].settings["data"]["path"].split(",")] == [
        "weak.jsonl",
        "strong.jsonl",
    ]
    assert plan(tmp_path)["pretrain-xs"].settings["data"]["path"] == "builtin:python_docs"


@pytest.mark.parametrize("name", ["sft", "pretrain", "finetune", "large", "benchmark"])
def test_the_debug_form_leaves_the_shape_to_a_model_that_exists(name):
    defaults, given = config_lib.defaults()["model"], f"--config.model.init_from={TINY}"
    shape = ("num_layers", "d_model", "num_heads", "num_kv_heads", "head_dim", "d_ff")
    model = cli.read_experiment([f"--config={name}:debug", given]).config.model
    assert {field: model[field] for field in shape} == {field: defaults[field] for field in shape}
    model = cli.read_experiment([f"--config={name}:debug", given, "--config.model.d_ff=128"]).config.model
    assert (model.d_ff, model.d_model) == (128, defaults["d_model"])  # what the command line asks for is compared
    if name != "finetune":
        assert cli.read_experiment([f"--config={name}:debug"]).config.model.d_model == 64
