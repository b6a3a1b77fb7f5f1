"""Generated pairs of answers to the prompts of tasks, of which a planted utility says which is better.

An answer is the right one or a wrong one, with or without some words in front and behind:

    prompt    reverse: olleh
    chosen    Here you are: hello       utility 2 + 0.5       = 2.5
    rejected  Um, h_llo, I guess        utility 0.8 - 0.5 - 1 = -0.7

A wrong answer lacks some of its characters, which a reward model sees at a glance, or, in "subtle" preferences, has
others in their place, so that it must be compared with the prompt. Answers vary in length, and the longer one is the
better one in about half of the pairs. A share of the labels is flipped, whatever the utilities are: no reward model can
agree with more of them than the rest, the Bayes rate. Nothing is downloaded.
"""

import random
import re
import string
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from research.errors import InputError
from research.sources import tasks

PREFIX = "preferences:"
RIGHT, WRONG = 2.0, 1.0  # of a right answer; of a wrong one, times how close it comes
FRONTS = {"Here you are: ": 0.5, "": 0.0, "Um, ": -0.5, "Everybody knows: ": -1.0}
BACKS = {", as you can check.": 0.5, "": 0.0, "!!!": -0.5, ", I guess": -1.0}
GAP = 0.4  # the least difference of the utilities of a pair: none ties
BLANK = "_"
_SHARE_RIGHT = 0.5
_SUBTLE = "/subtle"


class Name(NamedTuple):
    """What the name of generated preferences says.

    Attributes:
      task: of sources.tasks, with its level: "reverse/2".
      flip: the share of pairs whose label is flipped.
      subtle: whether wrong answers have wrong characters, and not blanks.
    """

    task: str
    flip: float
    subtle: bool


def parse(name: str) -> Name:
    """Reads TASK[/LEVEL][/FLIP][/subtle], as in "reverse/2/0.1": FLIP has a decimal point, or is 0.

    Raises:
      InputError: there is no such task or level, or FLIP isn't a share up to a half.
    """
    base, *rest = name.removesuffix(_SUBTLE).split("/")
    flips = [part for part in rest if "." in part or part == "0"]
    levels = [part for part in rest if part not in flips]
    if len(flips) > 1 or len(levels) > 1 or rest != [*levels, *flips]:
        raise InputError(f"preferences {name!r}: isn't TASK[/LEVEL][/FLIP][/subtle], as in {PREFIX}reverse/2/0.1.")
    task = "/".join([base, *levels])
    tasks.parse(task)
    if flips and not (re.fullmatch(r"0|0?\.\d+", flips[0]) and float(flips[0]) <= 0.5):
        raise InputError(f"preferences {name!r}: {flips[0]!r} is no share of labels to flip. Use 0.0 to 0.5.")
    return Name(task, float(flips[0]) if flips else 0.0, name.endswith(_SUBTLE))


def records(name: str, count: int, seed: int) -> Iterator[dict[str, Any]]:
    """Yields `count` pairs, fixed by the task and the seed; the first n don't depend on `count`.

    A record has `prompt`, `chosen` and `rejected`; and what no model reads: `right`, a right answer; `flipped`, whether
    the rejected one is in truth the better; and `task`. Pairs of another share of flipped labels are the same pairs,
    and what is flipped at a smaller share is flipped at a greater one.

    Args:
      name: see `parse`.
      count, seed: how many records, and of the random draws.

    Raises:
      InputError: see `parse`.
    """
    task, flip, subtle = parse(name)
    base, level = tasks.parse(task)
    for number in range(count):
        rng = random.Random(f"preferences/{task}/{seed}/{number}")  # a string seeds alike in every process
        prompt, right = tasks.TASKS[base].generate(rng, level)
        better, worse = _pair({"prompt": prompt, "right": right, "task": PREFIX + task}, rng, subtle)
        flipped = rng.random() < flip
        chosen, rejected = (worse, better) if flipped else (better, worse)
        said = {"prompt": prompt, "chosen": chosen, "rejected": rejected}
        yield {**said, "right": right, "flipped": flipped, "task": f"{PREFIX}{name}"}


def utility(record: Mapping[str, Any], answer: str) -> float:
    """How good an answer to a record's prompt is, be it one of its own or any other, such as a model's.

    Words of FRONTS and BACKS around it count once each, as they say. What is left counts RIGHT where the verifier of
    the task accepts it, else WRONG times its likeness to the right answer: 1 less the share of characters that must be
    changed. So no answer has more than 3 or less than -2.

    Args:
      record: of `records`.
      answer: a text; white space around it is ignored.
    """
    task = parse(record["task"].removeprefix(PREFIX)).task
    front, body, back = _parts(answer)
    value = FRONTS[front] + BACKS[back]
    if tasks.verify(task, record["prompt"], record["right"], body):
        return value + RIGHT
    return value + WRONG * likeness(body, record["right"])


def verify(record: Mapping[str, Any], answer: str) -> bool:
    """Whether an answer is right, whatever the words around it."""
    task = parse(record["task"].removeprefix(PREFIX)).task
    return tasks.verify(task, record["prompt"], record["right"], _parts(answer)[1])


def likeness(a: str, b: str) -> float:
    """1 less the edit distance (insertions, deletions, replacements) of two texts by the length of the longer one."""
    row = list(range(len(b) + 1))
    for i, x in enumerate(a, start=1):
        before, row[0] = row[0], i
        for j, y in enumerate(b, start=1):
            before, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, before + (x != y))
    return 1 - row[-1] / max(len(a), len(b), 1)


def _parts(answer: str) -> tuple[str, str, str]:
    """The words in front, what is the answer proper, and the words behind."""
    answer = answer.strip()
    front = next(front for front in sorted(FRONTS, key=len, reverse=True) if answer.startswith(front))
    answer = answer[len(front) :]
    back = next(back for back in sorted(BACKS, key=len, reverse=True) if answer.endswith(back))
    return front, answer[: len(answer) - len(back)].strip(), back


def _pair(record: Mapping[str, Any], rng: random.Random, subtle: bool) -> tuple[str, str]:
    """Two answers, the better first."""
    while True:
        drawn = [_answer(record["right"], rng, subtle) for _ in range(2)]
        worse, better = sorted((utility(record, answer), answer) for answer in drawn)
        if better[0] - worse[0] >= GAP:
            return better[1], worse[1]


def _answer(right: str, rng: random.Random, subtle: bool) -> str:
    body = right if rng.random() < _SHARE_RIGHT else _damaged(right, rng, subtle)
    return rng.choice(list(FRONTS)) + body + rng.choice(list(BACKS))


def _damaged(right: str, rng: random.Random, subtle: bool) -> str:
    """A wrong answer: about half of its letters and digits are blanks, or others of their kind."""
    places = [i for i, char in enumerate(right) if char in string.ascii_letters + string.digits]
    signs = list(right)
    for i in rng.sample(places, max(1, round(len(places) * rng.uniform(0.2, 0.8)))):
        kind = next(k for k in (string.digits, string.ascii_lowercase, string.ascii_uppercase) if right[i] in k)
        signs[i] = rng.choice(kind.replace(right[i], "")) if subtle else BLANK
    return "".join(signs)
