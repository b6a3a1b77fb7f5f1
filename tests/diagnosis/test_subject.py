"""What a diagnosis reads of a run, and short runs of it in memory."""

import jax
import numpy as np
import pytest
import runs
import subjects

from research.diagnosis import series, trial
from research.run.run import run


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return subjects.write(tmp_path_factory.mktemp("data") / "answers.jsonl", subjects.answers())


@pytest.fixture(scope="module")
def finished(data, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("run") / "whole"
    run(subjects.config(data), str(workdir), devices=jax.devices()[:1])
    return workdir


@pytest.fixture(scope="module")
def before(data):
    return subjects.subject(subjects.config(data))


def test_a_subject_before_a_run_trains_as_the_run_does(before, finished):
    assert not before.started
    assert before.stage == "sft"
    after, records = trial.train(before, 6)
    assert after.started
    assert not before.started
    saved = runs.parameters(finished)
    for path, value in jax.tree_util.tree_leaves_with_path(after.state.params):
        name = "['params']" + jax.tree_util.keystr(path)
        np.testing.assert_allclose(np.asarray(value), saved[name], rtol=1e-5, atol=1e-6)
    logged = [record["train/loss"] for record in records if "train/loss" in record]
    assert len(logged) == 6
    assert records[0]["eval/loss"] > records[-1]["eval/loss"]


def test_the_subject_of_a_workdir_is_where_the_run_is(finished, before):
    subject = subjects.Subject.of_workdir(str(finished), devices=jax.devices()[:1])
    assert subject.started
    assert int(subject.state.step) == 6
    assert subject.records
    for a, b in zip(jax.tree.leaves(subject.initial()), jax.tree.leaves(before.state.params), strict=True):
        np.testing.assert_array_equal(np.asarray(a), np.asarray(b))
    signals = series.signals(subject.records)
    assert signals["steps"] == 6
    assert signals["loss.last"] < signals["loss.first"]


def test_examples_are_what_the_file_says(before):
    records = {record["prompt"]: record["response"] for record in subjects.answers()}
    assert before.examples
    assert before.held_out
    for example in (*before.examples, *before.held_out):
        prompt = next(each for each in records if each in example.prompt)
        assert records[prompt] in example.response
        assert example.kept == len(example.tokens)
    together = {example.prompt for example in before.examples} & {example.prompt for example in before.held_out}
    assert not together


def test_a_change_of_batches_reaches_probes_and_training(data):
    def silent(batch):
        return {**batch, "loss_mask": batch["loss_mask"] * 0}

    subject = subjects.subject(subjects.config(data), change_batch=silent)
    assert not np.asarray(subject.batches[0]["loss_mask"]).any()
    _, records = trial.train(subject, 2, evaluate=False)
    assert [record["train/empty_batch"] for record in records] == [1, 1]


def test_series_of_a_curve_that_falls_and_one_that_is_flat():
    records = [{"step": i, "train/loss": 3 - 0.1 * i, "train/flat": 2.0, "eval/loss": 1.0} for i in range(1, 13)]
    signals = series.signals(records)
    assert signals["loss.trend"] < -1
    assert signals["flat.trend"] == signals["flat.rise"] == 0
    assert signals["loss.first"] == pytest.approx(2.8)
    assert signals["loss.last"] == pytest.approx(1.9)
    assert signals["loss.peak"] == 0
    assert signals["eval/loss.last_over_first"] == 1
    spoilt = series.signals([*records, {"step": 13, "train/loss": float("nan")}])
    assert spoilt["loss.nonfinite"] == pytest.approx(1 / 13)
    assert spoilt["loss.first"] == signals["loss.first"]
