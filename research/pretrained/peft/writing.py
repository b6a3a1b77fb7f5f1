"""Writes an adapter as a folder of PEFT, from the parameters of ours that it adds and trains.

Where a module of transformers holds several maps of ours, their low-rank parts become one: the A's stacked, and the B's
as blocks along the diagonal of a matrix of as many times the rank. Its alpha is raised so that the scale stays.
"""

import collections
import dataclasses
import functools
import json
import math
import operator
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import safetensors.numpy

from research import files, params
from research.errors import InputError
from research.models import kernels, virtual
from research.models.config import ModelConfig
from research.models.specs import Params, Specs
from research.pretrained import save
from research.pretrained.peft import experts as experts_lib
from research.pretrained.peft import modules as modules_lib
from research.pretrained.peft.experts import Experts
from research.pretrained.peft.folder import BASE, CONFIG, TENSORS
from research.pretrained.peft.modules import Module
from research.pretrained.peft.reading import Leaves

_PREFIX = "base_model.model."
_MERGE = "Write a whole model instead: --merge."


@dataclasses.dataclass(frozen=True)
class Trained:
    """An adapter to write.

    Attributes:
      kind: of research.models.adapters.
      rslora: of lora.
      leaves: its parameters and those of the model that were trained besides.
      initial: of an adapter whose init changed the model: its parameters as they began; else empty.
      base: what PEFT is to read the model from.
      marks: params.fingerprint of the model; empty where there is none.
    """

    kind: str
    rslora: bool
    leaves: Leaves
    initial: Leaves
    base: str
    marks: Mapping[str, tuple[float, float]]


def leaves_of(values: Params, specs: Specs) -> Leaves:
    """Parameters by name and layer, without the zeros that fill up layers of a lower rank, and without those of rank 0.

    Args:
      values: nested dicts; the layers may lie in pieces.
      specs: of the whole model and the adapter.
    """
    leaves: Leaves = collections.defaultdict(dict)
    ranks = _ranks(specs)

    def keep(name: str, at: tuple[int, ...], x: np.ndarray) -> None:
        place, _, leaf = name.rpartition("/")
        if place in ranks:
            rank = ranks[place][at[0] if at else 0]
            if rank == 0:
                return
            if leaf in ("a", "b"):
                x = np.take(x, range(rank), axis=_rank_axis(specs, name))
        leaves[name][at] = x

    for path, x in params.named_leaves({name: part for name, part in values.items() if name != "layers"}):
        keep(path, (), np.asarray(x, np.float32))
    for piece in params.layer_pieces(values["layers"]) if values.get("layers") else []:
        for path, x in params.named_leaves(piece.values):
            stack = np.asarray(x, np.float32)
            for i in range(piece.first, piece.stop):
                keep(f"layers/{path}", (i,), stack[i - piece.first])
    return dict(leaves)


def _rank_axis(specs: Specs, name: str) -> int:
    """Which axis of a parameter of one layer is the rank."""
    spec = functools.reduce(operator.getitem, name.split("/"), specs)
    return spec.axes.index("rank") - (spec.axes[0] == "layers")


def _ranks(specs: Specs) -> dict[str, list[int]]:
    """Of each low-rank part the rank in each layer."""
    ranks = {}
    for name, spec in params.named_leaves(specs):
        if not name.endswith("lora/a"):
            continue
        layers = spec.shape[0] if spec.axes[0] == "layers" else 1
        size = math.prod(spec.shape[spec.axes[0] == "layers" : -1])
        padding = spec.padding or (0,) * layers
        ranks[name.removesuffix("/a")] = [spec.shape[-1] - zeros // size for zeros in padding]
    return ranks


def write(output: Path, family: ModuleType, c: ModelConfig, trained: Trained, dtype: str = "float32") -> int:
    """Writes adapter_config.json and adapter_model.safetensors. A kill leaves no `output`.

    Args:
      output: a folder that doesn't exist yet.
      family: of the model's tensors in transformers.
      c: what the model computes.
      trained: the adapter.
      dtype: of all tensors.

    Returns:
      the bytes of the tensors.

    Raises:
      InputError: PEFT has no such adapter.
    """
    if trained.kind not in _KINDS:
        raise InputError(f"adapter.kind = {trained.kind!r}: PEFT has no such kind. {_MERGE}")
    writer = _Writer(family, c, trained)
    _KINDS[trained.kind](writer)
    config = writer.config | writer.besides()
    tensors = {name: np.ascontiguousarray(x.astype(dtype)) for name, x in writer.tensors.items()}
    metadata = {"format": "pt"} | ({BASE: json.dumps(marks)} if (marks := writer.marks()) else {})
    with files.whole_folder(output) as folder:
        files.write_json(folder / CONFIG, config)
        safetensors.numpy.save_file(tensors, folder / TENSORS, metadata=metadata)
        (folder / TENSORS).chmod(0o644)  # safetensors makes it readable by its owner alone
    return sum(x.nbytes for x in tensors.values())


class _Writer:
    """Gathers the tensors and the config.

    Attributes:
      modules: all that PEFT could change.
      tensors: by PEFT's names.
      config: fields of adapter_config.json.
    """

    def __init__(self, family: ModuleType, c: ModelConfig, trained: Trained):
        self.family, self.c, self.trained = family, c, trained
        self.modules: list[Module | Experts] = [*modules_lib.modules(family, c), *experts_lib.stacked(family, c)]
        self.tensors: dict[str, np.ndarray] = {}
        head = any(name == "head" for name in trained.leaves)
        task = "CAUSAL_LM" if not c.num_labels else "SEQ_CLS" if head else None
        self.config: dict[str, Any] = {
            "task_type": task if c.causal else None,
            "base_model_name_or_path": trained.base,
            "inference_mode": True,
            "modules_to_save": None,
        }
        self._kernels: set[str] = set()

    def targets(self, ending: str) -> list[tuple[Module | Experts, str, tuple[int, ...], list[str]]]:
        """(module, its name, where it is in our stacks, our maps with something beside them) of all modules at which an
        adapter is; sets target_modules and target_parameters.

        Args:
          ending: of the parameters' names, such as "lora/a".

        Raises:
          InputError: an adapter is at something that PEFT doesn't know as a module.
        """
        places, written = [], set()
        for module in self.modules:
            for name, at in module.places:
                own = [path for path in module.paths if at in self.trained.leaves.get(_beside(path, ending), {})]
                if own:
                    places.append((module, name, at, own))
                    written |= {(_beside(path, ending), at) for path in own}
        for name, parts in self.trained.leaves.items():
            lost = [at for at in parts if name.endswith(ending) and (name, at) not in written]
            if lost:
                raise InputError(f"{name}: lies beside what PEFT has no module of. {_MERGE}")
        parameters = {name: parameter for module, name, _, _ in places if (parameter := _parameter(module, name))}
        self.config["target_modules"] = self._shortest([name for _, name, _, _ in places if name not in parameters])
        if parameters:
            self.config["target_parameters"] = self._shortest_parameters(list(parameters.values()))
        self.config["fan_in_fan_out"] = self._inputs_first([module for module, _, _, _ in places])
        self._kernels |= {
            (path if not at else path.replace("layers/", f"layers/{at[0]}/", 1)) + "/kernel"
            for _, _, at, own in places
            for path in own
        }
        return places

    @staticmethod
    def _inputs_first(modules: Sequence[Module]) -> bool:
        return any(module.inputs_first for module in modules if module.paths != ("embed",))

    def _shortest(self, names: Sequence[str]) -> list[str]:
        """The names, or their last words where these mean no other module."""
        every = [name for module in self.modules for name, _ in module.places]
        every += [name.removesuffix(".weight") for name in modules_lib.parameter_places(self.family, self.c)]
        short: dict[str, None] = {}
        for name in names:
            word = name.rpartition(".")[2]
            alike = {other for other in every if other.rpartition(".")[2] == word}
            short[word if alike <= set(names) else name] = None
        return list(short)

    def _shortest_parameters(self, names: Sequence[str]) -> list[str]:
        """The names, or their last two words where these are of all layers."""
        short = [".".join(name.split(".")[-2:]) for name in names]
        whole = {word for word, count in collections.Counter(short).items() if count == self.c.num_layers}
        return list(dict.fromkeys(word if word in whole else name for word, name in zip(short, names, strict=True)))

    def in_front(self, table: np.ndarray, kind: str, width: int, heads: int) -> None:
        """Writes what stands in front of documents: a row for each of its tokens."""
        self.tensors["prompt_embeddings"] = table
        self.config |= {
            "peft_type": kind,
            "num_virtual_tokens": len(table),
            "num_transformer_submodules": 1,
            "num_layers": self.c.num_layers,
            "num_attention_heads": heads,
            "token_dim": width,
        }

    def part(self, path: str, leaf: str, at: tuple[int, ...], *, initial: bool = False) -> np.ndarray:
        """A parameter beside one of our maps."""
        return (self.trained.initial if initial else self.trained.leaves)[_beside(path, leaf)][at]

    def besides(self) -> dict[str, Any]:
        """Writes what is trained of the model itself, and returns the fields that say so.

        Raises:
          InputError: PEFT has no way to hold a part of it.
        """
        own = {name: parts for name, parts in self.trained.leaves.items() if not _is_added(name)}
        modules: dict[str, None] = {}
        biases, written = False, set()
        for name, (tensor, at) in modules_lib.parameter_places(self.family, self.c).items():
            parts = [own[path][at] for path in tensor.paths if at in own.get(path, {})]
            if not parts:
                continue
            name = experts_lib.current_name(name)
            if len(parts) < len(tensor.paths):
                raise InputError(f"{tensor.paths[0]}: is a part of {name} in transformers. {_MERGE}")
            written |= {(path, at) for path in tensor.paths}
            module, _, leaf = name.rpartition(".")
            of_map = module in {experts_lib.current_name(name) for m in self.modules for name, _ in m.places}
            if leaf == "bias" and of_map:
                biases, key = True, f"{module}.{'base_layer.' if self._has_adapter(module) else ''}bias"
            else:
                self._check_whole(module, own)
                if self._has_adapter(module):
                    raise InputError(
                        f"{tensor.paths[0]}: is trained, and an adapter is beside it. PEFT has one of them. {_MERGE}"
                    )
                modules[module], key = None, name
            self.tensors[_PREFIX + key] = save.join(parts, tensor, self.c)
        for name, parts in own.items():
            if any((name, at) not in written for at in parts):
                raise InputError(f"{name}: has no tensor in transformers. {_MERGE}")
        head = modules_lib.tied_head(self.family, self.c)
        if head and "embed" in own:  # PEFT copies what it saves whole, so that the two are no longer one there
            modules[head.rpartition(".")[0]] = None
            self.tensors[_PREFIX + head] = own["embed"][()]
        fields: dict[str, Any] = {"modules_to_save": list(modules) or None}
        return fields | ({"bias": "all"} if biases else {})

    def _has_adapter(self, module: str) -> bool:
        kinds = tuple(f"{_PREFIX}{module}.{kind}_" for kind in kernels.ADDED)
        return any(name.startswith(kinds) for name in self.tensors)

    def _check_whole(self, module: str, own: Mapping[str, Any]) -> None:
        """Raises InputError where only a part of a module's parameters is trained, since PEFT saves all."""
        for name, (tensor, at) in modules_lib.parameter_places(self.family, self.c).items():
            own_module = experts_lib.current_name(name).rpartition(".")[0]
            if own_module == module and not all(at in own.get(path, {}) for path in tensor.paths):
                raise InputError(f"{tensor.paths[0]}: isn't trained, and PEFT saves {module} whole. {_MERGE}")

    def marks(self) -> dict[str, tuple[float, float]]:
        """The fingerprint of the kernels that the adapter lies beside."""
        return {name: mark for name, mark in self.trained.marks.items() if name in self._kernels}


def _beside(path: str, leaf: str) -> str:
    return f"embed_{leaf}" if path == "embed" else f"{path}/{leaf}"


def _is_added(name: str) -> bool:
    return any(f"/{kind}/" in f"/{name.removeprefix('embed_')}" for kind in (*kernels.ADDED, *virtual.PARTS))


def _parameter(module: Module | Experts, name: str) -> str | None:
    """What PEFT calls the parameter that it changes, where it doesn't change a linear module: experts and routers."""
    if isinstance(module, Experts):
        return name
    return f"{experts_lib.current_name(name)}.weight" if module.paths == ("layers/mlp/router",) else None


def _place(module: Module | Experts, name: str, wrapped: bool) -> str:
    """Where the tensors beside a module are. PEFT puts an experts' second parameter around the first (`wrapped`)."""
    if not isinstance(module, Experts):
        return experts_lib.current_name(name)
    return f"{name.rpartition('.')[0]}{'.base_layer' if wrapped else ''}"


def _write_lora(writer: _Writer) -> None:
    ranks, alphas = {}, {}
    dora = False
    targets = writer.targets("lora/a")
    down = {at for module, _, at, own in targets if isinstance(module, Experts) and len(module.paths) == 1}
    for module, name, at, own in targets:
        low = [_low_rank(writer, path, at) if path in own else None for path in module.paths]
        a, b, scale = _fused(module, low)
        embed = module.paths == ("embed",)
        key = f"{_PREFIX}{_place(module, name, len(module.paths) > 1 and at in down)}.lora_"
        ending = "" if embed else ".weight"
        writer.tensors[f"{key}{'embedding_' if embed else ''}A{ending}"] = module.write_inputs(a)
        writer.tensors[f"{key}{'embedding_' if embed else ''}B{ending}"] = module.write_outputs(b)
        known = _parameter(module, name) or name
        ranks[known] = a.shape[-1]
        alphas[known] = _alpha(scale, ranks[known], writer.trained.rslora)
        if any(at in writer.trained.leaves.get(_beside(path, "lora/magnitude"), {}) for path in own):
            if len(own) < len(module.paths):
                raise InputError(f"{own[0]}: is a part of {name} in transformers, and DoRA is of all of it. {_MERGE}")
            sizes = [writer.part(path, "lora/magnitude", at)[None] for path in module.paths]
            writer.tensors[f"{key}magnitude_vector"], dora = module.write_outputs(sizes)[:, 0], True
    rank, alpha = (collections.Counter(of.values()).most_common(1)[0][0] for of in (ranks, alphas))
    writer.config |= {
        "peft_type": "LORA",
        "r": rank,
        "lora_alpha": alpha,
        "lora_dropout": 0.0,
        "rank_pattern": {name: r for name, r in ranks.items() if r != rank},
        "alpha_pattern": {name: x for name, x in alphas.items() if x != alpha},
        "use_rslora": writer.trained.rslora,
        "use_dora": dora,
        "init_lora_weights": True,
        "bias": "none",
    }


def _alpha(scale: float, rank: int, rslora: bool) -> float:
    """alpha, of which a scale was made; a whole number where it is one but for rounding."""
    alpha = scale * (rank**0.5 if rslora else rank)
    return round(alpha) if abs(alpha - round(alpha)) < 1e-5 * max(1.0, abs(alpha)) else alpha


def _low_rank(writer: _Writer, path: str, at: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray, float]:
    """a [*in, r], b [r, *out] and the scale of one of our maps: the difference to the model that the run began with, of
    twice the rank, where its init changed the model."""
    a, b, scale = (writer.part(path, f"lora/{leaf}", at) for leaf in ("a", "b", "scale"))
    if writer.trained.initial:
        a0, b0 = (writer.part(path, f"lora/{leaf}", at, initial=True) for leaf in ("a", "b"))
        a, b = np.concatenate([a, a0], axis=-1), np.concatenate([b, -b0], axis=0)
    return a, b, float(scale)


def _fused(
    module: Module | Experts, parts: Sequence[tuple[np.ndarray, np.ndarray, float] | None]
) -> tuple[np.ndarray, list[np.ndarray], float]:
    """The low-rank parts of a module's maps as one: a [*lead, *in, R], b [*lead, R, *out] of each map, the scale."""
    there = [part for part in parts if part is not None]
    a, _, scale = there[0]
    if len(there) == len(parts) and all(np.array_equal(a, other) and scale == s for other, _, s in there):
        return a, [b for _, b, _ in there], scale
    scale = max(s for _, _, s in there)
    total, start, blocks = sum(a.shape[-1] for a, _, _ in there), 0, []
    lead = module.num_lead
    for shape, part in zip(module.shapes, parts, strict=True):
        block = np.zeros((*shape[:lead], total, *shape[lead + module.num_in :]), np.float32)
        if part is not None:
            _, b, own = part
            rows = (slice(None),) * lead + (slice(start, start + b.shape[lead]),)
            block[rows] = b * np.float32(own / scale)
            start += b.shape[lead]
        blocks.append(block)
    return np.concatenate([a for a, _, _ in there], axis=-1), blocks, scale


def _write_ia3(writer: _Writer) -> None:
    fields = ("target_modules", "fan_in_fan_out")
    for module, name, at, own in writer.targets("ia3/in"):
        vectors = [writer.part(path, "ia3/in", at) for path in own]
        if len(own) < len(module.paths) or any(not np.array_equal(vectors[0], v) for v in vectors):
            raise InputError(f"{own[0]}: is a part of {name} in transformers, whose input is one. {_MERGE}")
        writer.tensors[f"{_PREFIX}{name}.ia3_l"] = module.write_inputs(vectors[0][..., None])
    inputs, inputs_first = (writer.config[field] for field in fields)
    for module, name, at, own in writer.targets("ia3/out"):
        if f"{_PREFIX}{name}.ia3_l" in writer.tensors:
            raise InputError(f"{own[0]}: {name} has a vector for its input and its output, and PEFT for one. {_MERGE}")
        vectors = [np.ones((1, *shape[module.num_in :]), np.float32) for shape in module.shapes]
        for path in own:
            vectors[module.paths.index(path)] = writer.part(path, "ia3/out", at)[None]
        writer.tensors[f"{_PREFIX}{name}.ia3_l"] = module.write_outputs(vectors)
    outputs, outputs_first = (writer.config[field] for field in fields)
    writer.config |= {
        "peft_type": "IA3",
        "target_modules": [*inputs, *outputs],
        "feedforward_modules": inputs,
        "fan_in_fan_out": inputs_first or outputs_first,
    }


def _write_vera(writer: _Writer) -> None:
    for module, name, at, own in writer.targets("vera/d"):
        if len(module.paths) > 1:
            raise InputError(f"{own[0]}: is a part of {name} in transformers, which VeRA's matrices can't be. {_MERGE}")
        key = f"{_PREFIX}{name}.vera_lambda_"
        writer.tensors[f"{key}d"] = writer.part(own[0], "vera/d", at)
        writer.tensors[f"{key}b"] = module.write_outputs([writer.part(own[0], "vera/out", at)[None]])[:, 0]
    a, b = (writer.trained.leaves[f"vera/{leaf}"][()] for leaf in "ab")
    writer.tensors |= {"base_model.vera_A": a.T, "base_model.vera_B": b.T}
    writer.config |= {
        "peft_type": "VERA",
        "r": a.shape[1],
        "vera_dropout": 0.0,
        "save_projection": True,
        "bias": "none",
    }


def _write_prompt(writer: _Writer) -> None:
    modules_lib.check_virtual_tokens(writer.family, "adapter")
    rows = writer.trained.leaves["prompt/rows"][()]
    writer.in_front(rows, "PROMPT_TUNING", writer.c.d_model, writer.c.num_heads)


def _write_prefix(writer: _Writer) -> None:
    c = writer.c
    leaves = [writer.trained.leaves[f"layers/attention/prefix/{name}"] for name in ("keys", "values")]
    layers = {name: np.stack([x[(i,)] for i in range(c.num_layers)]) for name, x in zip("kv", leaves, strict=True)}
    prefix = {"keys": layers["k"], "values": layers["v"]}
    table = np.asarray(virtual.entries({"layers": {"attention": {"prefix": prefix}}}))
    writer.in_front(table, "PREFIX_TUNING", c.num_kv_heads * c.dim_per_head, c.num_kv_heads)
    writer.config["prefix_projection"] = False


_KINDS = {"lora": _write_lora, "ia3": _write_ia3, "vera": _write_vera}
_KINDS |= {"prompt": _write_prompt, "p_tuning": _write_prompt, "prefix": _write_prefix}
