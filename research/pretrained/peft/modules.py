"""The linear maps of a model in the terms of PEFT, which changes modules of transformers by their names.

A module's weight may hold several maps of ours: q, k and v, or gate and up. A family's table of tensors says which.
Letters: r rank; the others are those of pretrained.types.sizes.
"""

import dataclasses
import functools
import re
from collections.abc import Iterator
from types import ModuleType

import einops
import numpy as np

from research import params
from research.errors import InputError
from research.models import transformer
from research.models.config import ModelConfig
from research.models.specs import Specs
from research.pretrained import load
from research.pretrained.types import Tensor, letters, places, stored_shape

_AXIS = re.compile(r"\([^)]*\)|\w+")


@dataclasses.dataclass(frozen=True)
class Module:
    """A linear map of transformers, or its embedding, and the maps of ours that its weight holds.

    Attributes:
      tensor: its weight; the name ends in ".weight".
      paths: of our maps, such as ("layers/attention/q",); of the embedding ("embed",).
      shapes: of our kernels, without layers.
      num_in: how many of a kernel's axes are summed over.
      c: of the model.
    """

    tensor: Tensor
    paths: tuple[str, ...]
    shapes: tuple[tuple[int, ...], ...]
    num_in: int
    c: ModelConfig

    num_lead = 0  # how many of a kernel's axes come before those that are summed over

    @property
    def name(self) -> str:
        """With {layer} for its number."""
        return self.tensor.name.removesuffix(".weight")

    @property
    def places(self) -> list[tuple[str, tuple[int, ...]]]:
        """The name of each module, and where it is in our stack of layers."""
        return [(name.removesuffix(".weight"), at) for name, at in places(self.tensor, self.c)]

    @functools.cached_property
    def _sides(self) -> tuple[str, list[str], str, list[str], bool]:
        """The inputs' axis in the checkpoint, and ours; the outputs'; whether the inputs come first there."""
        stored, ours = (_AXIS.findall(side) for side in self.tensor.layout.split(" -> "))
        ins, outs = ours[: self.num_in], ours[self.num_in :]
        first = _names(stored[0]) == _names(*ins)
        return *((stored[0], ins, stored[1], outs) if first else (stored[1], ins, stored[0], outs)), first

    @property
    def inputs_first(self) -> bool:
        """Whether its weight is stored as [in, out], which PEFT calls fan_in_fan_out."""
        return self._sides[-1]

    @property
    def ins(self) -> int:
        """The number of inputs."""
        return int(np.prod(self.shapes[0][: self.num_in]))

    @property
    def outs(self) -> int:
        """The number of outputs, of all maps together."""
        return sum(int(np.prod(shape[self.num_in :])) for shape in self.shapes)

    def rank(self, a: tuple[int, ...]) -> int:
        """The rank, of an A of this shape in PEFT."""
        return a[0]

    def read_inputs(self, x: np.ndarray) -> np.ndarray:
        """[r, in] of PEFT -> ours [*in, r]."""
        stored, ins, *_ = self._sides
        return self._turn(x, f"r {stored} -> {' '.join(ins)} r")

    def write_inputs(self, x: np.ndarray) -> np.ndarray:
        """Undoes `read_inputs`."""
        stored, ins, *_ = self._sides
        return self._turn(x, f"{' '.join(ins)} r -> r {stored}")

    def read_outputs(self, x: np.ndarray) -> list[np.ndarray]:
        """[out, r] of PEFT -> [r, *out] for each of our maps."""
        _, _, stored, outs, _ = self._sides
        x = self._turn(x, f"{stored} r -> r {' '.join(outs)}")
        axis = self._axis
        ends = np.cumsum([shape[self.tensor.axis] for shape in self.shapes])[:-1]
        return np.split(x, ends, axis) if len(self.shapes) > 1 else [x]

    def write_outputs(self, parts: list[np.ndarray]) -> np.ndarray:
        """Undoes `read_outputs`."""
        _, _, stored, outs, _ = self._sides
        x = np.concatenate(parts, self._axis) if len(parts) > 1 else parts[0]
        return self._turn(x, f"r {' '.join(outs)} -> {stored} r")

    @property
    def _axis(self) -> int:
        """Along which our maps follow each other, of [r, *out]."""
        return self.tensor.axis - self.num_in + 1

    def _turn(self, x: np.ndarray, layout: str) -> np.ndarray:
        sizes = {name: size for name, size in letters(self.tensor, self.c).items() if name in _names(layout)}
        return einops.rearrange(x, layout, **sizes)


def _names(*axes: str) -> set[str]:
    return set(re.findall(r"\w+", " ".join(axes)))


def modules(family: ModuleType, c: ModelConfig) -> list[Module]:
    """The linear maps of a model but experts', and its embedding."""
    specs = transformer.make_specs(c)
    maps = []
    for tensor in family.tensors(c):
        kernels = all(path.endswith("/kernel") for path in tensor.paths) or tensor.paths == ("embed",)
        if not kernels or "{expert}" in tensor.name or not tensor.name.endswith(".weight"):
            continue
        lead = int("{layer}" in tensor.name)
        own = [_leaf(specs, path) for path in tensor.paths]
        paths = tuple(path.removesuffix("/kernel") for path in tensor.paths)
        maps.append(Module(tensor, paths, tuple(s.shape[lead:] for s in own), len(own[0].contracts), c))
    return maps


def parameter_places(family: ModuleType, c: ModelConfig) -> dict[str, tuple[Tensor, tuple[int, ...]]]:
    """The name of each tensor of transformers -> the entry of the family's table, and where it is in our stacks."""
    return {name: (tensor, at) for tensor in family.tensors(c) for name, at in places(tensor, c)}


def tied_head(family: ModuleType, c: ModelConfig) -> str | None:
    """What transformers calls the head of a model whose head is the embedding; None for any other model."""
    if not c.tie_embeddings or c.num_labels:
        return None
    apart = family.tensors(dataclasses.replace(c, tie_embeddings=False))
    return next((tensor.name for tensor in apart if tensor.paths == ("head",)), None)


def check_virtual_tokens(family: ModuleType, where: object) -> None:
    """Raises InputError where virtual tokens don't mean one thing: transformers scales embeddings of Gemma 3 where it
    looks them up, and those of Gemma 2 there only since version 5; before, whatever the first layer was given."""
    if family.__name__.endswith(".gemma2"):
        raise InputError(
            f"{where}: virtual tokens of a Gemma 2 are scaled by transformers before version 5 and not by later ones, "
            "so that a folder doesn't say which model it is for. Use a prefix or LoRA."
        )


def split(x: np.ndarray, name: str, tensor: Tensor, c: ModelConfig, where: object) -> Iterator[tuple[str, np.ndarray]]:
    """A tensor of transformers as the parameters of ours that it holds: (name, values).

    Raises:
      InputError: it has another shape.
    """
    shape = stored_shape(tensor, c)
    if x.shape != shape:
        raise InputError(f"{where}: {name} has the shape {list(x.shape)}, and the model's is {list(shape)}.")
    specs = transformer.make_specs(c)
    lead = int("{layer}" in tensor.name) + int("{expert}" in tensor.name)
    shapes = [_leaf(specs, path).shape[lead:] for path in tensor.paths]
    return zip(tensor.paths, load.split(x, tensor, c, shapes), strict=True)


def _leaf(specs: Specs, path: str) -> params.ParamSpec:
    for name in path.split("/"):
        specs = specs[name]
    return specs
