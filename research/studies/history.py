"""What a run's folder tells of it: its metrics over steps, samples, config and state."""

import dataclasses
import json
import os
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from research import digests, files
from research.errors import InputError
from research.pretrained import wholeness
from research.run.metrics import read_metrics, read_samples

DIAGNOSIS = "diagnosis.json"  # in a workdir
FIRST = ("loss", "perplexity", "bits_per_byte", "exact_match", "accuracy", "agreement")
_TRAINING = ("grad_norm", "update_ratio", "learning_rate", "tokens_per_second", "mfu", "supervised_fraction")


@dataclasses.dataclass(frozen=True)
class Run:
    """What is known of one run.

    Attributes:
      name: what it is called in the report.
      series: metric -> (steps [N] int64, values [N] float64), in order of steps.
      samples: the sampled texts, {"step", "name", "text"} each.
      config: dotted field -> value, as text; empty where the workdir holds no config.json.
      about: what else config.json says: versions, command, ...; as text.
      finished: whether the run came to its end.
      data: how its first rows looked, as preview.json has it; empty where there is none.
      starts: the times that it was started, in order: {"step", "changed", "command", "started", "versions"} each.
      diagnosis: what `understudy diagnose` last said of it; empty where it wasn't asked.
    """

    name: str
    series: Mapping[str, tuple[np.ndarray, np.ndarray]]
    samples: Sequence[Mapping[str, Any]]
    config: Mapping[str, str]
    about: Mapping[str, str]
    finished: bool
    starts: Sequence[Mapping[str, Any]] = ()
    diagnosis: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    data: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    @property
    def last_step(self) -> int:
        return max(int(steps[-1]) for steps, _ in self.series.values())


def load_run(workdir: str, name: str | None = None) -> Run:
    """Reads a workdir: metrics.jsonl, and where they are there samples.jsonl, config.json and done.json.

    config.json is {"config": {...}, anything else: versions, command, ...}, or the config alone.

    Raises:
      InputError: there are no metrics, or a file can't be read.
    """
    points: dict[str, dict[int, float]] = {}
    for record in read_metrics(workdir):
        for metric in record.keys() - {"step", "time"}:
            points.setdefault(metric, {})[record["step"]] = record[metric]
    if not points:
        raise InputError(f"{workdir}: its metrics.jsonl has no records yet. Wait for the first, or name another run.")
    series = {}
    for metric, values in sorted(points.items()):
        steps = sorted(values)
        series[metric] = (np.array(steps, np.int64), np.array([values[s] for s in steps], np.float64))
    record = files.read_json(os.path.join(workdir, "config.json"), {})
    if not digests.is_whole(record):
        raise InputError(f"{workdir}: its config.json isn't what the run wrote. Put it back from a copy.")
    config = record.pop("config") if isinstance(record.get("config"), dict) else record
    starts = record.pop("history", ()) if record is not config else ()
    for field in (wholeness.FILES, digests.SEAL):
        record.pop(field, None)
    return Run(
        name=name or os.path.basename(os.path.abspath(workdir)),
        series=series,
        samples=read_samples(workdir),
        config=_flatten(config),
        about=_flatten(record) if record is not config else {},
        finished=os.path.exists(os.path.join(workdir, "done.json")),
        starts=starts,
        diagnosis=files.read_json(os.path.join(workdir, DIAGNOSIS), {}),
        data=files.read_json(os.path.join(workdir, "preview.json"), {}),
    )


def group_metrics(runs: Sequence[Run]) -> dict[str, list[str]]:
    """Returns title -> the metrics of one plot, the most telling first.

    A plot holds what is measured by the same name: train/loss, eval/loss and train/sft/loss; eval/exact_match and
    eval/exact_match/sort.
    """
    metrics = sorted({metric for run in runs for metric in run.series}, key=lambda m: (m[:6] != "train/", m))
    plain = {metric.partition("/")[2] for metric in metrics}
    groups: dict[str, list[str]] = {}
    for metric in metrics:
        parts = metric.split("/")[1:] or [metric]
        groups.setdefault(next((part for part in parts if part in plain), parts[-1]), []).append(metric)

    def order(title: str) -> tuple[int, str]:
        if title in FIRST:
            return FIRST.index(title), title
        if title in _TRAINING:
            return 200 + _TRAINING.index(title), title
        return (100 if any(not metric.startswith("train/") for metric in groups[title]) else 300), title

    return {title: groups[title] for title in sorted(groups, key=order)}


def title_of(group: str) -> str:
    """The title of a group of metrics."""
    return {"mfu": "MFU (model-FLOPs utilisation)"}.get(group, group.replace("_", " ").capitalize())


def _flatten(tree: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    flat = {}
    for key, value in tree.items():
        if isinstance(value, Mapping) and value:
            flat |= _flatten(value, f"{prefix}{key}.")
        else:
            flat[prefix + key] = value if isinstance(value, str) else json.dumps(value)
    return flat
