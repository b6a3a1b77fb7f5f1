"""Completions that are worth learning from, as records of prompts and answers or of preferences."""

import dataclasses
import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from research import files
from research.errors import InputError, located
from research.sources import entries, records, verification

_ADDED = ("completion", "completions", "tokens", "logprob")  # what `understudy generate` adds to a record
_REWARDS = ("reward", "rewards", "reward_std", "rewards_std")  # and `understudy score --reward`


class Answer(NamedTuple):
    """One completion of a record.

    Attributes:
      where: the record's place, for errors.
      record: as it came.
      number: of the record in the file.
      text: what the model wrote.
      tokens: how many.
      logprob: of all of them.
      reward: None where nothing says it.
    """

    where: str
    record: Mapping[str, Any]
    number: int
    text: str
    tokens: int
    logprob: float
    reward: float | None


@dataclasses.dataclass(frozen=True)
class Selection:
    """Which completions to keep. All conditions hold.

    Attributes:
      ended: none of at least so many tokens, which were cut off there; 0 drops none of them.
      verified: those alone that the record's task, or its `response`, says are right.
      min_reward: those alone whose reward is at least this; None for any.
      best: of each record the one with the highest reward.
      pairs: of each record the one with the highest and the one with the lowest reward, as a preference.
      keep: the share of the rest, those likeliest per token first; in (0, 1].
    """

    ended: int = 0
    verified: bool = False
    min_reward: float | None = None
    best: bool = False
    pairs: bool = False
    keep: float = 1.0

    @property
    def by_reward(self) -> bool:
        """Whether each answer needs a reward."""
        return self.best or self.pairs or self.min_reward is not None

    def fault(self, answer: Answer) -> str:
        """Why a completion is of no use; "" where it is of use. Raises InputError where nothing says it."""
        if not answer.text.strip():
            return "empty"
        if self.ended and answer.tokens >= self.ended:
            return "cut off"
        if self.verified:
            if "response" not in answer.record:
                raise InputError(f"{answer.where}: --verified needs the right answer, `response`, beside each prompt.")
            if not verification.verify_record(answer.record, answer.text):
                return "wrong"
        if self.by_reward and (answer.reward is None or math.isnan(answer.reward)):
            return "not judged"
        if self.min_reward is not None and answer.reward < self.min_reward:
            return "of a lower reward"
        return ""


def read(data: str) -> list[Answer]:
    """The completions of a file as `understudy generate --output` writes it, perhaps with rewards.

    Raises:
      InputError: the file or a record is at fault.
    """
    answers: list[Answer] = []
    for number, (where, raw) in enumerate(entries.locate_flag(data).read()):
        with located(where):
            answers.extend(_answers(where, records.parse(raw), number))
    return answers


def select(answers: Sequence[Answer], selection: Selection, output: Path) -> str:
    """Writes those that are to be kept as the answers to their prompts. Returns a line that says how many those are.

    Args:
      answers: of a file.
      selection: which of them.
      output: the JSON lines to write.

    Raises:
      InputError: a record is at fault, or nothing is left.
    """
    good, dropped = [], Counter[str]()
    for answer in answers:
        fault = selection.fault(answer)
        if fault:
            dropped[fault] += 1
        else:
            good.append(answer)
    if selection.pairs:
        lines = _pairs(good, dropped)
    else:
        if selection.best:
            good = _best(good, dropped)
        lines = [files.json_line(_answered(answer)) for answer in _likeliest(good, selection.keep, dropped)]
    counts = ", ".join(f"{n} {reason}" for reason, n in dropped.items() if n)
    if not lines:
        raise InputError(f"--data: nothing is left ({counts or 'it is empty'}).")
    files.write_bytes(output, b"".join(lines))
    return f"{len(lines):,} records kept, dropped: {counts or 'none'}"


def _answers(where: str, record: Mapping[str, Any], number: int) -> Iterator[Answer]:
    """The completions of a record. Raises InputError where they aren't as `understudy generate` writes them."""
    several = "completions" in record
    names = ("completions" if several else "completion", "tokens", "logprob", "rewards" if several else "reward")
    if not set(names[:3]) <= record.keys():
        lacking = next(name for name in names[:3] if name not in record)
        wanted = f"{', '.join(names[:3])} beside the prompt"
        raise InputError(f"has no {lacking}. Give what `understudy generate --output` wrote: {wanted}.")
    _check_rest(record)
    columns = [record[name] for name in names[:3]]
    columns.append(record.get(names[3], [None] * len(columns[0]) if several and isinstance(columns[0], list) else None))
    if not several:
        columns = [[column] for column in columns]
    if not all(isinstance(column, list) and len(column) == len(columns[0]) for column in columns):
        raise InputError(f"{', '.join(names)}: must be lists of one length. Give what `understudy generate` wrote.")
    for text, tokens, logprob, reward in zip(*columns, strict=True):
        fits = (
            isinstance(text, str),
            isinstance(tokens, list) and (bool(tokens) or not text),
            _is_number(logprob),
            reward is None or _is_number(reward),
        )
        for name, value, good in zip(names, (text, tokens, logprob, reward), fits, strict=True):
            if not good:
                raise _unlike_written(name, value)
        yield Answer(where, record, number, text, len(tokens), logprob, reward)


def _check_rest(record: Mapping[str, Any]) -> None:
    """Raises InputError where a field beside the completions isn't as `understudy generate` writes it."""
    if not isinstance(record.get("response", ""), str):
        raise _unlike_written("response", record["response"])
    messages = record.get("messages", [{}])
    if not (isinstance(messages, list) and messages and all(isinstance(each, dict) for each in messages)):
        raise _unlike_written("messages", messages)


def _unlike_written(name: str, value: Any) -> InputError:
    shown = f"{value!r:.40}"
    return InputError(f"{name} = {shown}: isn't what `understudy generate --output` writes. Mend it.")


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and math.isfinite(value)


def _by_record(answers: Sequence[Answer]) -> list[list[Answer]]:
    groups: dict[int, list[Answer]] = {}
    for answer in answers:
        groups.setdefault(answer.number, []).append(answer)
    return list(groups.values())


def _best(answers: Sequence[Answer], dropped: Counter[str]) -> list[Answer]:
    """Of each record the first of those with the highest reward."""
    best = [max(group, key=lambda answer: answer.reward) for group in _by_record(answers)]
    dropped["not the best"] += len(answers) - len(best)
    return best


def _likeliest(answers: Sequence[Answer], keep: float, dropped: Counter[str]) -> list[Answer]:
    """The share of answers that are likeliest per token, in their order."""
    likelihood = np.array([answer.logprob / answer.tokens for answer in answers])
    first = np.argsort(-likelihood, kind="stable")[: int(np.ceil(keep * len(answers)))]
    dropped["unlikely"] += len(answers) - len(first)
    return [answers[i] for i in sorted(first.tolist())]


def _pairs(answers: Sequence[Answer], dropped: Counter[str]) -> list[bytes]:
    """A preference of each record whose best and worst answers differ."""
    lines = []
    for group in _by_record(answers):
        best, worst = (pick(group, key=lambda answer: answer.reward) for pick in (max, min))
        used = 2 if best.reward > worst.reward else 0
        dropped["neither best nor worst" if used else "of equal rewards"] += len(group) - used
        if used:
            lines.append(files.json_line(_preference(best, worst)))
    return lines


def _preference(best: Answer, worst: Answer) -> dict[str, Any]:
    """A record of the format `preference`, with the rewards as scores."""
    rest = _rest(best.record)
    prompt = rest.pop("messages") if "messages" in rest else rest.get("prompt")
    if prompt is None:
        raise InputError(f"{best.where}: has neither 'prompt' nor 'messages', and a preference is of answers to one.")
    scores = {"score_chosen": best.reward, "score_rejected": worst.reward}
    return {**rest, "prompt": prompt, "chosen": best.text, "rejected": worst.text, **scores}


def _answered(answer: Answer) -> dict[str, Any]:
    """The record with its completion as the answer."""
    rest = _rest(answer.record)
    if "messages" not in rest:
        return {**rest, "response": answer.text}
    return {**rest, "messages": [*rest["messages"], {"role": "assistant", "content": answer.text}]}


def _rest(record: Mapping[str, Any]) -> dict[str, Any]:
    """The record without what was added, and without the answer that it came with."""
    rest = {name: value for name, value in record.items() if name not in (*_ADDED, *_REWARDS, "response")}
    messages = rest.get("messages", [{}])
    if messages[-1].get("role") == "assistant":
        rest["messages"] = messages[:-1]
    return rest
