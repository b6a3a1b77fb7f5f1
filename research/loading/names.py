"""Models and adapters by name: what a name stands for is found and described; no parameter is read."""

import dataclasses
import functools
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax

from research import config as config_lib
from research.devices import sharding
from research.errors import InputError, located
from research.files import fingerprint, read_json
from research.loading import runs
from research.loading.run_adapters import RunAdapter
from research.loading.start import Start
from research.loading.types import AdapterSource, Base, ModelSource
from research.models import adapters, added_rows, transformer
from research.pretrained import checkpoints, peft, save, wholeness
from research.pretrained import load as pretrained
from research.sources import formats, tokenizers

BASE = "base"  # what requests call a model without its adapters
ORIGIN = "origin.json"  # in a workdir: the config.json and dtypes of the checkpoint that the run began with


def find(name: str, *, step: int | str | None = None, ema: bool = False) -> ModelSource:
    """Finds a model and reads what it computes.

    Args:
      name: a run's workdir, a folder as transformers saves it, a hub name (NAME/MODEL or NAME/MODEL@REVISION), or a
        .gguf file.
      step: of a run: which of its checkpoints, or "best" by its checkpoint.best_metric; by default the newest.
      ema: of a run: take the moving average of the parameters.

    Raises:
      InputError: there is no such model, or it can't be read.
    """
    name = os.path.expanduser(name)
    if checkpoints.steps(name):
        return _find_run(name, checkpoints.best_step(name) if step == "best" else step, ema)
    if (Path(name) / "metrics.jsonl").is_file() or (Path(name) / checkpoints.FOLDER).is_dir():
        raise InputError(
            f"{name}: is the workdir of a run that has saved no checkpoint yet. Name another, or let it run."
        )
    for flag, value in (("--step", step), ("--ema", ema or None)):
        if value is not None:
            raise InputError(f"{flag}: {name} isn't the workdir of a run, and has no such thing. Leave it out.")
    return _find_checkpoint(name)


def _find_checkpoint(name: str) -> ModelSource:
    checkpoint = pretrained.open_pretrained(name)
    c = dataclasses.replace(checkpoint.config, dtype="float32" if jax.default_backend() == "cpu" else "bfloat16")
    origin = {
        "config": checkpoint.json,
        "generation": checkpoint.generation,
        "dtypes": {} if checkpoint.quantized else {n: e.dtype.name for n, e in checkpoint.entries.items()},
    }
    return ModelSource(
        name=name,
        config=c,
        rules=sharding.RULES,
        tokenizer=lambda: _tokenizer(checkpoint.where),
        has_tokenizer=tokenizers.is_there(checkpoint.where),
        template="auto",
        read=lambda specs, placements: pretrained.load(checkpoint, specs, placements),
        origin=origin,
    )


def identity(name: str) -> dict[str, Any]:
    """What the parameters of a model are read from, in a few words: equal as long as they are.

    Args:
      name: see `find`.

    Returns:
      of JSON types: "step", of a run's newest checkpoint, else None; "content", a hash (see files.fingerprint).

    Raises:
      InputError: there is no such model.
    """
    if steps := checkpoints.steps(os.path.expanduser(name)):
        folder = Path(name).expanduser() / checkpoints.FOLDER / str(steps[-1])
        return {"step": steps[-1], "content": fingerprint(folder, (p for p in folder.rglob("*") if p.is_file()))}
    path = pretrained.find(name)
    if path.is_file():
        return {"step": None, "content": fingerprint(path, [path])}
    return {"step": None, "content": fingerprint(path, [path / "config.json", *path.glob("*.safetensors")])}


def _tokenizer(path: Path) -> tokenizers.Tokenizer:
    if not tokenizers.is_there(path):
        raise InputError(f"{path}: comes without a tokenizer. Copy its tokenizer.json beside the weights.")
    return tokenizers.load_pretrained(path)


def _find_run(workdir: str, step: int | None, ema: bool) -> ModelSource:
    about = wholeness.read_record(workdir)
    wholeness.check_files(workdir, about)
    with located(str(Path(workdir) / "config.json")):
        config = config_lib.parse(about["config"])
    tokenizer = tokenizers.load_tokenizer(workdir)
    c, rules = config_lib.model_config(config, tokenizer.size), sharding.make_rules(config.rules)
    model = transformer.make_model(c, rules, adapters.load(config.adapter, tokenizer=tokenizer))
    start = make_start(config, "policy", model)
    return ModelSource(
        name=workdir,
        config=added_rows.whole(model.adapter.grown(c) if model.adapter and model.adapter.grown else c),
        rules=rules,
        tokenizer=lambda: tokenizer,
        has_tokenizer=True,
        template=formats.own_template(config.data.template, bool(about.get("plain_texts"))),
        read=lambda specs, placements: runs.read_policy(workdir, start, specs, placements, step=step, ema=ema),
        origin=read_json(Path(workdir) / ORIGIN, {}),
        front=model.adapter.merged if model.adapter else None,
        holding_error=functools.partial(runs.holding_error, workdir, start),
        run_adapter=RunAdapter(workdir, config, start, step, ema) if config.adapter else None,
    )


def make_start(
    config: config_lib.Config, role: str, model: transformer.Model, bases: Mapping[str, ModelSource] | None = None
) -> Start:
    """What a role of a run begins with: the model that its section names, or random parameters.

    Args:
      config: of the run.
      role: its name.
      model: what it computes.
      bases: role -> that model, of those that have been found; others are found when they are read.
    """
    _, section = config_lib.model_section(config, role)
    adapter = config.adapter.get("init_from", "") if role == "policy" else ""
    return Start(
        role,
        model,
        config.seed,
        base=_make_base((bases or {}).get(role), section.init_from),
        new_rows=section.new_rows,
        frozen_dtype=config.frozen_dtype,
        open_adapter=functools.partial(open_adapter, adapter) if adapter else None,
    )


def _make_base(model: ModelSource | None, name: str) -> Base | None:
    if model is not None:
        return Base(model.name, lambda: model)
    return Base(name, lambda: find(name)) if name else None


def open_adapter(name: str, base: ModelSource) -> AdapterSource:
    """An adapter that has been trained; its parameters haven't been read.

    Args:
      name: a folder that PEFT or an export wrote, or the workdir of a run with an adapter.
      base: the model that it is for.

    Raises:
      InputError: there is no such adapter, its kind isn't offered here, or it is for another model.
    """
    name = os.path.expanduser(name)
    if checkpoints.steps(name):
        run = find(name).run_adapter
        if run is None:
            raise InputError(f"{name}: is a run without an adapter. Name it as the model, or name another run.")
        run.check_apart()
        return run
    if not peft.is_folder(name):
        raise InputError(
            f"{name}: is no adapter: neither a folder with adapter_config.json nor a run's workdir with a checkpoint. "
            "Name the folder that PEFT or understudy export wrote."
        )
    family, _ = save.choose(base.config, base.origin.get("config", {}))
    return peft.understand(peft.open_folder(name), family, base.config)


def adapter_options(name: str, base: ModelSource, own: Mapping[str, Any]) -> dict[str, Any]:
    """The section `adapter` of a run whose adapter goes on from a trained one.

    Args:
      name, base: see `open_adapter`.
      own: what the config says; what isn't of the parameters themselves may differ.

    Raises:
      InputError: the config says another thing than the adapter, or see `open_adapter`.
    """
    options = open_adapter(name, base).options
    defaults = adapters.defaults(options["kind"])
    for option, value in own.items():
        there = options.get(option, defaults.get(option))
        if option in ("init_from", "dropout", "decay") or value == there:
            continue
        if option == "also":
            options["also"] = value if value.startswith(f"{there}|") else "|".join(filter(None, (there, value)))
            continue
        raise InputError(f"adapter.{option} = {value!r}: {name}, which it begins with, has {there!r}. Leave it out.")
    free = {option: own[option] for option in ("dropout", "decay") if option in own}
    return {**options, **free, "init_from": name}


def name_adapters(flags: Sequence[str]) -> dict[str, str]:
    """Name -> folder or workdir, of flags [NAME=]DIR; without a name the last part of DIR is it.

    Raises:
      InputError: a name comes twice, or means the model itself.
    """
    named: dict[str, str] = {}
    for flag in flags:
        name, equals, folder = flag.partition("=")
        if not (equals and re.fullmatch(r"[\w.-]+", name)):
            name, folder = Path(flag).name, flag
        if name in named or name == BASE:
            reason = "is the model without an adapter" if name == BASE else "names two adapters"
            raise InputError(f"--adapter = {flag}: {name!r} {reason}. Name it otherwise: --adapter=NAME={folder}.")
        named[name] = folder
    return named
