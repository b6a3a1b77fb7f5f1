"""Low-rank parts of experts in the terms of PEFT.

transformers stacks the experts of a layer since version 5, as parameters "gate_up_proj" and "down_proj" of one module,
which PEFT changes by `target_parameters`. Before, each map of each expert was a module of its own. Both are read; the
first is written.
"""

import collections
import dataclasses
import re
from collections.abc import Sequence
from types import ModuleType

import einops
import numpy as np

from research.models.config import ModelConfig
from research.pretrained.safetensors_file import Entry

Parts = dict[str, dict[str, Entry]]  # name of a module -> the end of a tensor's name -> the tensor


@dataclasses.dataclass(frozen=True)
class Experts:
    """A map of all experts of a layer, or several, as one: what modules.Module is of any other map.

    PEFT keeps the A's of all experts as [(E r), in], and the B's as [out, (r E)].

    Attributes:
      name: of the parameter, with {layer} for its number; of maps that are modules of each expert without the expert's.
      paths: of our maps, whose outputs follow each other.
      num_experts, num_layers: of the model.
      ins, outs: the numbers of inputs, and of the outputs of all maps together.
    """

    name: str
    paths: tuple[str, ...]
    num_experts: int
    num_layers: int
    ins: int
    outs: int

    num_lead, num_in, inputs_first = 1, 1, False

    @property
    def places(self) -> list[tuple[str, tuple[int, ...]]]:
        """Each name, and where it is in our stack of layers."""
        return [(self.name.format(layer=layer), (layer,)) for layer in range(self.num_layers)]

    @property
    def shapes(self) -> tuple[tuple[int, ...], ...]:
        """Of our kernels, without layers."""
        return ((self.num_experts, self.ins, self.outs // len(self.paths)),) * len(self.paths)

    def rank(self, a: tuple[int, ...]) -> int:
        """The rank of each expert, of an A of this shape."""
        return a[0] // self.num_experts

    def read_inputs(self, x: np.ndarray) -> np.ndarray:
        """[(E r), in] of PEFT -> ours [E, in, r]."""
        return einops.rearrange(x, "(E r) i -> E i r", E=self.num_experts)

    def write_inputs(self, x: np.ndarray) -> np.ndarray:
        """Undoes `read_inputs`."""
        return einops.rearrange(x, "E i r -> (E r) i")

    def read_outputs(self, x: np.ndarray) -> list[np.ndarray]:
        """[out, (r E)] of PEFT -> [E, r, out] for each of our maps."""
        return np.split(einops.rearrange(x, "o (r E) -> E r o", E=self.num_experts), len(self.paths), axis=-1)

    def write_outputs(self, parts: list[np.ndarray]) -> np.ndarray:
        """Undoes `read_outputs`."""
        return einops.rearrange(np.concatenate(parts, axis=-1), "E r o -> o (r E)")


def stacked(family: ModuleType, c: ModelConfig) -> list[Experts]:
    """The experts' parameters, gate with up and down, as transformers has them since version 5; [] without experts."""
    names = [tensor.name for tensor in family.tensors(c) if "{expert}" in tensor.name]
    if not names:
        return []
    where = current_name(names[0].partition("{expert}")[0])
    gate, up, down = (f"layers/mlp/{name}" for name in ("gate", "up", "down"))
    both = Experts(f"{where}gate_up_proj", (gate, up), c.num_experts, c.num_layers, c.d_model, 2 * c.d_ff)
    return [both, Experts(f"{where}down_proj", (down,), c.num_experts, c.num_layers, c.d_ff, c.d_model)]


def apart(family: ModuleType, c: ModelConfig) -> list[Experts]:
    """The same as transformers had them before: a module for each map of each expert."""
    maps = []
    for tensor in family.tensors(c):
        if "{expert}" in tensor.name and tensor.name.endswith(".weight"):
            name = current_name(tensor.name.replace("{expert}.", "").removesuffix(".weight"))
            path = tensor.paths[0].removesuffix("/kernel")
            sides = (c.d_ff, c.d_model) if path.endswith("down") else (c.d_model, c.d_ff)
            maps.append(Experts(name, (path,), c.num_experts, c.num_layers, *sides))
    return maps


def current_name(name: str) -> str:
    """What transformers calls a module since version 5, where checkpoints of Mixtral have the name of before."""
    return name.replace(".block_sparse_moe.", ".mlp.")


def gathered(parts: Parts, family: ModuleType, c: ModelConfig) -> Parts:
    """The tensors of a folder, with what lies beside experts under the names of `stacked` and `apart`.

    What isn't there for all experts in one shape keeps its names.
    """
    words = {(each.ins, each.outs): each.name.rpartition(".")[2] for each in stacked(family, c)}
    renamed: Parts = {}
    single: dict[str, dict[int, dict[str, Entry]]] = collections.defaultdict(dict)
    for name, entries in parts.items():
        number = re.fullmatch(r"(.*\.experts\.)(\d+)\.(\w+)", name)
        if number and words:
            single[number[1] + number[3]][int(number[2])] = entries
        elif re.search(r"\.experts(\.base_layer)?$", name) and {"lora_A", "lora_B"} <= entries.keys():
            # PEFT puts a module's second parameter around its first; their shapes tell them apart.
            word = words.get((entries["lora_A"].shape[-1], entries["lora_B"].shape[0]))
            renamed[f"{name.removesuffix('.base_layer')}.{word}" if word else name] = entries
        else:
            renamed[name] = entries
    for name, experts in single.items():
        own = [experts[i] for i in sorted(experts)]
        shapes = {tuple((letter, entry.shape) for letter, entry in sorted(entries.items())) for entries in own}
        if len(shapes) == 1 and sorted(experts) == list(range(c.num_experts)):
            renamed[name] = {letter: _joined([entries[letter] for entries in own], letter) for letter in own[0]}
        else:
            place, _, word = name.rpartition(".")
            renamed |= {f"{place}.{i}.{word}": entries for i, entries in experts.items()}
    return renamed


def _joined(entries: Sequence[Entry], letter: str) -> Entry:
    """The A's [r, in] of experts as [(E r), in], or their B's [out, r] as [out, (r E)]."""
    rows, columns = entries[0].shape
    if letter == "lora_A":
        shape, layout = (rows * len(entries), columns), "E r i -> (E r) i"
    else:
        shape, layout = (rows, columns * len(entries)), "E o r -> o (r E)"
    return entries[0]._replace(
        shape=shape, read=lambda: einops.rearrange(np.stack([entry.read() for entry in entries]), layout)
    )
