"""Fields that a command line adds to a config, and what an error says of those that it can't."""

import pytest

from research import cli, config, objectives
from research.cli import fields
from research.errors import InputError

SFT = "--config=experiments/sft.py:debug"


def read(*flags):
    return cli.read_experiment([SFT, *(f"--config.{flag}" for flag in flags)])


def test_names_that_are_free_are_added():
    experiment = read(
        "objective.terms.next_token=0.1",
        "objective.terms.sft.weight=2",
        "roles.teacher.init_from=runs/large",
        "roles.teacher.adapter=False",
        "rewards.exact_match=1",
        "rewards.exact_match.verifier=number",
        "adapter.kind=lora",
        "data.sources.code.path=a,b.jsonl",
        "data.sources.code.view={'kind': 'truncate', 'tokens': 3}",
        "optimizer.groups.head.match=policy/head.*",
        "steps=7",
    )
    values = experiment.values
    assert values["objective"]["terms"] == {"sft": {"weight": 2}, "next_token": 0.1}
    assert values["roles"] == {"teacher": {"init_from": "runs/large", "adapter": False}}
    assert values["rewards"] == {"exact_match": {"weight": 1, "verifier": "number"}}
    assert values["adapter"] == {"kind": "lora"}
    assert values["data"]["sources"] == {
        "code": {"path": "a,b.jsonl", "view": {"kind": "truncate", "tokens": 3}},
    }
    assert config.parse(values).optimizer.groups == {"head": {"match": "policy/head.*"}}
    assert experiment.overrides["objective.terms.next_token"] == 0.1
    assert experiment.overrides["steps"] == 7


def test_an_option_joins_the_weight_of_its_term():
    terms = read("objective.terms.next_token=0.5", "objective.terms.next_token.z_loss=1e-4").values["objective"]
    assert terms["terms"]["next_token"] == {"weight": 0.5, "z_loss": 1e-4}
    loaded = objectives.load({"terms": {"next_token": terms["terms"]["next_token"]}})
    assert float(loaded["next_token"].coefficient(0)) == 0.5


def test_what_is_there_already_is_set_as_before():
    experiment = read("objective.terms.sft=0.5", "data.fields={'prompt': 'q'}", "data.fields.response=a")
    assert experiment.values["objective"]["terms"] == {"sft": 0.5}
    assert experiment.values["data"]["fields"] == {"prompt": "q", "response": "a"}


@pytest.mark.parametrize(
    ("flag", "said"),
    [
        ("optimizer.lr=1", r"no such field 'optimizer.lr'. Here it is optimizer.learning_rate\.$"),
        ("max_grad_norm=1", r"Here it is optimizer.clip_norm\.$"),
        ("learning_rate=1", r"Did you mean 'optimizer.learning_rate'\?$"),
        ("optimiser.nesterv=1", r"Did you mean 'optimizer.nesterov'\?$"),
        ("keep_last=1", r"Did you mean 'checkpoint.keep_last'\?$"),
        ("every=1", r"Did you mean 'checkpoint.every', 'eval.every' or 'log.every'\?$"),
        ("wholly.other=1", "docs/configs.md lists the fields"),
        ("trainable.value=head", "trainable = '' is no mapping"),
    ],
)
def test_others_are_answered_with_the_nearest(flag, said):
    with pytest.raises(InputError, match=said):
        read(flag)


def test_a_field_that_get_config_sets_is_answered_too(tmp_path):
    path = tmp_path / "mine.py"
    path.write_text(
        "from experiments import base\n\n\ndef get_config():\n    c = base.get_config()\n    c.bf16 = True\n"
    )
    with pytest.raises(InputError, match=r"mine.py:6: the config has no field 'bf16'. Here it is model.dtype"):
        cli.read_experiment([f"--config={path}"])


def test_free_names():
    values = config.defaults()
    assert fields.is_new(values, "roles.teacher.init_from")
    assert fields.is_new(values, "objective.terms.sft")
    assert not fields.is_new(values, "objective.terms.next_token")
    assert not fields.is_new(values, "model.lr")
