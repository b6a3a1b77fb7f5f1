"""Whether a model finds the right answer of several the likeliest."""

import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from research.errors import InputError
from research.evals.scoring import (
    BATCH_TOKENS,
    Example,
    encode_pair,
    keep_end,
    make_loglikelihood,
    ratio_of_sums,
)
from research.models.transformer import Model
from research.sources.formats import render_prompt, resolve_template
from research.sources.tokenizers import Tokenizer

Record = Mapping[str, Any]

SHARES = ("acc", "acc_norm", "acc_bytes", "acc_tokens")  # the metrics that are shares of questions


class Question(NamedTuple):
    """A context, what may come after it, which of these is right, and the field that the context is from."""

    context: str
    choices: list[str]
    answer: int
    field: str = "question"


class ChoiceSample(NamedTuple):
    """One question and what the model makes of it: the log-likelihood of each choice, in nats, and the likeliest, by
    the sum (`chosen`) and by the mean over the choice's characters (`chosen_norm`); metric -> whether it is right."""

    question: str
    choices: list[str]
    answer: int
    loglikelihoods: list[float]
    chosen: int
    chosen_norm: int
    right: dict[str, bool]

    def __str__(self) -> str:
        verdict = "right" if self.chosen == self.answer else f"wrong, expected {self.choices[self.answer]!r}"
        return f"{self.question!r} -> {self.choices[self.chosen]!r} ({verdict})"


def read_question(record: Record) -> Question:
    """Reads {"question" or "prompt": text, "choices": list of texts, "answer": right one}.

    The answer is its text, its number from 0, or its letter from "A".

    Raises:
      InputError: the record is at fault.
    """
    field = "question" if "question" in record else "prompt"
    context = record.get(field)
    if not isinstance(context, str):
        raise InputError("has no text in 'question' or 'prompt'. Write it there.")
    choices = record.get("choices")
    if not isinstance(choices, list) or len(choices) < 2 or not all(isinstance(c, str) and c for c in choices):
        raise InputError("field 'choices' must be a list of two or more texts, none empty. Write it as one.")
    answer = record.get("answer")
    if isinstance(answer, str):
        letter = ord(answer) - ord("A") if len(answer) == 1 else -1
        answer = choices.index(answer) if answer in choices else letter
    if type(answer) is not int or not 0 <= answer < len(choices):
        last = len(choices) - 1
        raise InputError(
            f"field 'answer' is {record.get('answer')!r}, but must be one of the choices, 0 to {last}, or 'A' to "
            f"{chr(ord('A') + last)!r}. Mend it."
        )
    return Question(context, choices, answer, field)


def make_multiple_choice(
    model: Model,
    tokenizer: Tokenizer,
    records: Sequence[Record],
    *,
    template: str,
    batch_tokens: int = BATCH_TOKENS,
    where: Sequence[str] = (),
) -> Callable[[Any], tuple[dict[str, float], list[ChoiceSample]]]:
    """Returns evaluate(params) -> (metrics, a ChoiceSample for each question, in the order of `records`).

    The metrics are fractions of questions whose right choice has the greatest log-likelihood (the first of equals),
      acc: summed over its tokens.
      acc_norm: divided by its characters, as lm-evaluation-harness does.
      acc_bytes: divided by its UTF-8 bytes.
      acc_tokens: divided by its tokens: the mean.
      NAME_stderr: the standard error of each, where there are two questions or more.
      truncated: the number of questions whose context lost its beginning, to fit into model.max_length.

    Args:
      model: of `params`.
      tokenizer: of the model.
      records: see `read_question`.
      template: "plain" scores " CHOICE" right after the question, as text (scoring.encode_pair); under any other the
        question is what the user says, and CHOICE what the model begins to say.
      batch_tokens: see scoring.
      where: where each record is from, for errors; empty where that isn't known.

    Raises:
      InputError: a record is at fault.
    """
    questions = [read_question(record) for record in records]
    places = [f"{place}: " for place in where] or [""] * len(questions)
    whole = [
        [_encode(place, question, choice, tokenizer, template) for choice in question.choices]
        for place, question in zip(places, questions, strict=True)
    ]
    examples = [[keep_end(example, model.max_length) for example in choices] for choices in whole]
    truncated = sum(
        any(len(one.tokens) < len(other.tokens) for one, other in zip(short, long, strict=True))
        for short, long in zip(examples, whole, strict=True)
    )
    loglikelihood = make_loglikelihood(model, batch_tokens=batch_tokens)

    def evaluate(params: Any) -> tuple[dict[str, float], list[ChoiceSample]]:
        scores = iter(loglikelihood(params, [example for choices in examples for example in choices]))
        samples = [
            _sample(question, choices, np.array([score.logprob for score in itertools.islice(scores, len(choices))]))
            for question, choices in zip(questions, examples, strict=True)
        ]
        return _shares(samples) | {"truncated": float(truncated)}, samples

    return evaluate


def _sample(question: Question, examples: Sequence[Example], nats: np.ndarray) -> ChoiceSample:
    """A question of which the choices' log-likelihoods are known, in nats."""
    context, choices, answer, _ = question
    likeliest = _choose(choices, nats, np.array([float(example.count) for example in examples]))
    right = {name: i == answer for name, i in likeliest.items()}
    return ChoiceSample(context, choices, answer, nats.tolist(), likeliest["acc"], likeliest["acc_norm"], right)


def _shares(samples: Sequence[ChoiceSample]) -> dict[str, float]:
    """The share of right choices by each metric, and its standard error."""
    metrics = {}
    for name in samples[0].right if samples else ():
        right = np.array([float(sample.right[name]) for sample in samples])
        metrics[name], error = ratio_of_sums(right, np.ones(len(right)))
        if error is not None:
            metrics[f"{name}_stderr"] = error
    return metrics


def _choose(choices: Sequence[str], nats: np.ndarray, tokens: np.ndarray) -> dict[str, int]:
    """The choice with the greatest log-likelihood, by what it is divided by: see make_multiple_choice's metrics."""
    sizes = {
        "acc": np.ones(len(choices)),
        "acc_norm": np.array([float(len(choice)) for choice in choices]),
        "acc_bytes": np.array([float(len(choice.encode())) for choice in choices]),
        "acc_tokens": tokens,
    }
    return {name: int(np.argmax(nats / size)) for name, size in sizes.items()}


def _encode(place: str, question: Question, choice: str, tokenizer: Tokenizer, template: str) -> Example:
    """The choice after the question. Raises InputError, which begins with `place`, where there is no such thing."""
    try:
        if resolve_template(template, tokenizer) == "plain":
            return encode_pair(tokenizer, question.context, f" {choice}")
        if not question.context.strip():
            raise InputError(
                f"field {question.field!r} is empty, and a chat template puts a question. Write one, or use the "
                "template 'plain', which scores the choices as texts."
            )
        prompt = render_prompt({"prompt": question.context}, tokenizer, template)
    except InputError as error:
        raise InputError(f"{place}{error}") from error
    (ids,) = tokenizer.encode_stretches([choice], special=False, first=False)
    return Example(np.array(prompt + ids, np.int32), np.arange(len(prompt) + len(ids)) >= len(prompt))
