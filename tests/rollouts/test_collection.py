"""A rollout's groups: which prompts are replaced, what rewards say, and what is reported."""

import types

import numpy as np
import pytest

from research.models.sampling import SamplingConfig
from research.rollouts import collection
from research.rollouts.advantages import AdvantageSpec
from research.rollouts.collection import Clock, Collector, Judge
from research.rollouts.credit import Credit
from research.rollouts.engines.types import Answers
from research.rollouts.rewards import Entry, judging
from research.sources.prompts import Prompt

LETTERS = "abcdefgh"


class Engine:
    """Answers prompt number i with i and the answer's number, and then with 2, the end; the last answer is cut off."""

    def __init__(self):
        self.calls = []

    def generate(self, prompts, n, sampling, key):
        self.calls.append((len(prompts), n, sampling.temperature, tuple(key)))
        numbers = [[int(prompt[0]), j, 2 if j < n - 1 or n == 1 else 0] for prompt in prompts for j in range(n)]
        tokens, size = np.array(numbers, np.int32), len(numbers)
        lengths = np.where(tokens[:, 2] == 2, 3, 2).astype(np.int32)
        log_probs = np.full((size, 3), -1.0, np.float32)
        return Answers(tokens, lengths, log_probs, tokens[:, 2] == 2, np.zeros(size, np.int32))

    def report(self):
        return {}


class Prompts:
    def read(self, first, count):
        return [
            Prompt(np.array([i], np.int32), LETTERS[i % 8], {"number": i}, str, 0) for i in range(first, first + count)
        ]


class FakeJudge:
    """Two rewards: of even prompts the number of the answer, of odd ones 1; and of answer 0 a failure, else 5."""

    names = ("number", "five")
    weights = np.array([1.0, 0.0])

    def __call__(self, prompts, answers, n):
        number = np.arange(n, dtype=np.float32)
        first = np.stack([number if p.record["number"] % 2 == 0 else np.ones(n, np.float32) for p in prompts])
        second = np.broadcast_to(np.where(number == 0, np.nan, 5.0), first.shape)
        return np.stack([first, second], axis=2).astype(np.float32), np.isnan(
            np.stack([number + 0 * first, second], axis=2)
        )


def collector(rounds=0, kind="group", truncated="train"):
    return Collector(
        Prompts(), Engine(), FakeJudge(), SamplingConfig(3, 1.0), AdvantageSpec(kind, scale="none"), 4, 3, rounds,
        truncated,
    )  # fmt: skip


def numbers(groups):
    return [group.prompt.record["number"] for group in groups]


@pytest.mark.parametrize(
    ("rounds", "kept", "place", "filtered"),
    [(0, [10, 11, 12, 13], 14, None), (1, [10, 12, 14, 11], 16, 3 / 6), (5, [10, 12, 14, 16], 17, 3 / 7)],
)
def test_prompts_whose_answers_agree_are_replaced_up_to_a_bound(rounds, kept, place, filtered):
    own = collector(rounds)
    groups, after, metrics = own.collect(10, (0, 1), Clock())
    assert numbers(groups) == kept
    assert after == place
    if filtered is None:
        assert "rollout/filtered" not in metrics
    else:
        total, weight = metrics["rollout/filtered"]
        assert total / weight == filtered
        assert metrics["rollout/agreeing"] == (total, weight)  # of those that are replaced too
    keys = [key for *_, key in own.engine.calls]
    assert len(set(keys)) == len(keys)


def test_what_is_reported():
    own = collector()
    groups, _, _ = own.collect(0, (0, 1), Clock())
    out = {name: total / weight for name, (total, weight) in collection.metrics(groups, own).items()}
    assert out["reward"] == 1.0  # 0, 1, 2 of two prompts, and 1 of the others
    assert out["reward/deviation"] == pytest.approx(np.sqrt(4 / 12))
    assert out["reward/five"] == 5.0
    assert out["reward/five/deviation"] == 0.0
    assert out["reward/five/unjudged"] == out["reward/five/failed"] == pytest.approx(1 / 3)
    assert out["reward/number/failed"] == 0.0
    assert out["reward/unjudged"] == 0.0
    assert out["rollout/tokens"] == pytest.approx(8 / 3)
    assert out["rollout/truncated"] == pytest.approx(1 / 3)
    assert out["rollout/agreeing"] == 0.5


def test_a_greedy_answer_is_asked_for_where_a_baseline_is_its_reward():
    own = collector(kind="greedy")
    groups, _, _ = own.collect(0, (0, 1), Clock())
    assert [call[1:3] for call in own.engine.calls] == [(3, 1.0), (1, 0.0)]
    np.testing.assert_array_equal([group.greedy[0] for group in groups], [0, 1, 0, 1])
    assert np.isnan(collector().collect(0, (0, 1), Clock())[0][0].greedy).all()


@pytest.mark.parametrize("truncated", ["train", "leave_out"])
def test_advantages_of_a_rollout(truncated):
    groups, _, _ = collector(truncated=truncated).collect(0, (0, 1), Clock())
    rows = {"loss_mask": np.tile(np.array([0, 1, 1], np.float32), (12, 1))}
    credit = Credit(AdvantageSpec("group", scale="none"), FakeJudge.weights, truncated)
    out, carry, _ = credit(groups, rows, credit.init())
    want = [-1, 0, 1] if truncated == "train" else [-0.5, 0.5, 0]  # the last answer was cut off
    np.testing.assert_allclose(out["advantage"][:3], np.array(want)[:, None] * [1, 1, 0])
    np.testing.assert_array_equal(out["advantage"][3:6], 0)
    assert carry["average"][0] / carry["average"][1] == pytest.approx(1.0 if truncated == "train" else 0.75)


def test_of_several_processes_each_judges_its_groups(monkeypatch):
    """What a process doesn't judge is taken from the one that does."""
    seen = []

    def rewards(samples):
        numbers = np.array([[sample.record["number"] for sample in samples]], np.float32)
        seen.append(numbers[0].tolist())
        return judging.Judged(("a",), np.ones(1, np.float32), numbers, numbers == 1)

    rewards.entries = (Entry("a", "exact_match"),)
    own, prompts = Judge(rewards), Prompts().read(0, 3)
    answers = Engine().generate([prompt.tokens for prompt in prompts], 2, SamplingConfig(3), (0, 1))
    alone = own(prompts, answers, 2)
    np.testing.assert_array_equal(alone[0][:, :, 0], [[0, 0], [np.nan, np.nan], [2, 2]])
    np.testing.assert_array_equal(alone[1][:, :, 0], [[False] * 2, [True] * 2, [False] * 2])
    parts, gather = [], types.SimpleNamespace(process_allgather=lambda x: parts.append(x) or np.stack([x, x]))
    monkeypatch.setattr(collection, "multihost_utils", gather)
    monkeypatch.setattr(collection.jax, "process_count", lambda: 2)
    for process in range(2):
        monkeypatch.setattr(collection.jax, "process_index", lambda process=process: process)
        own(prompts, answers, 2)
    assert seen[1:] == [[0, 0, 2, 2], [1, 1]]
    gather.process_allgather = lambda x: np.stack(parts[:2])
    for found, want in zip(own(prompts, answers, 2), alone, strict=True):
        np.testing.assert_array_equal(found, want)
