"""Every dataset of the package reasoning-gym (an extra), by name, with the package's own scorers.

A dataset is named `NAME` or `NAME?OPTION=VALUE&...`, as in `chain_sum?max_terms=3&max_digits=2`. The options
are the fields of its config in the package; commas part the values of a list.
"""

import ast
import contextlib
import dataclasses
import enum
import functools
import json
import math
import numbers
import os
import random
import subprocess
import sys
import typing
from collections.abc import Callable, Iterator
from typing import Any

from research.errors import InputError, did_you_mean

PREFIX = "reasoning_gym:"  # Of a record's task.
_CHUNK = 500  # Records per dataset object; fixed, since what some (acre) generate depends on their size.
_EXAMPLES = {  # These leave the answer out, as many are right, but show one in their metadata.
    "graph_color": "possible_answer",
    "propositional_logic": "example_answer",
    "rubiks_cube": "example_correct_answer",
}
_ANY_TEXT_SCORES = {"game_of_life_halting"}  # Its scorer does: compare with the answer instead.
EVALUATING = {  # Their scorers call eval, or sympy's parse_expr, which calls it, on the completion.
    "binary_matrix",
    "composite",  # of any others
    "countdown",
    "intermediate_integration",
    "n_queens",
    "polynomial_multiplication",
    "puzzle24",
    "simple_integration",
    "spiral_matrix",
    "string_insertion",
}


def records(name: str, count: int, seed: int) -> Iterator[dict[str, str]]:
    """Yields `count` records {"prompt", "response", "task", "entry"} of a dataset, fixed by name and seed.

    The first n records don't depend on `count`. Prompts may repeat. `entry` is the dataset's own record as a
    Python literal, for its scorer. A child process makes all records before the first is yielded: some
    datasets iterate over sets of strings, which only a fixed hash seed repeats, or draw from the global
    generator. The dataset codeio executes code snippets that the package ships.

    Raises:
      InputError: the package is not installed, has no such dataset or option, the dataset refuses a value, or
        it has no answers to learn from.
    """
    _dataset(name, seed=0, size=1)  # All that can be wrong with the name shows here, before a process starts.
    child = subprocess.run(
        [sys.executable, "-m", "research.sources.reasoning", name, str(count), str(seed)],
        env={**os.environ, "PYTHONHASHSEED": "0", "PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        encoding="utf-8",
        errors="replace",
    )
    if child.returncode:
        raise InputError(
            f"{PREFIX}{name} failed to generate {count} records. Try other options or another dataset. "
            f"The end of its output:\n{child.stderr.strip()[-2000:]}"
        )
    for line in child.stdout.splitlines():
        record = json.loads(line)
        if record["response"] is None:
            raise InputError(f"{PREFIX}{name} has a scorer but no answers to learn from. Choose another.")
        yield record


def verify(task: str, entry: str | None, completion: str) -> bool:
    """Whether the dataset's scorer gives `completion` the full score, 1.0; partial credit is not enough.

    The arguments and what is raised are those of `score`.
    """
    return score(task, entry, completion) >= 1.0


def score(task: str, entry: str | None, completion: str) -> float:
    """What the dataset's scorer gives `completion`, from 0.0 to 1.0; 0.0 where it fails.

    White space around the completion is ignored. Some scorers evaluate the completion as an expression, with
    no limit on time or on what it calls: judge only text of models that you trust that far (see `evaluates`).

    Args:
      task: "reasoning_gym:" and the dataset's name, as in a record.
      entry: the record's "entry".
      completion: what a model wrote.

    Raises:
      InputError: as in `records`, or there is no entry.
    """
    if entry is None:
        raise InputError(f"task {task!r}: the record lacks 'entry', which records() gave. Restore the field.")
    name, completion = task.removeprefix(PREFIX), completion.strip()
    original = ast.literal_eval(entry)
    if name.partition("?")[0] in _ANY_TEXT_SCORES:
        return float(completion == original["answer"])
    scorer = _scorer(name)
    try:
        return float(scorer(completion, original))
    except Exception:  # Scorers parse the completion, and some raise what they like when they can't.
        return 0.0


def evaluates(task: str) -> bool:
    """Whether the scorer of a task may run what a model wrote as Python code: a policy that is rewarded by it could
    find out."""
    return task.startswith(PREFIX) and task.removeprefix(PREFIX).partition("?")[0] in EVALUATING


@functools.cache
def _scorer(name: str) -> Callable[[str, dict[str, Any]], float]:
    return _dataset(name, seed=0, size=1).score_answer


def _generate(name: str, count: int, seed: int) -> Iterator[dict[str, str | None]]:
    base = name.partition("?")[0]
    for index in range(count):
        chunk, offset = divmod(index, _CHUNK)
        if offset == 0:  # The package seeds record i with seed + i, so that near seeds would share records.
            chunk_seed = random.Random(f"{name}/{seed}/{chunk}").getrandbits(31)
            dataset = _dataset(name, chunk_seed, _CHUNK)
        random.seed(chunk_seed + offset)
        entry = dataset[offset]
        response = entry["answer"]
        if base in _EXAMPLES:
            example = entry["metadata"][_EXAMPLES[base]]
            response = example if isinstance(example, str) else json.dumps(example)
        yield {
            "prompt": entry["question"],
            "response": response,
            "task": PREFIX + name,
            "entry": repr(_plain(entry)),
        }


def _plain(value: Any) -> Any:
    """`value` in built-in types whose repr is a literal. JSON would lose the tuples that scorers compare."""
    if isinstance(value, dict):
        return {_plain(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(map(_plain, value))
    if value is None or type(value) in (str, int, bool):
        return value
    if isinstance(value, numbers.Real) and math.isfinite(value):
        return float(value)
    return str(value)


def _dataset(name: str, seed: int, size: int) -> Any:
    """The package's dataset object for a name with options."""
    try:  # here, since it is an extra, and takes seconds to import
        import reasoning_gym
        from reasoning_gym.factory import DATASETS
    except ImportError as error:
        raise InputError(
            f"{PREFIX}{name} needs the package reasoning-gym: pip install -e '.[reasoning-gym]' ({error})."
        ) from error
    base, _, query = name.partition("?")
    if base not in DATASETS:
        raise InputError(f"{PREFIX}{name}: there is no dataset {base!r}.{did_you_mean(base, DATASETS)}")
    options = _options(name, query, DATASETS[base][1])
    try:
        return reasoning_gym.create_dataset(base, seed=seed, size=size, **options)
    except Exception as error:  # Its configs check themselves by assertions and errors of any kind.
        raise InputError(
            f"{PREFIX}{name}: the dataset refuses the options {options}: {error}. Choose other values."
        ) from error


def _options(name: str, query: str, config: type) -> dict[str, Any]:
    defaults = {
        field.name: field.default if field.default_factory is dataclasses.MISSING else field.default_factory()
        for field in dataclasses.fields(config)
        if field.name not in ("seed", "size")  # Given by the caller of `records`.
    }
    hints = typing.get_type_hints(config)
    options = {}
    for part in filter(None, query.split("&")):
        key, _, text = part.partition("=")
        if key not in defaults:
            raise InputError(f"{PREFIX}{name}: there is no option {key!r}.{did_you_mean(key, defaults)}")
        try:
            options[key] = _value(text, hints[key], defaults[key])
        except (ValueError, TypeError, KeyError) as error:
            raise InputError(
                f"{PREFIX}{name}: {key}={text} does not read as {hints[key]}. Default: {defaults[key]!r}."
            ) from error
    return options


def _value(text: str, hint: Any, default: Any) -> Any:
    """`text` as the type of `default`; any literal, or else the text itself, where that is None."""
    if typing.get_origin(hint) is typing.Literal and text not in typing.get_args(hint):
        raise ValueError
    if hint is float:  # Its default may be written 1.
        return float(text)
    if isinstance(default, list | tuple) and default:
        return type(default)(_value(part, None, default[0]) for part in text.split(","))
    if isinstance(default, bool):
        return {"true": True, "false": False}[text.lower()]
    if isinstance(default, int | float | str | enum.Enum):
        return type(default)(text)
    if default is None:
        with contextlib.suppress(ValueError, SyntaxError):
            return ast.literal_eval(text)
        return text
    raise TypeError(f"values of type {type(default).__name__} can't be written in a name")


def _main(name: str, count: str, seed: str) -> None:
    with contextlib.redirect_stdout(sys.stderr):  # Some datasets print.
        lines = [json.dumps(record) for record in _generate(name, int(count), int(seed))]
    sys.stdout.write("".join(line + "\n" for line in lines))


if __name__ == "__main__":
    _main(*sys.argv[1:])
