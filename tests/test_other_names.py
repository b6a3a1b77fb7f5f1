"""Every name of another library is answered with a field that there is; docs/coming-from.md says the same."""

import inspect
import re
from pathlib import Path

import pytest

from research import config, objectives, other_names
from research.cli import fields
from research.errors import InputError
from research.models import adapters
from research.objectives import policy_gradient, preference, reward, sft, value
from research.objectives.policy_options import Settings

DOC = Path(__file__).parents[1] / "docs/coming-from.md"
FIELDS = set(fields.dotted(config.defaults()))
ROWS = re.findall(r"^\| `(\w+)` \| `([\w.]+)` \|", DOC.read_text(encoding="utf-8"), re.MULTILINE)
OBJECTIVES = {"preference": preference, "reward": reward, "sft": sft, "value": value}


def exists(field: str) -> bool:
    if field in FIELDS:
        return True
    section, _, option = field.rpartition(".")
    if section == "adapter":
        return any(option in adapters.defaults(kind) or option == "kind" for kind in ("lora", "prompt"))
    if field.startswith("objective.terms."):
        name, _, option = field.removeprefix("objective.terms.").partition(".")
        if name == "policy_gradient":
            assert policy_gradient.make
            return option in Settings.__dataclass_fields__
        module = OBJECTIVES.get(name) or __import__(f"research.objectives.{name}", fromlist=["make"])
        return not option or option in inspect.signature(module.make).parameters
    if field.startswith("roles."):
        return len(field.split(".")) == 2 or option in config.RoleSection.__dataclass_fields__
    return field.startswith("rewards.")


def test_each_answer_is_a_field_that_there_is():
    for name, text in other_names.NAMES.items():
        ours = text.partition("; ")[0]
        assert ours.startswith("(") or exists(ours), (name, ours)
        assert name not in FIELDS


@pytest.mark.parametrize("least", [90])
def test_the_page_says_the_same(least):
    assert len(ROWS) >= least
    for theirs, ours in ROWS:
        assert other_names.NAMES[theirs].partition("; ")[0] == ours


def test_where_it_is_answered():
    assert other_names.answer("seq_len") == ""
    assert other_names.answer("torch_compile").startswith(" Leave it out")
    with pytest.raises(InputError, match=r"optimizer.lr: no such field. Here it is optimizer.learning_rate"):
        config.parse({"optimizer": {"lr": 1.0}})
    with pytest.raises(InputError, match=r"objective.terms.preference.loss_type: .* Here it is .*preference.kind"):
        objectives.load({"terms": {"preference": {"loss_type": "ipo"}}})
    with pytest.raises(InputError, match=r"adapter.lora_r: no such option. Here it is adapter.rank\."):
        adapters.load({"kind": "lora", "lora_r": 8})
