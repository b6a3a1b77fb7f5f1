"""Stages of a study: what each is made of, the hash that it is known by, and how it stands on disk."""

import dataclasses
import fcntl
import functools
import glob
import hashlib
import importlib.util
import json
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from research import config as config_lib
from research import files, objectives
from research.errors import InputError
from research.run import checkpoint
from research.sources import entries

LOG, ABOUT, DONE, FAULT, COST = "log.txt", "stage.json", "done.json", "failed.json", "cost.json"  # in a stage's folder
COMMANDS = "research.commands"

# What changes no result of a run, and so isn't hashed.
_FREE = (
    *((name,) for name in ("log", "compilation_cache", "mesh", "rules", "plan", "stall_seconds")),
    ("data", "cache_dir"),
    *(("rollout", name) for name in ("servers", "in_flight", "answer_seconds", "outage_seconds", "transfer")),
)
# Fields that are always hashed. One that was added later is hashed where it differs from its default, so that adding a
# field makes no finished stage run again.
_HASHED = {
    "": "seed steps batch_size seq_len microbatches ema_decay max_bad_steps model trainable roles tokenizer data "
    "objective rollout optimizer checkpoint eval",
    "model": "vocab_size num_layers d_model num_heads num_kv_heads head_dim d_ff mlp num_experts experts_per_token "
    "normalize_router block norm norm_eps norm_offset positions rope_theta rope_scaling rotary_dim local_rope_theta "
    "max_length causal sliding_window attention_bias attention_out_bias mlp_bias head_bias qk_norm attention_scale "
    "attention_softcap logit_softcap tie_embeddings embed_scale embed_norm token_types head_transform num_labels "
    "init_std remat attention dtype init_from",
    "tokenizer": "kind vocab_size eos_token",
    "data": "path eval_path eval_fraction format fields template pack shuffle on_bad_record on_long labels num_classes "
    "prompt examples max_records annotations",
    "rollout": "share max_new_tokens temperature top_k top_p slots",
    "optimizer": "name learning_rate schedule warmup_steps start_ratio end_ratio decay_fraction weight_decay b1 b2 eps "
    "momentum nesterov muon_scaling scale_by_parameter factor_min_size clip_norm mu_dtype",
    "checkpoint": "every keep_last best_metric best_mode",
    "eval": "every batches generate max_new_tokens show tasks",
}
# Fields whose value may be a file without looking like one.
_PATHS = ("path", "eval_path", "init_from", "annotations", "select")


@dataclasses.dataclass(frozen=True)
class Stage:
    """One step of a study.

    Attributes:
      name: as the study calls it; not unique.
      kind: "train" or "command".
      settings: of "train" the resolved config of the run; of "command" {"module", "args"}.
      inputs: ids of the stages whose folders occur in `settings`.
      files: local file or folder that occurs in `settings` -> hash of its contents.
      digest: hash of all this.
      workdir: its folder. In a study STORE/NAME-HASH, NAME being what the stage was called when it was first begun.
      may_diverge: whether a run that diverges is finished, too; not hashed.
    """

    name: str
    kind: str
    settings: Mapping[str, Any]
    inputs: tuple[str, ...]
    files: Mapping[str, str]
    digest: str
    workdir: str
    may_diverge: bool = False

    @property
    def id(self) -> str:
        return os.path.basename(self.workdir)


class Plan:
    """What a study's function adds its stages to; see `train` and `command`.

    Args:
      store: the folder that stages lie in.

    Raises:
      InputError: config.data.path couldn't name files in such a folder.
    """

    def __init__(self, store: str):
        if re.search(r"[,*?\[\]:]", store):
            raise InputError(f"study.store = {store!r}: data.path can't name files in it. Leave out , * ? [ ] and :")
        self.store = os.path.normpath(store)
        self._stages: dict[str, Stage] = {}  # digest -> stage

    @property
    def stages(self) -> list[Stage]:
        return list(self._stages.values())

    def train(self, name: str, config: Mapping[str, Any] | ConfigDict, *, may_diverge: bool = False) -> Stage:
        """Adds a run. The same run twice is one stage, as it was added first.

        Args:
          name: letters, digits and _ . + = -
          config: a config of a run, or the fields of it that differ from the defaults; a section `study` is left out.
          may_diverge: that it diverges is a result, as in a search of learning rates; see `finished`. Else it is a
            failure, which ends the study.

        Raises:
          InputError: the config can't work, or names data that isn't there.
        """
        return self._add(name, "train", run_settings(name, config, self.stages), may_diverge)

    def command(self, name: str, module: str, args: Mapping[str, Any]) -> Stage:
        """Adds a call of module.main(argv), which returns an exit status; called again, it goes on or begins anew.

        Args:
          name: letters, digits and _ . + = -
          module: a command, such as "label", or a module of one's own.
          args: flag -> value. True is the flag alone, False and None leave it out, a sequence gives it several times.
            "{workdir}" in a value is the stage's own folder, which is there when the command starts; what it writes
            belongs in there, since any other file that its flags name is taken for an input.

        Raises:
          InputError: there is no such module.
        """
        module = module.removeprefix(f"{COMMANDS}.")
        if not _exists(module_path(module)):
            old = module.removeprefix("research.")
            remedy = f"Write {old!r}." if is_command(old) else "Check its name."
            raise InputError(f"stage {name}: there is no module {module!r} to run. {remedy}")
        return self._add(name, "command", {"module": module, "args": _as_json(dict(args))})

    def _add(self, name: str, kind: str, settings: Mapping[str, Any], may_diverge: bool = False) -> Stage:
        if not re.fullmatch(r"\w[\w.+=-]*", name, re.ASCII):
            raise InputError(f"stage {name!r}: a name is of letters, digits and _ . + = -")
        stage = make_stage(name, kind, settings, self.stages)
        if stage.digest not in self._stages:
            # The name that it was first begun under stays.
            names = [f"{name}-{stage.digest}", *sorted(glob.glob(f"*-{stage.digest}", root_dir=self.store))]
            folder = names[0] if names[0] in names[1:] else names[-1]
            workdir = os.path.join(self.store, folder)
            self._stages[stage.digest] = dataclasses.replace(stage, workdir=workdir, may_diverge=may_diverge)
        return self._stages[stage.digest]


def run_settings(name: str, config: Mapping[str, Any] | ConfigDict, before: Sequence[Stage] = ()) -> dict[str, Any]:
    """The resolved config of a run, as JSON has it.

    Args:
      name: of the stage, for errors.
      config: fields that differ from the defaults; a section `study` is left out.
      before: stages that may write its data.

    Raises:
      InputError: the config can't work, or names data that isn't there.
    """
    values = config.to_dict() if isinstance(config, ConfigDict) else dict(config)
    values.pop("study", None)
    try:
        parsed = config_lib.parse(values)
        objectives.load(parsed.objective)
        _check_data(parsed, before)
    except InputError as error:
        raise InputError(f"stage {name}: {error}") from error
    return _as_json(config_lib.to_dict(parsed))


def make_stage(name: str, kind: str, settings: Mapping[str, Any], before: Sequence[Stage], workdir: str = "") -> Stage:
    """A stage with its hash, inputs and files.

    Args:
      name, kind, settings, workdir: see Stage.
      before: stages whose folders `settings` may name.
    """
    references = _References(before)
    counted = references.resolve(_hashed_of_run(settings) if kind == "train" else _hashed_of_command(settings))
    text = json.dumps([kind, counted, sorted(references.files.items())], sort_keys=True)
    digest = hashlib.sha256(text.encode()).hexdigest()[:10]
    return Stage(name, kind, settings, tuple(references.inputs), references.files, digest, workdir)


def read_stage(workdir: str) -> Stage:
    """The stage that began in a folder, as its stage.json says."""
    values = files.read_json(Path(workdir) / ABOUT)
    return Stage(**{**values, "inputs": tuple(values["inputs"])}, workdir=workdir)


def write_stage(stage: Stage) -> None:
    """Writes stage.json into the stage's folder, which must be there."""
    values = {name: value for name, value in dataclasses.asdict(stage).items() if name != "workdir"}
    files.write_json(Path(stage.workdir) / ABOUT, values)


def difference(before: Stage, now: Stage) -> str:
    """Says in what two stages differ by their hashes; "" where they don't."""
    if before.digest == now.digest:
        return ""
    there, here = _flatten(before.settings), _flatten(now.settings)
    fields = [field for field in sorted(there | here) if there.get(field) != here.get(field)]
    named = [path for path in sorted({**before.files, **now.files}) if before.files.get(path) != now.files.get(path)]
    texts = [f"{field} = {there.get(field)!r} there, {here.get(field)!r} now" for field in fields]
    return "; ".join([*texts, *(f"{path} has changed" for path in named)])


def _flatten(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Dotted field -> value."""
    flat: dict[str, Any] = {}
    for name, value in values.items():
        flat |= _flatten(value, f"{prefix}{name}.") if isinstance(value, Mapping) else {prefix + name: value}
    return flat


def is_command(module: str) -> bool:
    """Whether `module` names one of Understudy's commands, such as "label"."""
    return "." not in module and _exists(f"{COMMANDS}.{module}")


def module_path(module: str) -> str:
    """What to import for the `module` of a command stage."""
    return f"{COMMANDS}.{module}" if is_command(module) else module


def _exists(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ImportError:
        return False


def _hashed_of_run(settings: Mapping[str, Any]) -> dict[str, Any]:
    """The fields that count: layout and logging say nothing of the result, see _FREE and _HASHED."""
    counted, defaults = _as_json(settings), _as_json(config_lib.defaults())
    for *section, field in _FREE:
        functools.reduce(dict.__getitem__, section, counted).pop(field, None)
    sections = {name: counted[name] for name in _HASHED if name in counted} | {"": counted}
    for name, values in sections.items():
        _drop_defaults(values, defaults[name] if name else defaults, _HASHED[name])
    of_role = _as_json(dataclasses.asdict(config_lib.RoleSection())) | defaults["model"]
    for role in counted["roles"].values():
        _drop_defaults(role, of_role, _HASHED["model"])
    return counted


def _drop_defaults(values: dict[str, Any], defaults: Mapping[str, Any], always: str) -> None:
    for field in set(values) - set(always.split()):
        if field in defaults and values[field] == defaults[field]:
            del values[field]


def _hashed_of_command(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Commands count by the names that their modules had first, so that stages of then are still known."""
    module = settings["module"]
    return {**settings, "module": f"research.{module}" if is_command(module) else module}


class _References:
    """What a stage's settings name: folders of earlier stages, and files.

    Attributes:
      inputs: ids of stages, as keys, in the order in which they are named.
      files: path -> hash of the contents.
    """

    def __init__(self, before: Sequence[Stage]):
        self._before = before
        self.inputs: dict[str, None] = {}
        self.files: dict[str, str] = {}

    def resolve(self, value: Any, field: str = "") -> Any:
        """`value` with folders of stages replaced by their hashes: neither names nor the store's place count."""
        if isinstance(value, Mapping):
            return {key: self.resolve(v, key) for key, v in value.items()}
        if isinstance(value, list):
            return [self.resolve(v, field) for v in value]
        if not isinstance(value, str):
            return value
        for entry in _entries(value):
            if not _writers(entry, self._before):
                self.files |= {path: _contents(path) for path in _existing(entry, field)}
        for stage in _writers(value, self._before):
            self.inputs[stage.id] = None
            value = value.replace(stage.workdir, f"<{stage.digest}>")
        return value


def _writers(text: str, stages: Sequence[Stage]) -> list[Stage]:
    """The stages whose folders a text names."""
    return [stage for stage in stages if stage.workdir in text]


def _check_data(config: config_lib.Config, before: Sequence[Stage]) -> None:
    """Data that no stage writes must be there now, not hours later when the stage's turn has come."""
    paths = {f"data.{field}": getattr(config.data, field) for field in ("path", "eval_path")}
    for name, source in config.data.sources.items():
        paths |= {f"data.sources.{name}.{field}": source.get(field, "") for field in ("path", "eval_path")}
    for field, path in paths.items():
        for entry in filter(None, _entries(path)):
            if ":" not in entry and not _writers(entry, before):
                try:
                    entries.locate(entry, count=0, seed=0)
                except InputError as error:
                    raise InputError(f"{field}: {error}") from error


def _as_json(value: Any) -> Any:
    """A copy as JSON would read it: tuples are lists, scalars of numpy numbers, paths texts."""
    return json.loads(json.dumps(value, default=_plain))


def _plain(value: Any) -> Any:
    """What JSON doesn't know: scalars of numpy, paths."""
    if hasattr(value, "item"):
        return value.item()
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    raise InputError(f"{value!r}: a stage's settings are numbers, texts, bools, lists and mappings of these.")


def _entries(text: str) -> list[str]:
    """Of "0.7*a.jsonl,0.3*choice:b.jsonl": a.jsonl and choice:b.jsonl."""
    return [re.sub(r"^[-+]?(\d+\.?\d*|\.\d+)([eE][-+]?\d+)?\*", "", entry.strip()) for entry in text.split(",")]


def _existing(entry: str, field: str) -> list[str]:
    """The file, folder or files of a glob that a text names, such as x.jsonl, DIR/*.txt or choice:x.jsonl."""
    for name in (entry, entry.rpartition(":")[2]):
        if name and (field in _PATHS or re.search(r"[./\\]", name)) and name.strip("./"):
            path = os.path.expanduser(name)
            paths = [path] if os.path.exists(path) else sorted(glob.glob(path, recursive=True))
            if paths:
                return paths
    return []


def _contents(path: str) -> str:
    """Hash of a file, or of the names and contents of the files in a folder.

    Of a run's folder what a later run takes from it counts: the newest checkpoint and the tokenizer.
    """
    root = Path(path)
    if root.is_file():
        return _file_hash(path, root.stat().st_size, root.stat().st_mtime_ns)
    steps = checkpoint.steps(root)
    if steps:
        newest = root / checkpoint.FOLDER / str(steps[-1])
        members = [*newest.rglob("*"), *root.glob("*token*"), *root.glob("*.jinja")]
    else:
        members = list(root.rglob("*"))
    result = hashlib.sha256()
    for file in sorted(file for file in members if file.is_file()):
        stat = file.stat()
        result.update(f"{file.relative_to(root)}\0{_file_hash(str(file), stat.st_size, stat.st_mtime_ns)}\0".encode())
    return result.hexdigest()


@functools.cache
def _file_hash(path: str, size: int, modified: int) -> str:
    with open(path, "rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


def state(stage: Stage) -> str:
    """How a stage stands on disk: "done", "diverged" where it may, "running" (anywhere), "failed", "begun" or "new"."""
    done = finished(stage)
    if done is not None:
        return "diverged" if "diverged" in done else "done"
    log = os.path.join(stage.workdir, LOG)
    if not os.path.exists(log):
        return "new"
    with open(log, "rb") as f:
        try:
            fcntl.flock(f, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return "running"
    return "failed" if os.path.exists(os.path.join(stage.workdir, FAULT)) else "begun"


def finished(stage: Stage) -> dict[str, Any] | None:
    """What a stage left at its end; None where it isn't done.

    Of a run {"metrics": ...}; of one that diverged, where it may, {"metrics": {}, "diverged": what it said}.
    """
    done = files.read_json(os.path.join(stage.workdir, DONE), None)
    if done is not None and not (stage.kind == "train" and done.get("step") != stage.settings["steps"]):
        return done
    fault = files.read_json(os.path.join(stage.workdir, FAULT), {}) if stage.may_diverge else {}
    return {"metrics": {}, "diverged": fault["error"]} if fault.get("diverged") else None
