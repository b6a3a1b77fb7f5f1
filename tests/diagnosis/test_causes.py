"""The table of causes: complete, and about signals that exist."""

import dataclasses
import pathlib
import re

import pytest

from research.config import Config
from research.diagnosis import derived, probes, series
from research.diagnosis.causes import CAUSES, GROUPS
from research.diagnosis.types import STAGES, Relative
from research.studies.faults import plants, setups

NAMES = {cause.name for cause in CAUSES}
# Metrics of training that causes read; the rest of a name, from the last dot on, is of series.summary.
METRICS = (
    *("loss", "grad_norm", "update_ratio", "learning_rate", "param_norm", "supervised_fraction", "empty_batch"),
    *("nonfinite", "adapter_zero", "rounded", "moved", "clipped", "entropy", "accuracy", "margin", "identical"),
    *("log_prob_chosen", "preference_loss", "start_loss", "reward", "reward/deviation", "rollout/agreeing"),
    *("rollout/truncated", "rollout/explained_variance", "old_kl", "grad_norm/mlp", "grad_norm/norms"),
    *("grad_norm/adapter", "eval/loss", "eval/accuracy"),
)
COUNTS = ("steps", "unique_batches", "logged")


def said() -> str:
    """What the docstrings of probes and of derived signals say."""
    texts = [probe.measure.__doc__ or "" for probe in probes.PROBES]
    return "\n".join([*texts, probes.setup.of_config.__doc__, derived.derived.__doc__])


def signals_of(cause) -> set[str]:
    predictions = (*cause.predicts, *cause.supports)
    limits = [limit for each in predictions for limit in _limits(each.threshold)]
    return {each.signal for each in predictions} | {limit.signal for limit in limits if isinstance(limit, Relative)}


def _limits(threshold):
    return threshold if isinstance(threshold, tuple) else (threshold,)


@pytest.mark.parametrize("cause", CAUSES, ids=lambda cause: cause.name)
def test_a_cause_names_signals_and_causes_that_exist(cause):
    text = said()
    names = {f"{metric}.{what}" for metric in METRICS for what in series.summary([0.1, 0.2, 0.3, 0.1, 0.5])}
    for signal in signals_of(cause):
        if signal.startswith("config/"):
            value = Config()
            for part in signal.removeprefix("config/").split("."):
                value = getattr(value, part)
            continue
        plain = re.sub(r"_(-?\d)$", "_K", signal)
        assert signal in names or signal in COUNTS or re.search(rf"\b{re.escape(plain)}\b", text), signal
    assert set(cause.explains) <= NAMES - {cause.name}
    assert cause.predicts
    assert cause.why
    assert cause.remedy
    assert cause.source
    assert set(cause.stages) <= set(STAGES)
    assert 0 < cause.sureness <= 1


def test_names_are_unique_and_groups_are_of_their_module():
    assert len(NAMES) == len(CAUSES) >= 70
    for module in GROUPS:
        assert {cause.group for cause in module.CAUSES} == {module.GROUP}


def test_every_cause_is_planted_or_says_why_not():
    planted = {plant.cause for plant in plants.PLANTS}
    assert planted | set(plants.UNPLANTED) == NAMES
    assert not planted & set(plants.UNPLANTED)
    assert len(plants.SIGNED) == 30
    assert all(set(plant.setups) <= set(setups.SETUPS) for plant in plants.PLANTS)


def test_a_plant_is_of_a_stage_that_its_cause_applies_to():
    stages = {"text": "pretrain", "scratch": "pretrain", "lora": "sft", "critic": "rl"}
    by_name = {cause.name: cause for cause in CAUSES}
    for plant in plants.PLANTS:
        for setup in plant.setups:
            stage = "pretrain" if plant.cause == "prompt_trained" else stages.get(setup, setup)
            assert stage in by_name[plant.cause].stages, (plant.cause, setup)


def test_a_plant_sets_fields_that_exist(tmp_path):
    starts = dict.fromkeys(setups.STARTS, str(tmp_path))
    for plant in plants.PLANTS:
        for setup in plant.setups:
            values = setups.setup(setup, "dev", str(tmp_path), starts) | dict(plant.values)
            assert dataclasses.is_dataclass(setups.parse(values))


def test_modules_are_in_the_table():
    files = {path.stem for path in pathlib.Path(GROUPS[0].__file__).parent.glob("*.py")} - {"__init__", "stages"}
    assert {module.__name__.rpartition(".")[2] for module in GROUPS} == files
