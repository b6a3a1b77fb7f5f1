"""Generated prompt-response tasks of graded difficulty, each with a verifier; nothing is downloaded.

A task is named `NAME` or `NAME/LEVEL`, as in `reverse/2`; words and numbers grow with the level. A verifier
judges what a model wrote: where several answers are right it accepts each of them, not the stored one alone.
"""

import random
import re
import string
from collections.abc import Callable, Iterator
from typing import NamedTuple

from research.errors import InputError, did_you_mean

Generate = Callable[[random.Random, int], tuple[str, str]]


class Task(NamedTuple):
    """A family of prompts.

    Attributes:
      generate: (rng, level) -> (prompt, response).
      verify: (prompt, response, completion) -> is the completion right? It has no white space around it.
      max_level: the highest level; the lowest is 1.
    """

    generate: Generate
    verify: Callable[[str, str, str], bool]
    max_level: int = 8


def records(name: str, count: int, seed: int) -> Iterator[dict[str, str]]:
    """Yields `count` records {"prompt", "response", "task"} of the task `name`, fixed by name and seed.

    The first n records don't depend on `count`. Prompts may repeat.

    Raises:
      InputError: no such task, or it has no such level.
    """
    base, level = parse(name)
    rng = random.Random(f"{base}/{level}/{seed}")  # A string seeds alike in every process.
    for _ in range(count):
        prompt, response = TASKS[base].generate(rng, level)
        yield {"prompt": prompt, "response": response, "task": name}


def verify(task: str, prompt: str, response: str, completion: str) -> bool:
    """Whether `completion` is a right answer to `prompt`; white space around it is ignored.

    Raises:
      InputError: no such task, or it has no such level.
    """
    base, _ = parse(task)
    return TASKS[base].verify(prompt, response, completion.strip())


def parse(name: str) -> tuple[str, int]:
    """The task and the level that a name says. Raises InputError where there is no such task or level."""
    base, slash, level = name.partition("/")
    if base not in TASKS:
        raise InputError(f"task {name!r}: there is no {base!r}.{did_you_mean(base, TASKS)}")
    levels = [str(n) for n in range(1, TASKS[base].max_level + 1)]
    if slash and level not in levels:
        raise InputError(f"task {name!r}: {level!r} is not a level. Use {base}/1 to {base}/{levels[-1]}.")
    return base, int(level) if slash else 1


def _length(rng: random.Random, level: int) -> int:
    return rng.randint(3 * level, 3 * level + 2)


def _on_word(ask: str, answer: Callable[[str], str]) -> Generate:
    def generate(rng: random.Random, level: int) -> tuple[str, str]:
        word = "".join(rng.choices(string.ascii_lowercase, k=_length(rng, level)))
        return f"{ask}: {word}", answer(word)

    return generate


def _on_word_and_letter(ask: str, answer: Callable[[str, str], str]) -> Generate:
    def generate(rng: random.Random, level: int) -> tuple[str, str]:
        letters = rng.sample(string.ascii_lowercase, 4)  # Few, so that they repeat; two are always there.
        word = letters[:2] + rng.choices(letters, k=_length(rng, level) - 2)
        rng.shuffle(word)
        return f"{ask} {letters[0]}: {''.join(word)}", answer("".join(word), letters[0])

    return generate


def _two_numbers(rng: random.Random, level: int) -> list[int]:
    """Two different numbers of level + 1 digits."""
    return rng.sample(range(10**level, 10 ** (level + 1)), 2)


def _operands(rng: random.Random, level: int) -> list[int]:
    """A number of up to max(2, level) digits and one of up to `level`, in either order."""
    operands = [rng.randrange(10 ** max(2, level)), rng.randrange(10**level)]
    rng.shuffle(operands)
    return operands


def _compare(rng: random.Random, level: int) -> tuple[str, str]:
    a, b = _two_numbers(rng, level)
    return f"larger: {a} or {b}", str(max(a, b))


def _addition(rng: random.Random, level: int) -> tuple[str, str]:
    a, b = _operands(rng, level)
    return f"{a} + {b} =", str(a + b)


def _subtraction(rng: random.Random, level: int) -> tuple[str, str]:
    b, a = sorted(_operands(rng, level))
    return f"{a} - {b} =", str(a - b)


def _sort_numbers(rng: random.Random, level: int) -> tuple[str, str]:
    numbers = [rng.randrange(100) for _ in range(level + 2)]
    return f"sort numbers: {' '.join(map(str, numbers))}", " ".join(map(str, sorted(numbers)))


def _between(rng: random.Random, level: int) -> tuple[str, str]:
    low, high = sorted(_two_numbers(rng, level))
    if high - low == 1:
        return _between(rng, level)
    return f"between {low} and {high}:", str(rng.randrange(low + 1, high))


def _is_between(prompt: str, response: str, completion: str) -> bool:
    low, high = map(int, re.findall("[0-9]+", prompt))
    number = _number(completion)
    return number is not None and low < number < high


def _number(text: str) -> int | None:
    return int(text) if re.fullmatch("[+-]?[0-9]{1,99}", text) else None


def _same_number(prompt: str, response: str, completion: str) -> bool:
    return _number(completion) == int(response)


def _same_sequence(prompt: str, response: str, completion: str) -> bool:
    return [_number(word) for word in completion.split()] == [int(word) for word in response.split()]


def _same_text(prompt: str, response: str, completion: str) -> bool:
    return completion == response


def _sorted_word(word: str) -> str:
    return "".join(sorted(word))


TASKS = {
    "copy": Task(_on_word("copy", str), _same_text),  # repeat a word
    "reverse": Task(_on_word("reverse", lambda word: word[::-1]), _same_text),  # spell a word backwards
    "upper": Task(_on_word("upper", str.upper), _same_text),  # write a word in capitals
    "sort_letters": Task(_on_word("sort letters", _sorted_word), _same_text),  # sort the letters of a word
    "sort_numbers": Task(_sort_numbers, _same_sequence),  # sort level + 2 numbers below 100
    "compare": Task(_compare, _same_number),  # the larger of two numbers of level + 1 digits
    "addition": Task(_addition, _same_number),  # add numbers of `level` digits (one has two at level 1)
    "subtraction": Task(_subtraction, _same_number),  # subtract the smaller number, sizes as in addition
    # how often a letter is in a word
    "count_letter": Task(
        _on_word_and_letter("count", lambda word, letter: str(word.count(letter))),
        _same_number,
    ),
    # a word without one of its letters
    "delete_letter": Task(
        _on_word_and_letter("delete", lambda word, letter: word.replace(letter, "")),
        _same_text,
    ),
    "between": Task(_between, _is_between),  # any whole number between two of level + 1 digits
}
