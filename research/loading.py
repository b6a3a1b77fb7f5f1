"""Models by name, wherever they come from: a run of ours, a Hugging Face folder or hub name, a .gguf file."""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax

from research import config as config_lib
from research import files, params
from research.devices import sharding
from research.errors import InputError
from research.models import transformer
from research.models.config import ModelConfig
from research.pretrained import load as pretrained
from research.run import checkpoint
from research.sources import tokenizers

ORIGIN = "origin.json"  # in a workdir: the config.json and dtypes of the checkpoint that the run began with


class Found(NamedTuple):
    """A model that has been found; its parameters haven't been read.

    Attributes:
      name: as it was asked for.
      config: what it computes, in the default dtype of this process's devices.
      rules: logical axis -> mesh axis.
      tokenizer: () -> its tokenizer; raises InputError where there is none.
      template: how prompts are put to it.
      read: (specs, placements) -> parameters, in the specs' dtypes.
      origin: what an export writes again: {"config", "generation", "dtypes"}; empty for a model that began with us.
    """

    name: str
    config: ModelConfig
    rules: dict[str, Any]
    tokenizer: Callable[[], tokenizers.Tokenizer]
    has_tokenizer: bool
    template: str
    read: Callable[[Any, Any], Any]
    origin: dict[str, Any]


def find(name: str, *, step: int | str | None = None, ema: bool = False) -> Found:
    """Finds a model and reads what it computes.

    Args:
      name: a run's workdir, a folder as transformers saves it, a hub name (NAME/MODEL or NAME/MODEL@REVISION), or a
        .gguf file.
      step: of a run: which of its checkpoints, or "best" by its checkpoint.best_metric; by default the newest.
      ema: of a run: take the moving average of the parameters.

    Raises:
      InputError: there is no such model, or it can't be read.
    """
    if checkpoint.steps(name):
        return _find_run(name, checkpoint.best_step(name) if step == "best" else step, ema)
    if (Path(name) / "metrics.jsonl").is_file() or (Path(name) / checkpoint.FOLDER).is_dir():
        raise InputError(
            f"{name}: is the workdir of a run that has saved no checkpoint yet. Name another, or let it run."
        )
    for flag, given in (("--step", step is not None), ("--ema", ema)):
        if given:
            raise InputError(f"{flag}: {name} isn't the workdir of a run, and has no such thing. Leave it out.")
    found = pretrained.open_pretrained(name)
    c = dataclasses.replace(found.config, dtype="float32" if jax.default_backend() == "cpu" else "bfloat16")
    origin = {
        "config": found.json,
        "generation": found.generation,
        "dtypes": {} if found.quantized else {n: e.dtype.name for n, e in found.entries.items()},
    }
    return Found(
        name=name,
        config=c,
        rules=sharding.RULES,
        tokenizer=lambda: _tokenizer(found.where),
        has_tokenizer=tokenizers.is_there(found.where),
        template="auto",
        read=lambda specs, placements: pretrained.load(found, specs, placements),
        origin=origin,
    )


def _tokenizer(path: Path) -> tokenizers.Tokenizer:
    if not tokenizers.is_there(path):
        raise InputError(f"{path}: comes without a tokenizer. Copy its tokenizer.json beside the weights.")
    return tokenizers.load_pretrained(path)


def _find_run(workdir: str, step: int | None, ema: bool) -> Found:
    record = Path(workdir) / "config.json"
    if not record.is_file():
        raise InputError(f"{workdir}: lacks config.json, which a run writes beside its checkpoints.")
    config = config_lib.parse(files.read_json(record)["config"])
    tokenizer = tokenizers.load_tokenizer(workdir)

    def read(specs: Any, placements: Any) -> Any:
        like = params.abstract(specs, placements)
        return checkpoint.restore_params(workdir, {"policy": like}, step=step, ema=ema)[0]["policy"]

    origin = Path(workdir) / ORIGIN
    return Found(
        name=workdir,
        config=config_lib.model_config(config, tokenizer.size),
        rules=sharding.make_rules(config.rules),
        tokenizer=lambda: tokenizer,
        has_tokenizer=True,
        template=config.data["template"],
        read=read,
        origin=files.read_json(origin, {}),
    )


class LoadedModel(NamedTuple):
    """A model, ready to run. `template` is how prompts are put to it (sources.formats). `tokenizer` is None only where
    `load_model` was told that none is needed, and the model comes with none."""

    model: transformer.Model
    params: Any
    tokenizer: tokenizers.Tokenizer | None
    template: str
    mesh: jax.sharding.Mesh


def load_model(
    name: str,
    *,
    step: int | str | None = None,
    ema: bool = False,
    mesh: jax.sharding.Mesh | None = None,
    needs_tokenizer: bool = True,
) -> LoadedModel:
    """Reads a model to run it; kernels are held in the compute dtype.

    Args:
      name, step, ema: see `find`.
      mesh: to lay the parameters out on; by default one device.
      needs_tokenizer: else the model may come without one.

    Raises:
      InputError: there is no such model, it can't be read, or its tokenizer doesn't fit it.
    """
    found = find(name, step=step, ema=ema)
    mesh = mesh or sharding.make_mesh({}, jax.devices()[:1])
    model = transformer.make_model(found.config, found.rules)
    tokenizer = found.tokenizer() if needs_tokenizer or found.has_tokenizer else None
    if tokenizer is not None:
        check_vocabulary(name, tokenizer, found.config)
    specs = transformer.in_compute_dtype(model)
    values = found.read(specs, params.shardings(specs, mesh, found.rules))
    return LoadedModel(model, values, tokenizer, found.template, mesh)


def check_vocabulary(name: str, tokenizer: tokenizers.Tokenizer, c: ModelConfig) -> None:
    """Raises InputError where the tokenizer gives ids that the model has no embedding for."""
    if tokenizer.size > c.vocab_size:
        raise InputError(
            f"{name}: its tokenizer has {tokenizer.size} tokens, and its embedding {c.vocab_size} rows. They don't "
            "belong together: take both from one copy of the model."
        )


def check_reads(field: str, found: Found, tokenizer: tokenizers.Tokenizer) -> None:
    """Raises InputError where a model that is given the ids of `tokenizer` would take them for other tokens.

    A model without a tokenizer is taken at its word if it has an embedding for every id.
    """
    if not found.has_tokenizer:
        return check_vocabulary(f"{field} = {found.name}", tokenizer, found.config)
    theirs, ours = found.tokenizer().backend.get_vocab(), tokenizer.backend.get_vocab()
    if theirs == ours:
        return None
    token, _ = min(ours.items() - theirs.items() or theirs.items() - ours.items(), key=lambda item: item[1])
    known = f"{token!r} is {ours.get(token, 'unknown')} to the policy and {theirs.get(token, 'unknown')} to it"
    raise InputError(
        f"{field}.init_from = {found.name}: has another tokenizer than the policy, with {len(theirs)} tokens for "
        f"{len(ours)}: {known}. Give the policy its tokenizer (tokenizer.kind), distil across tokenizers "
        "(objective.distill.kind='uld'), or train on what it writes (understudy generate, then sft)."
    )
