"""From signals to causes, without any run."""

import dataclasses

import pytest

from research.diagnosis import derived, ranking
from research.diagnosis.causes import CAUSES
from research.diagnosis.types import Cause, Evidence, Prediction

HEALTHY = {
    **{"steps": 60, "loss.first": 2.1, "loss.last": 1.7, "loss.trend": -5.0, "learning_rate.max": 1e-3},
    **{"learning_rate.median": 8e-4, "learning_rate.mean": 8e-4, "learning_rate.last": 5e-4},
    **{"update_ratio.median": 3e-3, "update_ratio.max": 4e-3, "grad_norm.median": 1.3, "grad_norm.max": 2.0},
    **{"supervised_fraction.max": 1.0, "supervised_fraction.mean": 0.98, "nonfinite.mean": 0.0, "nonfinite.min": 0.0},
    **{"setup/adapter": 0, "setup/kernels": 0.05, "config/optimizer.learning_rate": 1e-3, "setup/trained": 1e5},
}


def found(stage="sft", started=True, **changes):
    signals = {name: float(value) for name, value in {**HEALTHY, **changes}.items()}
    return ranking.diagnose(Evidence(stage, started, signals))


def names(diagnosis):
    return [each.cause.name for each in diagnosis.findings]


def cause(name, *predicts, **fields):
    text = dict.fromkeys(("remedy", "why", "source"), "-")
    return Cause(name, "data", ("sft",), predicts, fields.pop("sureness", 0.5), **text, **fields)


def evidence(**signals):
    return Evidence("sft", True, signals)


def test_a_healthy_run_is_healthy():
    diagnosis = found()
    assert diagnosis.verdict == "healthy"
    assert not diagnosis.findings
    assert "none of the" in diagnosis.reason


def test_a_rate_of_0_ranks_above_what_follows_from_it():
    still = {"update_ratio.median": 0, "update_ratio.max": 0, "rounded.median": 0}
    rate = {"learning_rate.max": 0, "learning_rate.median": 0, "learning_rate.last": 0}
    diagnosis = found(**still, **rate)
    assert diagnosis.verdict == "cause found"
    assert names(diagnosis)[0] == "lr_zero_schedule"
    assert diagnosis.findings[0].level == "observed"
    assert "learning_rate.max 0 (<= 0)" in diagnosis.findings[0].numbers


def test_masks_explain_a_gradient_of_0():
    nothing = {"supervised_fraction.max": 0, "supervised_fraction.mean": 0, "grad_norm.max": 0, "grad_norm.median": 0}
    assert names(found(**nothing))[0] == "all_labels_masked"


def test_what_was_not_measured_speaks_for_nothing():
    one = cause("one", Prediction("a", "<", 1.0), Prediction("b", "<", 1.0))
    assert ranking.finding(one, evidence(a=0.0)) is None
    assert ranking.finding(one, evidence(a=0.0, b=0.0)) is not None
    assert ranking.finding(one, dataclasses.replace(evidence(a=0.0, b=0.0), stage="rl")) is None
    assert [each.signal for each in ranking.unknown([one], evidence(a=0.0))] == ["b"]


def test_support_raises_the_rank_and_is_told():
    holds, fails = Prediction("a", "<", 1.0), Prediction("a", ">", 1.0)
    plain = ranking.finding(cause("plain", holds), evidence(a=0.0))
    backed = ranking.finding(cause("backed", holds, supports=(Prediction("a", "<", 0.5), fails)), evidence(a=0.0))
    assert backed.score > plain.score
    assert backed.numbers == ("a 0 (< 1)", "a 0 (< 0.5)")


def test_what_another_cause_explains_comes_after_it():
    holds = Prediction("a", "<", 1.0)
    sure, root, middle = (
        cause("sure", holds, sureness=0.9),
        cause("root", holds, sureness=0.2, explains=("middle",)),
        cause("middle", holds, sureness=0.3, explains=("sure",)),
    )
    findings = [ranking.finding(each, evidence(a=0.0)) for each in (sure, middle, root)]
    assert [each.cause.name for each in ranking.ranked(findings)] == ["root", "middle", "sure"]
    without = [each for each in findings if each.cause.name != "root"]
    assert [each.cause.name for each in ranking.ranked(without)] == ["middle", "sure"]


def test_causes_that_explain_each_other_are_ranked_by_score():
    holds = Prediction("a", "<", 1.0)
    pair = cause("a", holds, sureness=0.4, explains=("b",)), cause("b", holds, sureness=0.6, explains=("a",))
    findings = [ranking.finding(each, evidence(a=0.0)) for each in pair]
    assert [each.cause.name for each in ranking.ranked(findings)] == ["b", "a"]


def test_where_nothing_can_be_told():
    assert ranking.diagnose(Evidence("sft", True, {})).verdict == "can't tell"
    still = found(**{"loss.last": 2.1, "loss.trend": 0.1})
    assert still.verdict == "can't tell"
    assert "hasn't learned" in still.reason
    assert found(steps=5).verdict == "can't tell"
    assert found(started=False).verdict == "healthy"


def test_rewards_rise_where_losses_fall():
    rising = {
        "reward.first": 0.2,
        "reward.last": 0.6,
        "reward.trend": 4.0,
        "reward.max": 0.7,
        "reward/deviation.max": 0.4,
    }
    assert found("rl", **rising).verdict == "healthy"
    assert found("rl", **{**rising, "reward.last": 0.2, "reward.trend": 0.0}).verdict == "can't tell"


def test_derived_signals():
    made = derived.derived(
        {
            **{"config/optimizer.clip_norm": 0.5, "grad_norm.median": 2.0, "config/optimizer.eps": 1e-3},
            **{"setup/adam": 1.0, "setup/trained": 400.0, "learning_rate.mean": 1e-3, "steps": 50.0},
            **{"config/optimizer.weight_decay": 0.1, "loss.first": 2.0, "loss.last": 1.5, "probe/loss": 1.0},
            **{"probe/offset_0": 4.0, "probe/ce_recomputed": 2.0, "reward/a/failed.mean": 0.2, "probe/base_ce": 3.0},
            **{"reward/b/failed.mean": 0.6, "learning_rate.max": 1e-3, "learning_rate/layers.max": 0.0},
        }
    )
    expected = {
        **{"clip_of_norm": 0.25, "eps_of_gradient": 1e-3 * 20 / 0.5, "decay_of_run": 5e-3, "loss_fall": 0.25},
        **{"offset_gap_0": 0.75, "loss_of_ce": 0.5, "offset_gap_1": 0.5, "reward_failed": 0.6, "idle_groups": 1.0},
        **{"loss_of_base": 0.5},
    }
    assert {name: made[name] for name in expected} == pytest.approx(expected)
    assert "teacher_gap" not in made
    assert derived.derived({}) == {}


def test_sureness_of_what_is_observed_is_higher_than_of_symptoms():
    scores = {each.name: each.sureness + 0.1 * each.observed for each in CAUSES}
    assert scores["lr_zero_schedule"] > scores["lr_too_small"]
    assert scores["no_causal_mask"] > scores["random_labels"]
