"""Finds a checkpoint, understands its config, and streams its tensors to where they belong."""

import collections
import concurrent.futures
import dataclasses
import functools
import math
import os
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import einops
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from research import params as params_lib
from research.errors import InputError
from research.models.config import ModelConfig
from research.pretrained import families
from research.pretrained.readers import Entry, gguf_entries, open_gguf, open_safetensors, read_json
from research.pretrained.types import Fields, Tensor, letters, places, sizes, their_shape

Params = Any

_HUB_NAME = r"[\w.-]+/[\w.-]+(@[\w./-]+)?"
_IN_FLIGHT = 64 * 2**20  # bytes of tensors that may be on their way to the devices at once
_THREADS = 2
# Tensors that some checkpoints hold and no computation of ours reads: buffers that are made anew, heads of pretraining.
_SPARE = re.compile(
    r".*rotary_emb\.inv_freq|.*\.attn\.(masked_)?bias|.*attention\.(masked_bias|bias|rotary_emb\.inv_freq)|"
    r".*embeddings\.position_ids|bert\.pooler\..*|cls\.seq_relationship\..*|cls\.predictions\.decoder\.(weight|bias)"
)


class Pretrained(NamedTuple):
    """A checkpoint that has been found and understood; no tensor has been read.

    Attributes:
      where: the folder or file.
      config: what it computes, in float32.
      family: its module.
      json: its config.json, to be written again by an export; of a GGUF file, what would say the same.
      generation: its generation_config.json.
      entries: its tensors by the names of transformers.
      quantized: its tensors were dequantised, so that their dtype isn't that of an export.
    """

    where: Path
    config: ModelConfig
    family: ModuleType
    json: dict[str, Any]
    generation: dict[str, Any]
    entries: dict[str, Entry]
    quantized: bool


def find(name: str) -> Path:
    """The folder or .gguf file that `name` stands for: a path, or a hub name NAME/MODEL[@REVISION], which is downloaded
    into the hub's cache, or found there.

    Raises:
      InputError: there is no such file, or the hub can't be reached and its cache doesn't hold the model.
    """
    path = Path(name).expanduser()
    if path.exists() or path.suffix == ".gguf" or name.startswith((".", "/", "~")) or not re.fullmatch(_HUB_NAME, name):
        if not path.exists():
            raise InputError(
                f"{name}: no such file or folder, and no hub name either (NAME/MODEL or NAME/MODEL@REVISION)."
            )
        return path
    import huggingface_hub

    repository, _, revision = name.partition("@")
    patterns = ["*.json", "*.safetensors", "tokenizer.model", "*.jinja", "merges.txt", "vocab.*", "*.tiktoken"]
    try:
        return Path(huggingface_hub.snapshot_download(repository, revision=revision or None, allow_patterns=patterns))
    except Exception as error:  # offline, unknown, gated, interrupted: each of its own class
        offline = " HF_HUB_OFFLINE is set." if os.environ.get("HF_HUB_OFFLINE") else ""
        reason = (str(error).strip().splitlines() or [""])[0][:200]
        raise InputError(
            f"{name}: there is no such folder, and it couldn't be had from the hub ({type(error).__name__}: {reason})."
            f"{offline} Check the name and the network, or give the path of a folder."
        ) from error


def open_pretrained(name: str) -> Pretrained:
    """Reads a checkpoint's config, and checks that its tensors are those that the config asks for.

    Args:
      name: a folder as transformers saves it, a .gguf file, or a hub name (see `find`).

    Raises:
      InputError: it isn't there, is damaged or incomplete, or is of an architecture or with a field that isn't known.
    """
    path = find(name)
    if path.is_dir():
        file = path / "config.json"
        if not file.is_file():
            raise InputError(f"{path}: holds no config.json. Name a folder that transformers' save_pretrained wrote.")
        values = read_json(file)
        where = str(file)
        if method := values.get("quantization_config"):
            method = method.get("quant_method", method) if isinstance(method, dict) else method
            raise InputError(
                f"{where}: quantization_config: the weights are quantised ({method}), which is read from GGUF alone. "
                "Take a copy of the model that isn't quantised, or a .gguf file."
            )
        entries = open_safetensors(path)
    elif path.suffix == ".gguf":
        gguf = open_gguf(path)
        values, where = gguf.config, str(path)
    else:
        raise InputError(f"{path}: is neither a folder nor a .gguf file.")
    family = families.load(values.get("model_type", ""), where)
    architectures = values["architectures"] = values.get("architectures") or [family.ARCHITECTURES[0]]
    if architectures[0] not in family.ARCHITECTURES:
        raise InputError(
            f"{where}: architectures = {architectures}: of model_type {values['model_type']!r} only "
            f"{', '.join(family.ARCHITECTURES)} are read."
        )
    fields = Fields(values, where)
    config = make_config(family.read(fields), where)
    fields.finish()
    if path.suffix == ".gguf":
        entries = gguf_entries(gguf, [name for tensor in family.tensors(config) for name, _ in places(tensor, config)])
    generation = path / "generation_config.json"
    found = Pretrained(
        where=path,
        config=config,
        family=family,
        json=values,
        generation=read_json(generation) if path.is_dir() and generation.is_file() else {},
        entries=entries,
        quantized=path.suffix == ".gguf",
    )
    _check(found)
    return found._replace(entries=_renamed(found))


def make_config(values: Mapping[str, Any], where: str) -> ModelConfig:
    """A ModelConfig of float32; whole numbers in place of fractions become such."""
    kinds = {f.name: type(f.default) for f in dataclasses.fields(ModelConfig)}
    values = {k: float(v) if kinds[k] is float else v for k, v in values.items()}
    try:
        return ModelConfig(**values)
    except InputError as error:
        raise InputError(f"{where}: {error}") from error


def _aliases(name: str) -> list[str]:
    """Other names for the same: without the name of the model's body, and BERT's first names of LayerNorm's arrays."""
    old = name.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta")
    return [name, old, re.sub(r"^(model|transformer|gpt_neox|bert)\.", "", name)]


def _renamed(found: Pretrained) -> dict[str, Entry]:
    """The entries by the family's own names."""
    names = [name for tensor in found.family.tensors(found.config) for name, _ in places(tensor, found.config)]
    return {name: found.entries[next(a for a in _aliases(name) if a in found.entries)] for name in names}


def _check(found: Pretrained) -> None:
    """Every tensor that is needed is there with its shape, and none is there that isn't needed."""
    size, used = sizes(found.config), set()
    for tensor in found.family.tensors(found.config):
        wanted = their_shape(tensor.layout, size)
        for name, _ in places(tensor, found.config):
            known = next((a for a in _aliases(name) if a in found.entries), None)
            if known is None:
                raise InputError(
                    f"{found.where}: lacks the tensor {name!r}, which its config asks for. Copy the checkpoint anew."
                )
            if found.entries[known].shape != wanted:
                raise InputError(
                    f"{found.where}: tensor {known!r} has the shape {list(found.entries[known].shape)}, and its config "
                    f"asks for {list(wanted)} ({tensor.layout.split(' -> ')[0]}). Weights and config don't belong "
                    "together."
                )
            used.add(known)
    tied = {"lm_head.weight", "embed_out.weight"} if found.config.tie_embeddings else set()
    spare = [name for name in found.entries if name not in used | tied and not _SPARE.fullmatch(name)]
    if spare:
        raise InputError(
            f"{found.where}: holds {len(spare)} tensors that a model of type {found.json['model_type']!r} doesn't use: "
            f"{', '.join(spare[:3])}{' ...' if len(spare) > 3 else ''}. Weights and config don't belong together."
        )


def load(found: Pretrained, specs: Params, placements: Params) -> Params:
    """Reads the parameters, tensor by tensor, each device's part straight to that device.

    The host holds no more than the tensors on their way (128 MB, or one if it is larger; twice, where their axes are
    turned), whatever the model's size.

    Args:
      found: the checkpoint.
      specs: of a model with its config; give their shapes and dtypes.
      placements: a NamedSharding for each.
    """
    c = found.config
    flat = {
        params_lib.path_name(p): s for p, s in jax.tree_util.tree_leaves_with_path(specs, is_leaf=params_lib.is_spec)
    }
    where = {params_lib.path_name(p): s for p, s in jax.tree_util.tree_leaves_with_path(placements)}
    work = [(tensor, name, at) for tensor in found.family.tensors(c) for name, at in places(tensor, c)]
    work.sort(key=lambda w: found.entries[w[1]].position)
    arrays: dict[str, jax.Array] = {}

    def place(tensor: Tensor, name: str, at: tuple[int, ...]) -> list[tuple[str, jax.Array, tuple[int, ...]]]:
        pieces = _split(found.entries[name].read(), tensor, c, [flat[path].shape[len(at) :] for path in tensor.paths])
        return [(path, _put(x, where[path], skip=len(at)), at) for path, x in zip(tensor.paths, pieces, strict=True)]

    def keep(pieces: list[tuple[str, jax.Array, tuple[int, ...]]]) -> None:
        for path, x, at in pieces:
            spec, sharding = flat[path], where[path]
            if path not in arrays and at:
                arrays[path] = _zeros(spec.shape, spec.dtype, sharding)()
            arrays[path] = (
                _write(sharding)(arrays[path], x, at)
                if at
                else x
                if x.dtype == spec.dtype
                else _cast(spec.dtype, sharding)(x)
            )
            arrays[path].block_until_ready()

    # Threads read and turn tensors, this one puts them into their stacks; few at a time, to bound the memory.
    with concurrent.futures.ThreadPoolExecutor(_THREADS) as pool:
        coming: collections.deque = collections.deque()
        waiting = 0
        for item in work:
            size = _bytes(found.entries[item[1]])
            while coming and waiting + size > _IN_FLIGHT:
                done, freed = coming.popleft()
                keep(done.result())
                waiting -= freed
            coming.append((pool.submit(place, *item), size))
            waiting += size
        for done, _ in coming:
            keep(done.result())
    return jax.tree_util.tree_map_with_path(lambda path, _: arrays[params_lib.path_name(path)], placements)


def _bytes(entry: Entry) -> int:
    return math.prod(entry.shape) * entry.dtype.itemsize


def _split(x: np.ndarray, tensor: Tensor, c: ModelConfig, shapes: list[tuple[int, ...]]) -> list[np.ndarray]:
    """A tensor of a checkpoint as the parameters that it holds, views of it where that can be."""
    x = einops.rearrange(x, tensor.layout, **letters(tensor.layout, c))
    ends = np.cumsum([shape[tensor.axis] for shape in shapes])[:-1]
    return np.split(x, ends, axis=tensor.axis) if len(shapes) > 1 else [x]


def _put(x: np.ndarray, sharding: NamedSharding, skip: int) -> jax.Array:
    """To the devices, each its part; `skip`: leading axes of the stack that `x` will be put into."""
    rest = NamedSharding(sharding.mesh, PartitionSpec(*sharding.spec[skip:]))
    parts: dict[str, np.ndarray] = {}  # devices that hold the same share one copy

    def part(index: tuple[slice, ...]) -> np.ndarray:
        return parts.setdefault(str(index), _aligned(x[index]))

    return jax.make_array_from_callback(x.shape, rest, part)


def _aligned(x: np.ndarray) -> np.ndarray:
    """A copy that starts at a multiple of 64 bytes, which the CPU's devices then share and don't copy again."""
    memory = np.empty(x.nbytes + 64, np.uint8)
    start = -memory.ctypes.data % 64
    copy = memory[start : start + x.nbytes].view(x.dtype).reshape(x.shape)
    if x.ndim and x.strides[-1] > x.itemsize:  # numpy reads a turned array against its grain; strips keep to the cache
        for i in range(0, x.shape[-1], 16):
            copy[..., i : i + 16] = x[..., i : i + 16]
    else:
        np.copyto(copy, x)
    return copy


@functools.cache
def _zeros(shape: tuple[int, ...], dtype: Any, sharding: NamedSharding) -> Callable[[], jax.Array]:
    return jax.jit(lambda: jnp.zeros(shape, dtype), out_shardings=sharding)


@functools.cache
def _cast(dtype: Any, sharding: NamedSharding) -> Callable[[jax.Array], jax.Array]:
    return jax.jit(lambda x: x.astype(dtype), out_shardings=sharding)


@functools.cache
def _write(sharding: NamedSharding) -> Callable[[jax.Array, jax.Array, tuple[int, ...]], jax.Array]:
    """Puts one layer's array into the stack, in place."""

    def write(stack: jax.Array, x: jax.Array, at: tuple[int, ...]) -> jax.Array:
        return stack.at[at].set(x.astype(stack.dtype))

    return jax.jit(write, donate_argnums=0, out_shardings=sharding)
