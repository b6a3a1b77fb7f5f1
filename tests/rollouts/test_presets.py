"""Presets are settings that a run takes, and docs/rl.md lists them."""

from pathlib import Path

import pytest

from research import objectives
from research.rollouts.advantages import AdvantageSpec
from research.rollouts.kl_penalty import KlPenalty
from research.rollouts.presets import PRESETS
from research.rollouts.spec import RolloutSpec

PAGE = (Path(__file__).parents[2] / "docs" / "rl.md").read_text()


def settings(values):
    flat = {}
    for name, value in values.items():
        flat |= {f"{name}.{key}": x for key, x in value.items()} if isinstance(value, dict) else {name: value}
    return ", ".join(f"{name} = {value!r}" for name, value in flat.items()).replace("'", "")


@pytest.mark.parametrize("name", PRESETS)
def test_what_a_preset_sets_is_taken(name):
    preset = PRESETS[name]
    loss = dict(preset.loss) | ({"budget": 32} if "budget" in preset.besides else {})
    objectives.load({"terms": {"policy_gradient": loss}})
    advantage = dict(preset.advantage)
    if "kl" in advantage:
        advantage["kl"] = KlPenalty(**advantage["kl"])
    AdvantageSpec(**advantage).check(RolloutSpec(**preset.rollout).answers, 16)


@pytest.mark.parametrize("name", PRESETS)
def test_the_page_lists_what_a_preset_sets(name):
    preset = PRESETS[name]
    assert f"| `{name}` | {settings(preset.loss)} | {settings(preset.advantage)} | " in PAGE
    for field, value in preset.rollout.items():
        assert f"rollout.{field} = {value}".replace("'", "") in PAGE
