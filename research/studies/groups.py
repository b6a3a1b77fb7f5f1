"""The runs of a sweep's or study's folder, and groups of them that differ in nothing but their seed."""

import dataclasses
import hashlib
import json
import os
import re
from collections.abc import Mapping, Sequence
from typing import Any

from research import files
from research.errors import InputError
from research.run.metrics import METRICS_FILE
from research.studies import stages
from research.studies.history import Run, flatten, load_run

_RECORD, _SETTINGS = "study.json", "sweep.json"  # of a study, and of a sweep's run
_MOST = 3  # fields that tell runs apart in a name
_LONGEST = 60  # characters of such a name
_PLUMBING = ("seed", "log.", "checkpoint.", "plan.", "mesh.", "compilation_cache", "stall_seconds")


@dataclasses.dataclass(frozen=True)
class Group:
    """Runs that differ in nothing but their seed.

    Attributes:
      name: of it.
      runs: at least one.
      settings: dotted field -> value, of the fields that tell groups apart.
    """

    name: str
    runs: Sequence[Run]
    settings: Mapping[str, str] = dataclasses.field(default_factory=dict)


def members(workdir: str) -> list[str]:
    """The folders of the runs that a folder stands for: itself, or those of a sweep, or of a study, as far as they have
    metrics.

    Raises:
      InputError: it is none of these, or none of its runs has metrics.
    """
    if os.path.exists(os.path.join(workdir, METRICS_FILE)):
        return [workdir]
    record = files.read_json(os.path.join(workdir, _RECORD), None)
    if record is not None:
        folders = [_found(stage["workdir"], workdir) for stage in record["stages"] if stage["kind"] == "train"]
    else:
        names = sorted(os.listdir(workdir)) if os.path.isdir(workdir) else []
        folders = [os.path.join(workdir, n) for n in names if os.path.exists(os.path.join(workdir, n, _SETTINGS))]
    begun = [folder for folder in folders if _has_records(os.path.join(folder, METRICS_FILE))]
    if folders and not begun:
        raise InputError(f"{workdir}: none of its {len(folders)} runs has metrics yet. Wait for the first.")
    return begun or [workdir]  # what it is then is said where it is read


def _found(folder: str, study: str) -> str:
    """A stage's folder, as its study.json names it; or, where that was from another place, in the store beside it."""
    beside = os.path.join(os.path.dirname(os.path.abspath(study)), "store", os.path.basename(folder))
    return beside if not os.path.exists(folder) and os.path.exists(beside) else folder


def _has_records(path: str) -> bool:
    return os.path.exists(path) and os.path.getsize(path) > 0


def load(workdirs: Sequence[str]) -> list[Run]:
    """Reads runs, each under a name of its own: its folder's, and what it differs from the others in.

    Raises:
      InputError: see history.load_run.
    """
    bases = [os.path.basename(os.path.abspath(workdir)) for workdir in workdirs]
    unique = len(set(bases)) == len(bases)
    runs = [load_run(workdir, base if unique else workdir) for workdir, base in zip(workdirs, bases, strict=True)]
    labels = [", ".join(f"{name}={value}" for name, value in label.items()) for label in differences(runs)]
    return [
        dataclasses.replace(run, name=f"{run.name} ({label})") if label and not _says(run.name, label) else run
        for run, label in zip(runs, labels, strict=True)
    ]


def _says(name: str, label: str) -> bool:
    """Whether a folder's name, such as a sweep gives it, has the label's values already."""
    return all(part.strip() in name for part in label.split(", "))


def differences(runs: Sequence[Run], seeds: bool = True) -> list[dict[str, str]]:
    """Of each run the fields of its config that tell it from the others, by short names, and their values; nothing
    where these are too many to be read, or where a run has no config.

    Args:
      runs: to compare.
      seeds: whether the seed counts.
    """
    fields = list(dict.fromkeys(field for run in runs for field in run.config))
    differing = [field for field in fields if len({run.config.get(field, "") for run in runs}) > 1]
    telling = [field for field in differing if not field.startswith(_PLUMBING) or (seeds and field == "seed")]
    short = {field: _short(field, differing) for field in telling}
    texts = [{short[field]: run.config.get(field, "") for field in telling} for run in runs]
    lengths = [sum(len(name) + len(value) + 3 for name, value in text.items()) for text in texts]
    if not all(run.config for run in runs) or len(telling) > _MOST or max(lengths, default=0) > _LONGEST:
        return [{} for _ in runs]
    return texts


def _short(field: str, fields: Sequence[str]) -> str:
    """The end of a dotted field that no other of `fields` has."""
    parts = field.split(".")
    tails = (".".join(parts[-n:]) for n in range(1, len(parts) + 1))
    return next((tail for tail in tails if sum(f".{f}".endswith(f".{tail}") for f in fields) == 1), field)


def by_seed(runs: Sequence[Run]) -> list[Group]:
    """The groups of runs, in their order. Of a study's runs, which read what other stages wrote, those are in one group
    whose whole ancestry differs in nothing but seeds."""
    keys: dict[str, list[Run]] = {}
    for run in runs:
        keys.setdefault(_key(run), []).append(run)
    firsts = [own[0] for own in keys.values()]
    texts = differences(firsts, seeds=False) if len(firsts) > 1 else [{} for _ in firsts]
    groups = []
    for own, settings in zip(keys.values(), texts, strict=True):
        told = ", ".join(f"{name}={value}" for name, value in settings.items())
        groups.append(Group(told or _common([_own_name(run) for run in own]), own, settings))
    names = [group.name for group in groups]
    return [
        dataclasses.replace(group, name=f"{group.name} ({i})") if names.count(group.name) > 1 else group
        for i, group in enumerate(groups, 1)
    ]


def _key(run: Run) -> str:
    """A hash of all that decides a run's result, but for seeds."""
    if os.path.exists(os.path.join(run.workdir, stages.ABOUT)):
        return _key_of_stage(run.workdir)
    rest = {field: value for field, value in run.config.items() if not field.startswith(_PLUMBING)}
    return json.dumps(rest or run.name, sort_keys=True)


def _key_of_stage(folder: str) -> str:
    stage = stages.read_stage(folder)
    text = json.dumps(_without_seeds(stage.settings), sort_keys=True)
    for name in stage.inputs:
        there = os.path.join(os.path.dirname(os.path.abspath(folder)), name)
        if os.path.exists(os.path.join(there, stages.ABOUT)):
            text = re.sub(rf'[^"\s,]*{re.escape(name)}', _key_of_stage(there), text)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _without_seeds(settings: Mapping[str, Any]) -> dict[str, str]:
    return {field: value for field, value in flatten(settings).items() if field.rpartition(".")[2] != "seed"}


def _own_name(run: Run) -> str:
    """What a study calls a run, else its folder's name."""
    about = files.read_json(os.path.join(run.workdir, stages.ABOUT), {})
    return about.get("name") or run.name


def _common(names: Sequence[str]) -> str:
    """What names have in common, part by part: "warm" of "warm-s0" and "warm-s1"."""
    if len(names) == 1:
        return names[0]
    split = [re.split(r"[-,_]", name) for name in names]
    kept = [parts[0] for parts in zip(*split, strict=False) if len(set(parts)) == 1]
    return "-".join(kept) or names[0]
