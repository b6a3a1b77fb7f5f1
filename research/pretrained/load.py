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

from research import files, options, ranges
from research import params as params_lib
from research.errors import InputError, located
from research.models.config import ModelConfig
from research.ops import quantized
from research.pretrained import families
from research.pretrained.gguf_model import gguf_entries, open_gguf
from research.pretrained.safetensors_file import Entry, open_safetensors
from research.pretrained.types import PREFIX, Fields, Tensor, letters, places, stored_shape

Params = Any

_HUB_NAME = r"[\w.-]+/[\w.-]+(@[\w./-]+)?"
_IN_FLIGHT = 64 * 2**20  # bytes of tensors that may be on their way to the devices at once
_THREADS = 2
_COMPARED = 2**22  # numbers that are compared at once
_REMEDY = "Copy it anew."
# Tensors of any family that no computation of ours reads: buffers that can be computed anew.
_SPARE = r".*rotary_emb\.inv_freq|.*\.attn\.(masked_)?bias|.*attention\.(masked_bias|bias|rotary_emb\.inv_freq)"


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
    import huggingface_hub  # here: it takes 0.2 s, which most models never need

    repository, _, revision = name.partition("@")
    patterns = [
        "README.md",
        "*.json",
        "*.safetensors",
        "tokenizer.model",
        "*.jinja",
        "merges.txt",
        "vocab.*",
        "*.tiktoken",
    ]
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
    gguf = None
    if path.is_dir():
        values, where = _read_folder_config(path), str(path / "config.json")
        entries = open_safetensors(path)
    elif path.suffix == ".gguf":
        gguf = open_gguf(path)
        values, where = gguf.config, str(path)
    else:
        raise InputError(f"{path}: is neither a folder nor a .gguf file.")
    family, config = _read_config(values, where)
    if not gguf and not _copies_agree(path, family, config, entries):
        values = {**values, "tie_word_embeddings": False}
        family, config = _read_config(values, where)
    if gguf:
        entries = gguf_entries(gguf, tensor_names(family, config))
    checkpoint = Pretrained(
        where=path,
        config=config,
        family=family,
        json=values,
        generation=files.read_json(path / "generation_config.json", {}, remedy=_REMEDY) if path.is_dir() else {},
        entries=entries,
        quantized=gguf is not None,
    )
    return checkpoint._replace(entries=_checked_entries(checkpoint))


def _read_folder_config(folder: Path) -> dict[str, Any]:
    file = folder / "config.json"
    if not file.is_file():
        if gguf := sorted(folder.glob("*.gguf")):
            raise InputError(f"{folder}: holds no config.json, but {gguf[0].name}. Name that file.")
        raise InputError(f"{folder}: holds no config.json. Name a folder that transformers' save_pretrained wrote.")
    values = files.read_json(file, remedy=_REMEDY)
    if method := values.get("quantization_config"):
        method = str(method.get("quant_method", method) if isinstance(method, dict) else method)[:80]
        raise InputError(
            f"{file}: quantization_config: the weights are quantised ({method}), which is read from GGUF alone. "
            "Take a copy of the model that isn't quantised, or a .gguf file."
        )
    return values


def _read_config(values: dict[str, Any], where: str) -> tuple[ModuleType, ModelConfig]:
    """The family of a config.json and what it computes. Sets "architectures" where the file has none."""
    family = families.load(values.get("model_type", ""), where)
    architectures = values["architectures"] = values.get("architectures") or [family.ARCHITECTURES[0]]
    if not isinstance(architectures, list) or not isinstance(architectures[0], str):
        raise InputError(f"{where}: architectures = {architectures!r:.80}: must be a list of names. Copy it anew.")
    if architectures[0] not in family.ARCHITECTURES:
        raise InputError(
            f"{where}: architectures = {architectures}: of model_type {values['model_type']!r} only "
            f"{', '.join(family.ARCHITECTURES)} are read."
        )
    fields = Fields(values, where)
    prefix = fields.take_flag(PREFIX, False)
    try:
        read = family.read(fields)
    except InputError:
        raise
    except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
        raise InputError(f"{where}: its fields can't be understood ({error!r:.200}). Copy it anew.") from error
    config = make_config({**read, "prefix": prefix}, where)
    fields.finish()
    return family, config


def make_config(values: Mapping[str, Any], where: str) -> ModelConfig:
    """A ModelConfig of float32; whole numbers in place of fractions become such."""
    hints = ranges.hints(ModelConfig)
    with located(where):
        return ModelConfig(**{name: options.convert(hints[name], value, name) for name, value in values.items()})


def tensor_names(family: ModuleType, c: ModelConfig) -> list[str]:
    """The family's names of all tensors of a model."""
    return [name for tensor in family.tensors(c) for name, _ in places(tensor, c)]


def _aliases(family: ModuleType, name: str) -> list[str]:
    """A tensor's name in the files that are about: its own, with LayerNorm's first names, without the model's body."""
    old = name.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta")
    return [name, old, name.removeprefix(f"{getattr(family, 'BODY', 'model')}.")]


def _copies(family: ModuleType, c: ModelConfig) -> dict[str, str]:
    """Tensors that a file may hold a second time -> what they are copies of; a head that is tied first of all."""
    copies = dict(getattr(family, "COPIES", {}))
    if c.tie_embeddings and not c.num_labels:
        embedding = next(tensor.name for tensor in family.tensors(c) if tensor.paths == ("embed",))
        heads = tensor_names(family, dataclasses.replace(c, tie_embeddings=False))
        copies |= dict.fromkeys(set(heads).difference(tensor_names(family, c)), embedding)
    return copies


def _copies_agree(where: Path, family: ModuleType, c: ModelConfig, entries: Mapping[str, Entry]) -> bool:
    """Whether the copies that a file holds have the values of what they are copies of; else the head isn't tied.

    Raises:
      InputError: they differ, and the family has no head that isn't tied.
    """
    for copy, name in _copies(family, c).items():
        original = next((entries[a] for a in _aliases(family, name) if a in entries), None)
        if copy not in entries or original is None or _same_values(entries[copy], original):
            continue
        if copy in getattr(family, "COPIES", {}):
            raise InputError(
                f"{where}: the tensor {copy!r} has other values than {name!r}, and a model of this type has one for "
                "both. Remove the one that doesn't count, or take another copy of the model."
            )
        return False
    return True


def _same_values(a: Entry, b: Entry) -> bool:
    """Whether two tensors hold the same numbers; a part of them is compared at a time."""
    if a.shape != b.shape:
        return False
    x, y = a.read(), b.read()
    rows = max(1, _COMPARED // max(1, math.prod(a.shape[1:])))
    parts = (slice(i, i + rows) for i in range(0, a.shape[0], rows))
    return all(np.array_equal(x[part].astype(np.float64), y[part].astype(np.float64), equal_nan=True) for part in parts)


def _checked_entries(checkpoint: Pretrained) -> dict[str, Entry]:
    """The entries by the family's names. Every tensor that is needed is there with its shape, and no other is."""
    c, family, where = checkpoint.config, checkpoint.family, checkpoint.where
    known, entries = set(), {}
    for tensor in family.tensors(c):
        shape = stored_shape(tensor, c)
        for name, _ in places(tensor, c):
            alias = next((a for a in _aliases(family, name) if a in checkpoint.entries), None)
            if alias is None:
                raise InputError(
                    f"{where}: lacks the tensor {name!r}, which its config asks for. Copy the checkpoint anew."
                )
            entry = entries[name] = checkpoint.entries[alias]
            if entry.shape != shape:
                raise InputError(
                    f"{where}: tensor {alias!r} has the shape {list(entry.shape)}, and its config asks for "
                    f"{list(shape)} ({tensor.layout.split(' -> ')[0]}). Weights and config don't belong together."
                )
            known.add(alias)
    known |= _copies(family, dataclasses.replace(c, num_labels=0)).keys()
    spare = re.compile("|".join((_SPARE, *getattr(family, "SPARE", ()))))
    surplus = [name for name in checkpoint.entries if name not in known and not spare.fullmatch(name)]
    if surplus:
        raise InputError(
            f"{where}: holds {len(surplus)} tensors that a model of type {checkpoint.json['model_type']!r} doesn't "
            f"use: {', '.join(surplus[:3])}{' ...' if len(surplus) > 3 else ''}. Weights and config don't belong "
            "together."
        )
    return entries


def load(checkpoint: Pretrained, specs: Params, placements: Params) -> Params:
    """Reads the parameters, tensor by tensor, each device's part straight to that device.

    The host holds no more than the tensors on their way (128 MB, or one if it is larger; twice, where their axes are
    turned), whatever the model's size. Kernels whose specs are quantised are quantised one by one as they come.

    Args:
      checkpoint: of `open_pretrained`.
      specs: of a model with its config; give their shapes and dtypes.
      placements: a NamedSharding for each.
    """
    arrays = _Loader(checkpoint, _by_path(specs), _by_path(placements)).run()
    return jax.tree_util.tree_map_with_path(
        lambda path, _: arrays[params_lib.path_name(path)], placements, is_leaf=_is_parameter
    )


def _is_parameter(x: Any) -> bool:
    """Whether a node of a tree of specs, placements or arrays is one parameter of the model."""
    return not isinstance(x, Mapping) or quantized.kind_of(x) is not None


def _by_path(tree: Params) -> dict[str, Any]:
    """Parameters by name; a quantised kernel is one."""
    leaves = jax.tree_util.tree_leaves_with_path(tree, is_leaf=_is_parameter)
    return {params_lib.path_name(path): leaf for path, leaf in leaves}


class _Part(NamedTuple):
    """A parameter, or one layer's or expert's place `at` in its stack, on the devices."""

    path: str
    array: jax.Array
    at: tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class _Loader:
    """Reads a checkpoint. Threads read and turn tensors, one puts them into their stacks.

    Attributes:
      specs, shardings: by the path of the parameter; of a quantised kernel those of its arrays.
      arrays: what has been read, by path.
    """

    checkpoint: Pretrained
    specs: dict[str, Any]
    shardings: dict[str, Any]
    arrays: dict[str, Any] = dataclasses.field(default_factory=dict)

    def run(self) -> dict[str, jax.Array]:
        c, entries = self.checkpoint.config, self.checkpoint.entries
        work = [(tensor, name, at) for tensor in self.checkpoint.family.tensors(c) for name, at in places(tensor, c)]
        work.sort(key=lambda item: entries[item[1]].position)
        with concurrent.futures.ThreadPoolExecutor(_THREADS) as pool:
            queue: collections.deque[tuple[concurrent.futures.Future[list[_Part]], int]] = collections.deque()
            in_flight = 0
            for item in work:
                size = _bytes(entries[item[1]])
                while queue and in_flight + size > _IN_FLIGHT:  # few at a time, to bound the memory
                    future, freed = queue.popleft()
                    self._keep(future.result())
                    in_flight -= freed
                queue.append((pool.submit(self._place, *item), size))
                in_flight += size
            for future, _ in queue:
                self._keep(future.result())
        return self.arrays

    def _place(self, tensor: Tensor, name: str, at: tuple[int, ...]) -> list[_Part]:
        shapes = [_shape(self.specs[path])[len(at) :] for path in tensor.paths]
        values = split(self.checkpoint.entries[name].read(), tensor, self.checkpoint.config, shapes)
        return [
            _Part(path, _put(x, _whole(self.shardings[path]), skip=len(at)), at)
            for path, x in zip(tensor.paths, values, strict=True)
        ]

    def _keep(self, parts: list[_Part]) -> None:
        for path, x, at in parts:
            spec, sharding = self.specs[path], self.shardings[path]
            if quantized.kind_of(spec):
                self._quantize(path, x, at)
            elif at:
                self.arrays[path] = self._put_at(self.arrays.get(path), spec, sharding, x, at)
            else:
                self.arrays[path] = x if x.dtype == spec.dtype else _cast(spec.dtype, sharding)(x)
            jax.block_until_ready(self.arrays[path])

    def _quantize(self, path: str, x: jax.Array, at: tuple[int, ...]) -> None:
        """Puts a layer's or expert's kernel, which the devices hold as it was read, into its stacks."""
        specs, shardings = self.specs[path], self.shardings[path]
        kernel, stacks = (
            _quantize(tuple(specs.items()), tuple(shardings.items()), len(at))(x),
            self.arrays.get(path, {}),
        )
        self.arrays[path] = {
            name: self._put_at(stacks.get(name), spec, shardings[name], kernel[name], at)
            for name, spec in specs.items()
        }

    def _put_at(
        self,
        stack: jax.Array | None,
        spec: params_lib.ParamSpec,
        sharding: NamedSharding,
        x: jax.Array,
        at: tuple[int, ...],
    ) -> jax.Array:
        stack = _zeros(spec.shape, spec.dtype, sharding)() if stack is None else stack
        return _write(sharding)(stack, x, at)


def _shape(spec: Any) -> tuple[int, ...]:
    return quantized.shape(spec) if quantized.kind_of(spec) else spec.shape


def _whole(placement: Any) -> NamedSharding:
    """Where a kernel lies before it is quantised: as its numbers will, but for the axis within a block."""
    kind = quantized.kind_of(placement)
    if kind is None:
        return placement
    return NamedSharding(placement[kind].mesh, PartitionSpec(*placement[kind].spec[:-1]))


def _bytes(entry: Entry) -> int:
    return math.prod(entry.shape) * entry.dtype.itemsize


def split(x: np.ndarray, tensor: Tensor, c: ModelConfig, shapes: list[tuple[int, ...]]) -> list[np.ndarray]:
    """A tensor of a checkpoint as the parameters that it holds, views of it where that can be."""
    x = einops.rearrange(x, tensor.layout, **letters(tensor, c))
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
def _quantize(
    specs: tuple[tuple[str, params_lib.ParamSpec], ...], shardings: tuple[tuple[str, NamedSharding], ...], skip: int
) -> Callable[[jax.Array], dict[str, jax.Array]]:
    """Quantises one layer's kernel; `skip`: leading axes of the stacks that it will be put into."""
    where = {name: NamedSharding(s.mesh, PartitionSpec(*s.spec[skip:])) for name, s in shardings}
    return jax.jit(functools.partial(quantized.quantize, like=dict(specs)), out_shardings=where)


@functools.cache
def _cast(dtype: Any, sharding: NamedSharding) -> Callable[[jax.Array], jax.Array]:
    return jax.jit(lambda x: x.astype(dtype), out_shardings=sharding)


@functools.cache
def _write(sharding: NamedSharding) -> Callable[[jax.Array, jax.Array, tuple[int, ...]], jax.Array]:
    """Puts one layer's array into the stack, in place."""

    def write(stack: jax.Array, x: jax.Array, at: tuple[int, ...]) -> jax.Array:
        return stack.at[at].set(x.astype(stack.dtype))

    return jax.jit(write, donate_argnums=0, out_shardings=sharding)
