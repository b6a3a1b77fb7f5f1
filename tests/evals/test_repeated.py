import itertools
import math

import jax
import numpy as np
import pytest
import table_models

from research.errors import InputError
from research.evals import repeated, results, tasks
from research.evals.repeated import Answers
from research.sources.tokenizers import TokenizerSpec, make_tokenizer

TOKENIZER = make_tokenizer(TokenizerSpec("byte"), lambda: iter(()))
V = TOKENIZER.size


@pytest.mark.parametrize(("n", "right"), [(1, 0), (1, 1), (5, 0), (5, 2), (5, 5), (7, 1)])
def test_pass_at_k_is_the_mean_over_all_choices_of_k(n, right):
    answers = [True] * right + [False] * (n - right)
    for k in range(1, n + 1):
        choices = list(itertools.combinations(answers, k))
        assert repeated.pass_at(k, n, right) == pytest.approx(sum(map(any, choices)) / len(choices), abs=1e-12)


def test_pass_at_k_of_many_answers_and_of_none():
    assert repeated.pass_at(100, 1000, 10) == pytest.approx(1 - math.comb(990, 100) / math.comb(1000, 100))
    for k, n, right in ((0, 3, 1), (4, 3, 1), (1, 3, 4), (1, 3, -1)):
        with pytest.raises(ValueError, match="no such numbers"):
            repeated.pass_at(k, n, right)


def _answers(right, n, task=""):
    return Answers("p", "e", ["x"] * n, [True] * right + [False] * (n - right), task)


def test_metrics_and_their_intervals():
    answers = [_answers(0, 5, "a"), _answers(1, 5, "a"), _answers(5, 5, "b"), _answers(5, 5, "b")]
    metrics = repeated.measure(answers)
    averages, at_2 = np.array([0, 0.2, 1, 1]), np.array([0, 1 - 6 / 10, 1, 1])
    assert metrics["avg@5"] == pytest.approx(averages.mean())
    assert metrics["avg@5_stderr"] == pytest.approx(averages.std(ddof=1) / 2)
    assert metrics["pass@2"] == pytest.approx(at_2.mean())
    assert metrics["pass@2_stderr"] == pytest.approx(at_2.std(ddof=1) / 2)
    assert {name for name in metrics if "/" not in name and "_" not in name} == {"avg@5", "pass@2", "pass@4", "pass@5"}
    assert (metrics["avg@5/a"], metrics["pass@5/a"], metrics["avg@5/b"]) == pytest.approx((0.1, 0.5, 1))
    result = results.Result(metrics, [each._asdict() for each in answers])
    low, high = results.interval("avg@5", result)
    assert (low, high) == pytest.approx((0.55 - 1.96 * metrics["avg@5_stderr"], 1))  # held within 0 and 1
    assert results.interval("avg@5/b", result) == results.wilson(2, 2)  # an error of 0 is no certainty
    assert "pass@4" in results.table({"x": result})


def test_a_task_with_several_samples(tmp_path):
    """A model whose answer is right half of the time."""
    path = tmp_path / "x.jsonl"
    path.write_text('{"prompt": "p", "response": "a"}\n' * 4)
    model, table = table_models.make(V, scale=math.log(V - 1)), table_models.answering(TOKENIZER, "a")
    name, evaluate = tasks.load(f"exact_match,samples=64,max_new_tokens=1:{path}", model, TOKENIZER, "chat")
    metrics, samples = evaluate(table, jax.random.key(0))
    assert name == "x"
    assert [len(each.completions) for each in samples] == [64] * 4
    assert len({tuple(each.correct) for each in samples}) == 4  # each is drawn by itself
    assert metrics["avg@64"] == pytest.approx(0.5, abs=5 * 0.5 / 16)
    assert metrics["pass@2"] == pytest.approx(0.75, abs=0.15)
    assert metrics["pass@64"] == 1
    assert metrics["skipped_too_long"] == 0
    assert "exact_match" not in metrics
    right = sum(samples[0].correct)
    assert str(samples[0]).endswith(f"({right} of 64 right, expected 'a')")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("samples=0", "samples=0: must be a whole number, at least 1"),
        ("samples=2,temperature=0", "temperature=0: all 2 samples of a prompt would be the same"),
        ("temperature=nan", "temperature=nan: must be a number, at least 0"),
        ("temperature=x", "temperature=x: must be a number"),
    ],
)
def test_bad_options(tmp_path, options, message):
    (tmp_path / "x.jsonl").write_text('{"prompt": "p", "response": "a"}\n')
    with pytest.raises(InputError, match=message):
        tasks.load(f"exact_match,{options}:{tmp_path}/x.jsonl", table_models.make(V), TOKENIZER, "chat")
