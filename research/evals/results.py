"""Evaluations of a model by name: their results in a table and in files."""

import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax

from research import files
from research.errors import InputError
from research.evals import lm_eval_adapter, tasks
from research.loading import LoadedModel

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
    loaded: LoadedModel, specs: Sequence[str], *, template: str, limit: int, batch_tokens: int
) -> dict[str, Result]:
    """Runs tasks, written as evals.tasks says, under the mesh of the model.

    Args:
      loaded: the model.
      specs: the tasks.
      template: how prompts are put to the model, where a task doesn't say.
      limit: the first so many records of each; 0 for all.
      batch_tokens: see scoring.

    Raises:
      InputError: a task is at fault, or two have the same name.
    """
    model, tokenizer = loaded.model, loaded.tokenizer
    evaluations = [
        tasks.load(spec, model, tokenizer, template, limit=limit, batch_tokens=batch_tokens) for spec in specs
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


def table(results: Mapping[str, Result]) -> str:
    """A line for each task's metric: value, standard error, 95 % interval (normal), number of records."""
    rows = [("task", "metric", "value", "stderr", "95 % interval", "records")]
    for task, (metrics, samples) in results.items():
        for name, value in metrics.items():
            if not name.endswith("_stderr"):
                rows.append((task, name, *_cells(value, metrics.get(f"{name}_stderr")), str(len(samples))))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [
        "  ".join(
            cell.ljust(w) if i < 2 else cell.rjust(w) for i, (cell, w) in enumerate(zip(row, widths, strict=True))
        )
        for row in rows
    ]
    return "\n".join(line.rstrip() for line in lines)


def _cells(value: float, error: float | None) -> tuple[str, str, str]:
    """Value, standard error and interval as text."""
    if error is None:
        return f"{value:.4f}" if value % 1 else f"{value:g}", "", ""
    return f"{value:.4f}", f"{error:.4f}", f"{value - 1.96 * error:.4f} to {value + 1.96 * error:.4f}"


def write(path: Path, model: str, command: Mapping[str, Any], results: Mapping[str, Result]) -> None:
    """Writes the results to `path`, a .json, and each record's beside it, to .samples.jsonl."""
    content = {
        "model": model,
        "command": dict(command),
        "results": {name: {**metrics, "records": len(samples)} for name, (metrics, samples) in results.items()},
    }
    lines = [
        json.dumps({"evaluation": name, **sample}, ensure_ascii=False, default=str) + "\n"
        for name, (_, samples) in results.items()
        for sample in samples
    ]
    files.write_text(path.with_suffix(".samples.jsonl"), "".join(lines))
    files.write_text(path, json.dumps(content, indent=1, ensure_ascii=False, default=str) + "\n")
