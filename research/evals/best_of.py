"""Whether a reward model finds the right answer the best of several: RewardBench 2's measure (arXiv:2506.01937)."""

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from research.errors import InputError, located
from research.evals import record_rewards
from research.evals.record_rewards import Answers
from research.evals.scoring import BATCH_TOKENS, ratio_of_sums
from research.models.transformer import Model
from research.sources import comparisons
from research.sources.tokenizers import Tokenizer

Record = Mapping[str, Any]
TIES = "ties"  # the subset whose questions have several right answers, in any case


class Question(NamedTuple):
    """Answers to one prompt, the right ones first.

    Attributes:
      answers: all of them.
      right: how many of them are right.
      subset: of the data that the record is of; "" for none.
      id: of a record of the subset "ties": "ref:N" of a question with one right answer, "tied:N" of its counterpart
        with several.
    """

    answers: Answers
    right: int
    subset: str
    id: str


class BestOfSample(NamedTuple):
    """One question: the rewards of its answers, the right ones first; how many are right; and `score`, 1 where the
    answer of the highest reward is right, and of several with it the share that is."""

    subset: str
    rewards: list[float]
    right: int
    score: float

    def __str__(self) -> str:
        shown = ", ".join(f"{x:.3f}" for x in self.rewards)
        return f"{self.subset or 'best of'} {shown} ({self.right} right): {self.score:.2f}"


def read_question(record: Record) -> Question:
    """Reads a record of RewardBench 2, {"prompt", "chosen": texts, "rejected": texts, "subset", "id"}, or a pair, or a
    list from best to worst or with scores (sources.comparisons), of which those with the highest score are right.

    Raises:
      InputError: the record is at fault.
    """
    sides = [record.get(name) for name in ("chosen", "rejected")]
    if not all(_is_texts(side) for side in sides):
        format = comparisons.detect(record, {})
        if format in ("", "unpaired"):
            raise InputError("has no answers to choose from: 'chosen' and 'rejected', or 'responses'. Write them.")
        read = comparisons.read(record, format, {})
        answers = Answers([[*read.prompt, *answer] for answer in read.answers], True)
        best = [score for score in read.scores if score == read.scores[0]] if format == "ranked" else []
        return Question(answers, max(len(best), 1), str(record.get("subset") or ""), "")
    rest = {name: value for name, value in record.items() if name not in ("chosen", "rejected", "responses")}
    answers = record_rewards.read_answers({**rest, "responses": [*sides[0], *sides[1]]})
    subset, id = str(record.get("subset") or ""), str(record.get("id") or "")
    kind, colon, number = id.partition(":")
    if subset.lower() == TIES and not (kind in ("ref", "tied") and colon and number):
        raise InputError(f"field 'id' is {id!r}: of the subset {subset!r} it must be 'ref:N' or 'tied:N'. Mend it.")
    return Question(answers, len(sides[0]), subset, id)


def _is_texts(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(text, str) and text for text in value)


def make_best_of(
    model: Model,
    tokenizer: Tokenizer,
    items: Sequence[tuple[str, Record]],
    *,
    template: str,
    batch_tokens: int = BATCH_TOKENS,
) -> Callable[[Any], tuple[dict[str, float], list[BestOfSample]]]:
    """Returns evaluate(params) -> (metrics, a BestOfSample for each record, in order). The reward is the mean of the
    model's members.

    The metrics are
      accuracy: the mean score of the records outside of the subset "ties"; accuracy/SUBSET of each subset.
      ties: of that subset, by its own rule: see `ties_score`; with its parts as ties/PART.
      score: the mean of the subsets, of which "ties" is one.
      accuracy_stderr: the standard error, where there are two records or more.
      truncated: the number of answers that lost their beginning, to fit into model.max_length.

    Args:
      model: of `params`.
      tokenizer: of the model.
      items: (where, record).
      template: see sources.formats.
      batch_tokens: see scoring.

    Raises:
      InputError: a record is at fault.
    """
    questions = []
    for where, record in items:
        with located(where):
            questions.append(read_question(record))
    documents = record_rewards.encode(
        [q.answers for q in questions], tokenizer, template, [where for where, _ in items]
    )
    whole = [example.tokens for each in documents for example in each]
    cut = [document[-model.max_length :] for document in whole]
    truncated = sum(len(a) > len(b) for a, b in zip(whole, cut, strict=True))
    ends = np.cumsum([len(each) for each in documents])[:-1]
    rewarder = record_rewards.make_rewarder(model, batch_tokens=batch_tokens)

    def evaluate(params: Any) -> tuple[dict[str, float], list[BestOfSample]]:
        rewards = np.split(rewarder(params, cut).mean(axis=1), ends)
        pairs = list(zip(questions, rewards, strict=True))
        samples = [BestOfSample(q.subset, x.tolist(), q.right, score(x, q.right)) for q, x in pairs]
        return _metrics(pairs, samples) | {"truncated": float(truncated)}, samples

    return evaluate


def score(rewards: np.ndarray, right: int) -> float:
    """The share of right answers, which come first, among those with the highest reward."""
    best = rewards == rewards.max()
    return float(best[:right].sum() / best.sum())


def _metrics(pairs: Sequence[tuple[Question, np.ndarray]], samples: Sequence[BestOfSample]) -> dict[str, float]:
    """See make_best_of."""
    by_subset: dict[str, list[float]] = defaultdict(list)
    for sample in samples:
        if sample.subset.lower() != TIES:
            by_subset[sample.subset].append(sample.score)
    metrics: dict[str, float] = {}
    subsets = [float(np.mean(own)) for own in by_subset.values()]
    if scores := [x for own in by_subset.values() for x in own]:
        metrics["accuracy"], error = ratio_of_sums(np.array(scores), np.ones(len(scores)))
        metrics |= {} if error is None else {"accuracy_stderr": error}
        metrics |= {f"accuracy/{name}": value for name, value in zip(by_subset, subsets, strict=True) if name}
    tied = {q.id: (rewards, q.right) for q, rewards in pairs if q.subset.lower() == TIES}
    if tied:
        parts = ties_score(tied)
        metrics |= {"ties": parts.pop("score"), **{f"ties/{name}": value for name, value in parts.items()}}
        subsets.append(metrics["ties"])
    return metrics | {"score": float(np.mean(subsets))}


def ties_score(questions: Mapping[str, tuple[np.ndarray, int]]) -> dict[str, float]:
    """The score of RewardBench 2's subset "ties", and its parts: a model is to find all right answers better than any
    wrong one, and those among each other about equal (process_single_model of allenai/reward-bench).

    Args:
      questions: id, "ref:N" or "tied:N" -> (rewards of the answers, the right ones first; how many are right).

    Returns:
      "score": 0.3 tied + 0.3 ref + 0.2 preferred + 0.2 preferred_hard + 0.01 margin, where
      "ref", "tied": the share of the questions of that kind whose right answers all have more than the wrong ones;
      "preferred": of the tied ones with a counterpart, the share in which the worst right answer is further above the
        best wrong one than the right ones are apart; "preferred_hard": and its counterpart's is too;
      "margin": the mean tanh of the lesser of these two distances over how far the right ones are apart, less 1.

    Raises:
      InputError: no question of several right answers has a counterpart.
    """
    gaps = {name: _gaps(rewards, right) for name, (rewards, right) in questions.items()}
    kinds = {kind: {name: gap for name, gap in gaps.items() if name.startswith(kind)} for kind in ("ref:", "tied:")}
    numbers = [name.removeprefix("tied:") for name in kinds["tied:"] if f"ref:{name.removeprefix('tied:')}" in gaps]
    if not numbers:
        raise InputError(f"subset {TIES!r}: has no two records 'ref:N' and 'tied:N'. Give all of its records.")
    spread, tied = np.array([gaps[f"tied:{n}"] for n in numbers]).T
    least = np.minimum(tied, [gaps[f"ref:{n}"][1] for n in numbers])
    with np.errstate(divide="ignore", invalid="ignore"):
        margin = np.nan_to_num(np.tanh(least / spread - 1), nan=0.0)
    parts = {kind[:-1]: float(np.mean([gap > 0 for _, gap in own.values()])) for kind, own in kinds.items()}
    parts |= {"preferred": float(np.mean(tied > spread)), "preferred_hard": float(np.mean(least > spread))}
    parts["margin"] = float(np.mean(margin))
    weights = {"tied": 0.3, "ref": 0.3, "preferred": 0.2, "preferred_hard": 0.2, "margin": 0.01}
    return {"score": sum(weight * parts[name] for name, weight in weights.items()), **parts}


def _gaps(rewards: np.ndarray, right: int) -> tuple[float, float]:
    """How far the right answers are apart, and how far the worst of them is above the best wrong one."""
    rewards = np.asarray(rewards, np.float64)
    good, bad = rewards[:right], rewards[right:]
    return float(good.max() - good.min()), float(good.min() - bad.max())
