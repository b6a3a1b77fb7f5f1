"""Evaluations of a model by name: their results in a table and in files."""

import json
import math
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax

from research import files
from research.errors import InputError, printable
from research.evals import lm_eval_adapter, multiple_choice, tasks
from research.loading import LoadedModel
from research.models.generation import MakeGenerate, make_generate

Metrics = Mapping[str, float]


class Result(NamedTuple):
    """What an evaluation found. NAME_stderr among the metrics is the standard error of NAME."""

    metrics: Metrics
    samples: list[dict[str, Any]]


class Harness(NamedTuple):
    """What to run of lm-evaluation-harness.

    Attributes:
      tasks: names of tasks, groups or tags.
      include_path: a folder with more task files.
      num_fewshot: examples before each question; None leaves it to the task.
    """

    tasks: Sequence[str]
    include_path: str | None
    num_fewshot: int | None


def evaluate_tasks(
    loaded: LoadedModel,
    specs: Sequence[str],
    *,
    template: str,
    limit: int,
    batch_tokens: int,
    make: MakeGenerate = make_generate,
) -> dict[str, Result]:
    """Runs tasks, written as evals.tasks says, under the mesh of the model.

    Args:
      loaded: the model.
      specs: the tasks.
      template: how prompts are put to the model, where a task doesn't say.
      limit: the first so many records of each; 0 for all.
      batch_tokens: see scoring.
      make: see tasks.load.

    Raises:
      InputError: a task is at fault, or two have the same name.
    """
    model, tokenizer = loaded.model, loaded.tokenizer
    evaluations = [
        tasks.load(spec, model, tokenizer, template, limit=limit, batch_tokens=batch_tokens, make=make)
        for spec in specs
    ]
    names = [evaluation.name for evaluation in evaluations]
    for name in names:
        if names.count(name) > 1:
            raise InputError(f"--task: {names.count(name)} are named {name!r}. Tell them apart: KIND,name=NAME:DATA.")
    results = {}
    for name, evaluate in evaluations:
        print(f"{name} ...", file=sys.stderr)
        metrics, samples = evaluate(loaded.params, jax.random.key(0))
        results[name] = Result(metrics, [sample._asdict() for sample in samples])
    return results


def evaluate_harness(
    loaded: LoadedModel, harness: Harness, *, template: str, limit: int, batch_tokens: int
) -> dict[str, Result]:
    """Runs tasks of lm-evaluation-harness, under the mesh of the model; see `evaluate_tasks` for the arguments.

    Raises:
      InputError: the harness isn't installed, or a task isn't known.
    """
    lm = lm_eval_adapter.make_lm(
        loaded.model, loaded.params, loaded.tokenizer, template=template, batch_tokens=batch_tokens
    )
    out = lm_eval_adapter.evaluate(lm, **harness._asdict(), limit=limit, chat=template != "plain")
    return {
        f"lm_eval/{name}": Result(lm_eval_adapter.plain_metrics(metrics), out["samples"].get(name, []))
        for name, metrics in out["results"].items()
    }


def wilson(right: float, count: int, z: float = 1.959964) -> tuple[float, float]:
    """The 95 % interval of a share, right / count, by Wilson's score (JASA 22:209, 1927).

    It stays within [0, 1], and has a width at 0 and 1 too. Raises ValueError where count is 0.
    """
    if count < 1:
        raise ValueError("a share of nothing has no interval")
    p, n = right / count, count
    center, half = p + z * z / (2 * n), z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    low, high = (center - half) / (1 + z * z / n), (center + half) / (1 + z * z / n)
    return (0.0 if right == 0 else low), (1.0 if right == count else high)


def interval(name: str, result: Result) -> tuple[float, float] | None:
    """The 95 % interval of a metric: Wilson's of a share of records, else the normal one of its standard error. Of
    avg@n and pass@k that is held within 0 and 1, and Wilson's where all records agree and the error is 0.

    Args:
      name: of the metric, such as "acc" or "exact_match/TASK".
      result: of the evaluation.

    Returns:
      None where there is no error to make one of.
    """
    value, error = result.metrics[name], result.metrics.get(f"{name}_stderr")
    right = _outcomes(name, result.samples)
    if right and abs(sum(right) / len(right) - value) < 1e-9:
        return wilson(sum(right), len(right))
    if error is None:
        return None
    low, high = value - 1.96 * error, value + 1.96 * error
    if "@" not in name:
        return low, high
    count = len(_of_task(name, result.samples))
    return (max(0.0, low), min(1.0, high)) if error else wilson(value * count, count)


def _outcomes(name: str, samples: Sequence[Mapping[str, Any]]) -> list[bool]:
    """Of a metric that is a share of records: which are right; empty of any other."""
    kind, here = name.partition("/")[0], _of_task(name, samples)
    if kind == "exact_match" and all("correct" in sample for sample in here):
        return [sample["correct"] for sample in here]
    if name in multiple_choice.SHARES and all("right" in sample for sample in here):
        return [sample["right"][name] for sample in here]
    values = [sample.get(kind) for sample in samples]  # the harness has a record's value under the metric's name
    return [bool(value) for value in values] if all(value in (0, 1) for value in values) else []


def _of_task(name: str, samples: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """The samples that a metric is of: those of its task, where its name has one."""
    _, _, task = name.partition("/")
    return [sample for sample in samples if not task or sample.get("task") == task]


def table(results: Mapping[str, Result]) -> str:
    """A line for each task's metric: value, standard error, 95 % interval (see `interval`), number of records."""
    rows = [("task", "metric", "value", "stderr", "95 % interval", "records")]
    for task, result in results.items():
        for name in result.metrics:
            if not name.endswith("_stderr"):
                rows.append((task, name, *_cells(name, result), str(len(result.samples))))
    rows = [[printable(cell) for cell in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [
        "  ".join(
            cell.ljust(w) if i < 2 else cell.rjust(w) for i, (cell, w) in enumerate(zip(row, widths, strict=True))
        )
        for row in rows
    ]
    return "\n".join(line.rstrip() for line in lines)


def _cells(name: str, result: Result) -> tuple[str, str, str]:
    """Value, standard error and interval as text."""
    value, error, bounds = result.metrics[name], result.metrics.get(f"{name}_stderr"), interval(name, result)
    if bounds is None:
        return f"{value:.4f}" if value % 1 else f"{value:g}", "", ""
    return f"{value:.4f}", "" if error is None else f"{error:.4f}", f"{bounds[0]:.4f} to {bounds[1]:.4f}"


def write(path: Path, model: str, command: Mapping[str, Any], results: Mapping[str, Result]) -> None:
    """Writes the results to `path`, a .json, and each record's beside it, to .samples.jsonl."""
    content = {
        "model": model,
        "command": dict(command),
        "results": {
            name: {**result.metrics, **_intervals(result), "records": len(result.samples)}
            for name, result in results.items()
        },
    }
    lines = [
        files.json_line({"evaluation": name, **sample}, default=str)
        for name, (_, samples) in results.items()
        for sample in samples
    ]
    files.write_bytes(path.with_suffix(".samples.jsonl"), b"".join(lines))
    files.write_text(path, json.dumps(content, indent=1, ensure_ascii=False, default=str) + "\n")


def _intervals(result: Result) -> dict[str, tuple[float, float]]:
    """NAME_interval of each metric that has one."""
    bounds = {name: interval(name, result) for name in result.metrics if not name.endswith("_stderr")}
    return {f"{name}_interval": both for name, both in bounds.items() if both is not None}
