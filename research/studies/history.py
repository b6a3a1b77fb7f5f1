"""What a run's folder tells of it: its metrics over steps, samples, config and state."""

import dataclasses
import itertools
import json
import math
import os
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from research import config as config_lib
from research import digests, files
from research.errors import InputError
from research.pretrained import wholeness
from research.run.metrics import read_metrics, read_samples

DIAGNOSIS = "diagnosis.json"  # in a workdir
FIRST = ("loss", "perplexity", "bits_per_byte", "exact_match", "accuracy", "agreement")
_TRAINING = ("grad_norm", "update_ratio", "learning_rate", "tokens_per_second", "mfu", "supervised_fraction")
_REWARDS = ("reward", "rollout/kl", "rollout/tokens", "rollout/agreeing", "rollout/truncated")
_TITLES = {
    "mfu": "MFU (model-FLOPs utilisation)",
    "grad_norm": "Gradient norm",
    "nll": "Nats a token",
    "kl": "KL",
    "old_kl": "KL from the policy that wrote the answers",
    "ratio": "Ratio of probabilities, new over old",
    "clip_high": "Share clipped above",
    "clip_low": "Share clipped below",
    "rollout/kl": "KL from the start",
    "rollout/tokens": "Tokens of an answer",
    "rollout/agreeing": "Groups whose answers have one reward",
    "rollout/truncated": "Answers that were cut off",
    "rollout/seconds": "Seconds of a rollout",
    "rollout/staleness": "Updates since the answers were written",
}


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
      workdir: its folder.
      settings: its config as it is, section -> field -> value; empty where the workdir holds no config.json.
      seconds: that its records span, the time between a stop and the next start left out.
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
    workdir: str = ""
    settings: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    seconds: float = 0.0

    @property
    def last_step(self) -> int:
        return max(int(steps[-1]) for steps, _ in self.series.values())

    @property
    def resumes(self) -> list[int]:
        """The steps at which it went on after a stop."""
        return [int(start["step"]) for start in self.starts[1:]]

    @property
    def records(self) -> list[dict[str, float]]:
        """Its metrics as records, one a step, in order."""
        records: dict[int, dict[str, float]] = {}
        for metric, (steps, values) in self.series.items():
            for step, value in zip(steps.tolist(), values.tolist(), strict=True):
                records.setdefault(step, {"step": step})[metric] = value
        return [records[step] for step in sorted(records)]

    def last(self, metric: str) -> float:
        """The last value of a metric; nan where it has none."""
        return float(self.series[metric][1][-1]) if metric in self.series else math.nan


def load_run(workdir: str, name: str | None = None) -> Run:
    """Reads a workdir: metrics.jsonl, and where they are there samples.jsonl, config.json and done.json.

    config.json is {"config": {...}, anything else: versions, command, ...}, or the config alone.

    Raises:
      InputError: there are no metrics, or a file can't be read.
    """
    points: dict[str, dict[int, float]] = {}
    records = read_metrics(workdir)
    for record in records:
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
        config=flatten(config),
        about=flatten(record) if record is not config else {},
        finished=os.path.exists(os.path.join(workdir, "done.json")),
        starts=starts,
        diagnosis=files.read_json(os.path.join(workdir, DIAGNOSIS), {}),
        data=files.read_json(os.path.join(workdir, "preview.json"), {}),
        workdir=workdir,
        settings=config,
        seconds=_seconds(records),
    )


def _seconds(records: Sequence[Mapping[str, float]]) -> float:
    """The time between records; the first of a start, which says how much is trained, comes after a pause."""
    pairs = [(a, b) for a, b in itertools.pairwise(records) if "time" in a and "time" in b]
    return sum(max(0.0, b["time"] - a["time"]) for a, b in pairs if "startup/trained_parameters" not in b)


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
        if parts[0] == "rollout" and len(parts) > 1:  # its tokens are those of an answer, its KL that from the start
            groups.setdefault("/".join(parts[:2]), []).append(metric)
            continue
        groups.setdefault(next((part for part in parts if part in plain), parts[-1]), []).append(metric)

    def order(title: str) -> tuple[int, str]:
        if title in _REWARDS:
            return 50 + _REWARDS.index(title), title
        if title in FIRST:
            return FIRST.index(title), title
        if title in _TRAINING:
            return 200 + _TRAINING.index(title), title
        return (100 if any(not metric.startswith("train/") for metric in groups[title]) else 300), title

    return {title: groups[title] for title in sorted(groups, key=order)}


def title_of(group: str) -> str:
    """The title of a group of metrics."""
    return _TITLES.get(group, group.replace("_", " ").capitalize())


def flatten(tree: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    """Dotted field -> value, as text."""
    flat = {}
    for key, value in tree.items():
        if isinstance(value, Mapping) and value:
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[prefix + key] = value if isinstance(value, str) else json.dumps(value)
    return flat


def differing(settings: Mapping[str, Any]) -> dict[str, tuple[str, str]]:
    """Dotted field -> (value, default), of the fields of a config that aren't as they are by default; a default is ""
    where there is none."""
    default = flatten(json.loads(json.dumps(config_lib.defaults(), default=str)))
    fields = {}
    for field, value in flatten(settings).items():
        role = field.split(".", 2)
        known = default.get(f"model.{role[2]}", "") if role[0] == "roles" and len(role) > 2 else default.get(field, "")
        if value != known and role[0] != "plan":
            fields[field] = value, known
    return fields
