"""What is found out by training: a range of learning rates, a batch by heart, and one change with and without."""

import dataclasses

import jax
import numpy as np
import pytest
import subjects

from research.diagnosis import confirm, trial
from research.diagnosis.probes import range_test
from research.diagnosis.types import Cause, Diagnosis, Evidence, Finding

RATE = 1e-5  # of the subject, a thousandth of what would do


@pytest.fixture(scope="module")
def subject(tmp_path_factory):
    path = subjects.write(tmp_path_factory.mktemp("data") / "answers.jsonl", subjects.answers())
    optimizer = {"learning_rate": RATE, "warmup_steps": 1}
    return subjects.subject(subjects.config(path, optimizer=optimizer))


def test_a_rate_that_is_far_too_low_is_below_the_best(subject):
    with jax.set_mesh(subject.mesh):
        signals = range_test.measure(subject).signals
    assert signals["range/own_over_best"] <= 0.011
    assert signals["range/best"] == pytest.approx(RATE / signals["range/own_over_best"])
    assert signals["range/gain"] > 10 * abs(signals["range/own_gain"])


def test_a_constant_rate_is_what_the_step_takes(subject):
    """The warm-up begins at 0, and the cosine falls: neither shows."""
    with jax.set_mesh(subject.mesh):
        state, seen = trial.copied(subject.state), []
        for i in range(4):
            rates = range_test.constant_rates(subject, 10.0, i)
            state, out = subject.parts.step(state, subject.frozen, subject.batches[0], rates)
            seen.append(float(out["learning_rate"][0]))
    np.testing.assert_allclose(seen, [0.0, *[10 * RATE] * 3], rtol=1e-5)


def test_a_batch_is_learned_by_heart_unless_nothing_leads_there(subject):
    with jax.set_mesh(subject.mesh):
        learned = range_test.measure(subject).signals["probe/memorise"]
        frozen = jax.tree.map(lambda x: x * 0, subject.state.params)
        dead = dataclasses.replace(subject, state=subject.state.replace(params=frozen))
        stuck = range_test.measure(dead).signals["probe/memorise"]
    assert learned < 0.9
    assert stuck > 0.99


def test_a_change_that_helps_confirms_its_cause(subject):
    def found(name, counterfactual):
        cause = Cause(name, "optimizer", ("sft",), (), 0.5, "", "", "", counterfactual=counterfactual)
        return Finding(cause, "suspected", 0.5, ())

    findings = found("other", ""), found("too_low", "learning_rate_up")
    before = Diagnosis("cause found", findings, Evidence("sft", False, {}))
    after = confirm.confirm(subject, before, steps=12)
    assert [finding.cause.name for finding in after.findings] == ["too_low", "other"]
    assert [finding.level for finding in after.findings] == ["confirmed", "suspected"]
    assert "1000 times higher" in after.findings[0].confirmation  # 10 times doesn't do
    assert "the change helps" in after.findings[0].confirmation
    assert not after.findings[1].confirmation


@pytest.mark.slow
def test_a_change_that_does_not_help_confirms_nothing(subject):
    outcome = confirm.compare(subject, confirm.CHANGES["no_weight_decay"], steps=12)
    assert not outcome.helps
    same = confirm.compare(subject, confirm.CHANGES["standard_eps"], steps=12)
    assert not same.helps
    assert "already" in same.text


def test_every_change_gives_a_config_that_can_be(subject):
    for name, change in confirm.CHANGES.items():
        made = change.make(subject.config)
        assert isinstance(made, type(subject.config)), name
    halved = confirm.CHANGES["learning_rate_down"].make(subject.config)
    assert halved.optimizer.learning_rate == pytest.approx(RATE / 10)
    terms = {"terms": {"preference": {"beta": 0.5}}, "preference": {}}
    lower = confirm.CHANGES["beta_x0.1"].make(dataclasses.replace(subject.config, objective=terms))
    assert lower.objective["terms"]["preference"]["beta"] == pytest.approx(0.05)


def test_a_subject_begins_again_where_its_run_began(subject):
    after, _ = trial.train(subject, 3, evaluate=False)
    with jax.set_mesh(subject.mesh):
        again = confirm.restarted(after)
    assert not again.started
    for a, b in zip(jax.tree.leaves(again.state.params), jax.tree.leaves(subject.state.params), strict=True):
        np.testing.assert_array_equal(np.asarray(a), np.asarray(b))
    _, first = trial.train(subject, 2, evaluate=False)
    _, second = trial.train(again, 2, evaluate=False)
    assert [r["train/loss"] for r in first] == [r["train/loss"] for r in second]
