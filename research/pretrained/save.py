"""Writes a model as transformers does: config.json, and safetensors in shards."""

import dataclasses
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import einops
import jax
import ml_dtypes  # noqa: F401  (numpy learns the name bfloat16 from it)
import numpy as np
import safetensors.numpy

from research import params as params_lib
from research.errors import InputError
from research.models.config import ModelConfig
from research.pretrained import families
from research.pretrained.load import make_config
from research.pretrained.types import Fields, Tensor, letters, places

Params = Any

# Of how it runs or began, which no config.json speaks of.
_OURS = ("init_std", "remat", "attention", "dtype")


def choose(c: ModelConfig, origin: dict[str, Any]) -> tuple[ModuleType, dict[str, Any]]:
    """The family that can hold a model, and its config.json.

    Args:
      c: what the model computes.
      origin: the config.json that it began with; empty for a model that began with us.

    Raises:
      InputError: no family can.
    """
    if origin:
        family = families.load(origin["model_type"], "the checkpoint that the run began with")
        if _same(_read(family, origin), c):
            return family, origin
        rest = {k: v for k, v in origin.items() if k not in ("rope_parameters", "rope_scaling", "layer_types")}
        written = {**rest, **family.write(c)}
        if _same(_read(family, written), c):
            return family, written
        raise InputError(
            f"model: {_difference(_read(family, written), c)}, which {origin['model_type']!r} can't say. "
            "Leave the field at the checkpoint's value."
        )
    closest = None
    for name in sorted(families.names(), key=lambda name: name != "llama"):
        family = families.load(name, name)
        written = {"model_type": name, "architectures": [_architecture(family, c)], **family.write(c)}
        found = _read(family, written)
        if _same(found, c):
            return family, written
        closest = closest or _difference(found, c)
    raise InputError(
        f"model: no architecture that transformers knows computes this: {closest} differs from Llama's, and no other "
        "fits. Choose the fields of one of " + ", ".join(families.names()) + " to export a model."
    )


def _architecture(family: ModuleType, c: ModelConfig) -> str:
    wanted = "ForSequenceClassification" if c.num_labels else ""
    return next((a for a in family.ARCHITECTURES if a.endswith(wanted)), family.ARCHITECTURES[0])


def _read(family: ModuleType, values: dict[str, Any]) -> ModelConfig | None:
    try:
        return make_config(family.read(Fields(json.loads(json.dumps(values)), "config.json")), "config.json")
    except InputError:
        return None


def _difference(a: ModelConfig | None, b: ModelConfig) -> str:
    if a is None:
        return "the model"
    fields = [f.name for f in dataclasses.fields(b) if f.name not in _OURS and getattr(a, f.name) != getattr(b, f.name)]
    return ", ".join(f"model.{name} = {getattr(b, name)!r}" for name in fields)


def _same(a: ModelConfig | None, b: ModelConfig) -> bool:
    return a is not None and not _difference(a, b)


def save(
    folder: Path,
    family: ModuleType,
    c: ModelConfig,
    values: Params,
    dtype: Callable[[str], str],
    max_shard_bytes: int,
) -> dict[str, int]:
    """Writes the tensors, no more than a shard of them in memory at once.

    Args:
      folder: to write to; exists.
      family: whose names and layouts.
      c: of the model.
      values: its parameters.
      dtype: name of a tensor -> its dtype: "float32", "bfloat16" or "float16".
      max_shard_bytes: a new file is begun before one grows above this.

    Returns:
      dtype -> bytes written.
    """
    flat = {params_lib.path_name(p): x for p, x in jax.tree_util.tree_leaves_with_path(values)}
    shards: list[dict[str, np.ndarray]] = [{}]
    files: list[Path] = []
    where: dict[str, int] = {}
    total: dict[str, int] = {}

    def write() -> None:
        files.append(folder / f"shard-{len(files)}")
        safetensors.numpy.save_file(shards.pop(), files[-1], metadata={"format": "pt"})

    for tensor, name, at in _tensors(family, c):
        kind = dtype(name)
        array = _join([np.asarray(flat[path][at] if at else flat[path]) for path in tensor.paths], tensor, c)
        array = np.ascontiguousarray(array.astype(kind))
        if shards[0] and sum(x.nbytes for x in shards[0].values()) + array.nbytes > max_shard_bytes:
            write()
            shards.append({})
        shards[0][name] = array
        where[name] = len(files)
        total[kind] = total.get(kind, 0) + array.nbytes
    write()
    names = [f"model-{i:05d}-of-{len(files):05d}.safetensors" for i in range(1, len(files) + 1)]
    names = names if len(files) > 1 else ["model.safetensors"]
    for file, name in zip(files, names, strict=True):
        file.rename(folder / name).chmod(0o644)  # safetensors makes it readable by its owner alone
    if len(files) > 1:
        index = {
            "metadata": {"total_size": sum(total.values())},
            "weight_map": {name: names[i] for name, i in sorted(where.items())},
        }
        (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")
    return total


def _tensors(family: ModuleType, c: ModelConfig) -> Iterator[tuple[Tensor, str, tuple[int, ...]]]:
    return ((tensor, name, at) for tensor in family.tensors(c) for name, at in places(tensor, c))


def _join(parts: list[np.ndarray], tensor: Tensor, c: ModelConfig) -> np.ndarray:
    """Parameters of ours as the one tensor of theirs: the inverse of load._split."""
    theirs, ours = tensor.layout.split(" -> ")
    x = np.concatenate(parts, axis=tensor.axis) if len(parts) > 1 else parts[0]
    return einops.rearrange(x, f"{ours} -> {theirs}", **letters(tensor.layout, c))
