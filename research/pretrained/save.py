"""Writes a model as transformers does: config.json, and safetensors in shards."""

import dataclasses
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import einops
import jax
import ml_dtypes  # numpy learns the name bfloat16 from it
import numpy as np
import safetensors.numpy

from research import params as params_lib
from research.errors import InputError
from research.models.config import ModelConfig
from research.pretrained import families
from research.pretrained.load import make_config
from research.pretrained.types import PREFIX, Fields, Tensor, letters, places

Params = Any

_CLASSIFIER = "ForSequenceClassification"
# Fields of ModelConfig on how a model runs or began, which no config.json has.
_NOT_EXPORTED = ("init_std", "remat", "attention", "dtype", "precision")


def choose(c: ModelConfig, origin: dict[str, Any]) -> tuple[ModuleType, dict[str, Any]]:
    """The family that can hold a model, and its config.json, which of a prefix LM says so to us alone.

    Args:
      c: what the model computes.
      origin: the config.json that it began with; empty for a model that began with us.

    Raises:
      InputError: no family can.
    """
    causal = dataclasses.replace(c, prefix=False)
    family, written = _choose(causal, {name: value for name, value in origin.items() if name != PREFIX})
    return family, {**written, PREFIX: True} if c.prefix else written


def _choose(c: ModelConfig, origin: dict[str, Any]) -> tuple[ModuleType, dict[str, Any]]:
    if origin:
        family = families.load(origin["model_type"], "the checkpoint that the run began with")
        if _same(_read(family, origin), c):
            return family, origin
        old = ("rope_parameters", "rope_scaling", "layer_types", "id2label", "label2id", "num_labels")
        rest = {k: v for k, v in origin.items() if k not in old}
        written = {**rest, **family.write(c)}
        if bool(c.num_labels) != origin.get("architectures", [""])[0].endswith(_CLASSIFIER):
            written["architectures"] = [_architecture(family, c)]
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
        readable = _read(family, written)
        if _same(readable, c):
            return family, written
        closest = closest or _difference(readable, c)
    raise InputError(
        f"model: no architecture that transformers knows computes this: {closest} differs from Llama's, and no other "
        "fits. Choose the fields of one of " + ", ".join(families.names()) + " to export a model."
    )


def _architecture(family: ModuleType, c: ModelConfig) -> str:
    suffix = _CLASSIFIER if c.num_labels else ""
    return next((a for a in family.ARCHITECTURES if a.endswith(suffix)), family.ARCHITECTURES[0])


def _read(family: ModuleType, values: dict[str, Any]) -> ModelConfig | None:
    try:
        return make_config(family.read(Fields(json.loads(json.dumps(values)), "config.json")), "config.json")
    except InputError:
        return None


def _difference(a: ModelConfig | None, b: ModelConfig) -> str:
    if a is None:
        return "the model"
    fields = [
        f.name
        for f in dataclasses.fields(b)
        if f.name not in _NOT_EXPORTED and getattr(a, f.name) != getattr(b, f.name)
    ]
    return ", ".join(f"model.{name} = {getattr(b, name)!r}" for name in fields)


def _same(a: ModelConfig | None, b: ModelConfig) -> bool:
    return a is not None and not _difference(a, b)


class Saved(NamedTuple):
    """What was written: the bytes of each dtype, and the names of tensors that hold NaN or infinity."""

    sizes: dict[str, int]
    not_finite: tuple[str, ...]


def save(
    folder: Path,
    family: ModuleType,
    c: ModelConfig,
    values: Params,
    dtype: Callable[[str], str],
    max_shard_bytes: int,
) -> Saved:
    """Writes the tensors, no more than a shard of them in memory at once.

    Args:
      folder: to write to; exists.
      family: whose names and layouts.
      c: of the model.
      values: its parameters.
      dtype: name of a tensor -> its dtype: "float32", "bfloat16" or "float16".
      max_shard_bytes: a new file is begun before one grows above this.

    Returns:
      what was written.

    Raises:
      InputError: a tensor has a finite value that its dtype can't hold.
    """
    writer = _Writer(folder, max_shard_bytes)
    not_finite: list[str] = []
    for name, x in tensors(family, c, values):
        with np.errstate(over="ignore"):
            written = np.ascontiguousarray(x.astype(dtype(name)))
        if not np.isfinite(written).all():
            _check_range(name, x, written)
            not_finite.append(name)
        writer.add(name, written)
    return Saved(writer.finish(), tuple(not_finite))


def tensors(family: ModuleType, c: ModelConfig, values: Params) -> Iterator[tuple[str, np.ndarray]]:
    """The tensors of a checkpoint, one at a time: their names and values.

    Args: see `save`.
    """
    flat = {params_lib.path_name(p): x for p, x in jax.tree_util.tree_leaves_with_path(values)}
    for tensor in family.tensors(c):
        for name, at in places(tensor, c):
            parts = [np.asarray(flat[path][at] if at else flat[path]) for path in tensor.paths]
            yield name, join(parts, tensor, c)


def _check_range(name: str, x: np.ndarray, written: np.ndarray) -> None:
    """Raises InputError where a finite value of `x` isn't one in the dtype of `written`."""
    lost = x[np.isfinite(x) & ~np.isfinite(written)]
    if lost.size:
        dtype = written.dtype.name
        wider = "float32" if dtype == "bfloat16" else "bfloat16 or float32"
        raise InputError(
            f"{name}: its largest value is {np.abs(lost).max():.6g}, and {dtype} ends at "
            f"{float(ml_dtypes.finfo(written.dtype).max):.6g}. Export with --dtype={wider}."
        )


class _Writer:
    """Writes tensors into safetensors files, and an index where there are several."""

    def __init__(self, folder: Path, max_shard_bytes: int):
        self._folder, self._max_shard_bytes = folder, max_shard_bytes
        self._shard: dict[str, np.ndarray] = {}
        self._files: list[Path] = []
        self._file_of: dict[str, int] = {}
        self._sizes: dict[str, int] = {}

    def add(self, name: str, array: np.ndarray) -> None:
        if self._shard and sum(x.nbytes for x in self._shard.values()) + array.nbytes > self._max_shard_bytes:
            self._write()
        self._shard[name] = array
        self._file_of[name] = len(self._files)
        self._sizes[array.dtype.name] = self._sizes.get(array.dtype.name, 0) + array.nbytes

    def finish(self) -> dict[str, int]:
        """Writes what is left and names the files; returns dtype -> bytes written."""
        self._write()
        n = len(self._files)
        names = [f"model-{i:05d}-of-{n:05d}.safetensors" for i in range(1, n + 1)] if n > 1 else ["model.safetensors"]
        for file, name in zip(self._files, names, strict=True):
            file.rename(self._folder / name).chmod(0o644)  # safetensors makes it readable by its owner alone
        if n > 1:
            index = {
                "metadata": {"total_size": sum(self._sizes.values())},
                "weight_map": {name: names[i] for name, i in sorted(self._file_of.items())},
            }
            (self._folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")
        return self._sizes

    def _write(self) -> None:
        self._files.append(self._folder / f"shard-{len(self._files)}")
        safetensors.numpy.save_file(self._shard, self._files[-1], metadata={"format": "pt"})
        self._shard = {}


def join(parts: list[np.ndarray], tensor: Tensor, c: ModelConfig) -> np.ndarray:
    """The tensor of a checkpoint that holds these parameters: the inverse of load.split."""
    stored, ours = tensor.layout.split(" -> ")
    x = np.concatenate(parts, axis=tensor.axis) if len(parts) > 1 else parts[0]
    return einops.rearrange(x, f"{ours} -> {stored}", **letters(tensor, c))
