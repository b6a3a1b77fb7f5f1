"""Reads a folder of PEFT: the options of an adapter of ours, and its parameters."""

import collections
import dataclasses
import functools
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from research import params
from research.errors import InputError
from research.models import virtual
from research.models.config import ModelConfig
from research.pretrained.peft import experts as experts_lib
from research.pretrained.peft import modules as modules_lib
from research.pretrained.peft.experts import Experts
from research.pretrained.peft.folder import CONFIG, Folder, naming, remedy
from research.pretrained.peft.modules import Module
from research.pretrained.peft.patterns import first_matching
from research.pretrained.safetensors_file import Entry

Params = Any
Leaves = dict[str, dict[tuple[int, ...], np.ndarray]]  # name of a parameter -> (layer,) or () -> its values

_PREFIX = "base_model.model."
_NOT_OFFERED = {
    "LOHA": "products of two low-rank matrices, element by element, are no kind here",
    "LOKR": "Kronecker products are no kind here",
    "ADALORA": "its ranks change while it is trained, which a compiled step can't",
}
# Fields that say nothing of what is computed, or that the tensors say already.
_HARMLESS = re.compile(
    "auto_mapping|base_model_name_or_path|revision|peft_version|peft_type|task_type|inference_mode|megatron_core|"
    "target_modules|exclude_modules|layers_to_transform|layers_pattern|modules_to_save|bias|fan_in_fan_out|loftq_config|"
    "qalora_group_size|ensure_weight_tying|projection_prng_key|save_projection|d_initial|init_weights|init_ia3_weights|"
    "runtime_config|target_parameters"
)
_OF_ENCODERS = "encoder_.*|prefix_projection|prompt_tuning_.*|tokenizer_.*|num_layers|num_attention_heads|token_dim"
_INITS = {True: "default", False: "default", "gaussian": "default", "orthogonal": "default", "eva": "default"}
_INITS |= {"pissa": "pissa", "olora": "olora"}


@dataclasses.dataclass(frozen=True)
class Saved:
    """An adapter as a folder has it.

    Attributes:
      folder: where it is.
      options: of an adapter of ours: {"kind": ..., option: value}.
      leaves: () -> its parameters, by our names.
      copies: parameters of the model that the folder has copies of.
    """

    folder: Folder
    options: dict[str, Any]
    leaves: Callable[[], Leaves]
    copies: Leaves

    def fill(self, values: Params) -> Params:
        """Parameters of a model and the adapter, with those of the folder in their place.

        Args:
          values: nested dicts of arrays; those that it lacks are left out.

        Raises:
          InputError: the model isn't the one that the adapter was made for.
        """
        self._check_base(values)
        leaves = self.leaves()

        def one(path: tuple, x: jax.Array) -> jax.Array:
            parts = leaves.get(params.path_name(path))
            return x if parts is None else _put(x, parts)

        return jax.tree_util.tree_map_with_path(one, values)

    def _check_base(self, values: Params) -> None:
        """Raises InputError where kernels aren't those that the folder's adapter was made for."""
        flat = {params.path_name(path): x for path, x in jax.tree_util.tree_leaves_with_path(values)}
        for name, parts in self.copies.items():
            if name in flat and not all(_close(flat[name][at], x) for at, x in parts.items()):
                raise self._other_base(name)
        names = {re.sub(r"(^|/)layers/\d+/", r"\1layers/", name) for name in self.folder.base}
        own = {name: flat[name] for name in names if name in flat and jnp.issubdtype(flat[name].dtype, jnp.floating)}
        if not own:
            return
        name = params.first_difference(self.folder.base, params.fingerprint(own), 1e-3)
        if name is not None:
            raise self._other_base(name)

    def _other_base(self, name: str) -> InputError:
        return InputError(
            f"{self.folder.where}: was made for another model: {name} has other values there. Its {CONFIG} names "
            f"{self.folder.config.get('base_model_name_or_path')!r}."
        )


def _close(a: jax.Array, b: np.ndarray) -> bool:
    """Whether values are the same up to the rounding of bfloat16."""
    return a.shape == b.shape and bool(np.allclose(np.asarray(a, np.float32), b, rtol=1e-2, atol=1e-6))


def _put(x: jax.Array, parts: dict[tuple[int, ...], np.ndarray]) -> jax.Array:
    """An array with parts in their places; a layer of a lower rank than others is filled up with zeros."""
    if () in parts:
        whole = parts[()]
    else:
        shape = x.shape[1:]
        filled = {
            at[0]: np.pad(part, [(0, n - m) for n, m in zip(shape, part.shape, strict=True)])
            for at, part in parts.items()
        }
        if len(filled) < x.shape[0]:
            at = np.array(sorted(filled))
            return x.at[at].set(jnp.asarray(np.stack([filled[i] for i in sorted(filled)]), x.dtype))
        whole = np.stack([filled[i] for i in sorted(filled)])
    whole = np.asarray(whole, x.dtype)
    return jax.make_array_from_callback(x.shape, x.sharding, lambda index: whole[index])


def understand(folder: Folder, family: ModuleType, c: ModelConfig) -> Saved:
    """What a folder means for a model.

    Args:
      folder: of `open_folder`.
      family: of the model's tensors in transformers.
      c: what the model computes.

    Raises:
      InputError: the folder's kind or an option of it isn't offered here, or it is for another model.
    """
    kind = folder.config.get("peft_type")
    if not isinstance(kind, str) or kind not in _KINDS:
        reason = _NOT_OFFERED.get(str(kind), f"only {', '.join(_KINDS)} are read")
        raise InputError(f"{folder.where / CONFIG}: peft_type = {kind!r:.80}: {reason}. {remedy(str(kind))}")
    with naming(folder.where):
        saved = _KINDS[kind](_Reader(folder, family, c)).saved()

    def leaves() -> Leaves:
        with naming(folder.where):
            return saved.leaves()

    return dataclasses.replace(saved, leaves=leaves)


def _refuse(reader: "_Reader", field: str, value: Any, reason: str = "isn't offered here") -> InputError:
    what = remedy(reader.folder.config["peft_type"], field)
    return InputError(f"{reader.where}: {field} = {str(value)[:60]!r}: {reason}. {what}")


class _Reader:
    """Finds what a folder's tensors are in a model.

    Attributes:
      folder, family, c: see `understand`.
      parts: name of a module -> the end of a tensor's name -> the tensor, for what an adapter adds.
      whole: name of a parameter of transformers -> its tensor, for what is saved besides.
      shared: what stands for all modules.
    """

    def __init__(self, folder: Folder, family: ModuleType, c: ModelConfig):
        self.folder, self.family, self.c = folder, family, c
        self.where = folder.where / CONFIG
        self.parts: dict[str, dict[str, Entry]] = collections.defaultdict(dict)
        self.whole: dict[str, Entry] = {}
        self.shared: dict[str, Entry] = {}
        self._left = dict(folder.config)
        for stored, entry in folder.entries.items():
            name = experts_lib.current_name(stored)
            added = re.fullmatch(r"base_model\.model\.(.+)\.((?:lora|ia3|vera)_\w+)(?:\.weight)?", name)
            if added:
                self.parts[added[1]][added[2]] = entry
            elif name.startswith(_PREFIX):
                self.whole[re.sub(r"\.(base_layer|modules_to_save)(?=\.)", "", name.removeprefix(_PREFIX))] = entry
            else:
                self.shared[name.removeprefix("base_model.")] = entry
        self.parts = experts_lib.gathered(self.parts, family, c)

    @property
    def made_for(self) -> str | None:
        """The model that the folder names."""
        return self.folder.config.get("base_model_name_or_path")

    @property
    def config(self) -> dict[str, Any]:
        """The fields of the config that haven't been taken."""
        return self._left

    def take(self, name: str, default: Any = None) -> Any:
        """The value of a field of the config."""
        value = self._left.pop(name, None)
        return default if value is None else value

    def finish(self) -> None:
        """Raises InputError where a field was set that isn't understood."""
        for name, value in self._left.items():
            if not _HARMLESS.fullmatch(name) and value not in (None, False, {}, []):
                raise _refuse(self, name, value)

    def modules(self) -> list[tuple[Module | Experts, int | None, dict[str, Entry]]]:
        """(module, layer, its tensors) of all that the adapter changes; the embedding has no layer.

        Raises:
          InputError: the model has no such module.
        """
        maps: list[Module | Experts] = list(modules_lib.modules(self.family, self.c))
        if self.folder.config["peft_type"] == "LORA":
            maps += [*experts_lib.stacked(self.family, self.c), *experts_lib.apart(self.family, self.c)]
        known = {
            experts_lib.current_name(name): (module, at[0] if at else None)
            for module in maps
            for name, at in module.places
        }
        for name in self.parts:
            if name not in known:
                some = ", ".join(list(dict.fromkeys(module.name for module, _ in known.values())))
                raise InputError(
                    f"{self.folder.where}: changes {name}, and the model has {some} ({self.c.num_layers} layers). It "
                    f"was made for {self.made_for!r}: name that model. Heads are "
                    "changed whole, and experts all of a layer."
                )
        return [(*known[name], entries) for name, entries in self.parts.items()]

    def read(self, module: Module | Experts, layer: int | None, ending: str, shape: tuple[int, ...]) -> np.ndarray:
        """A tensor beside a module, in float32.

        Raises:
          InputError: it is missing, or has another shape; 0 stands for any number.
        """
        name = experts_lib.current_name(module.name.format(layer=layer))
        entry = self.parts[name].get(ending)
        if entry is None:
            raise InputError(f"{self.folder.where}: lacks {ending} of {name}. Save it anew.")
        if len(entry.shape) != len(shape) or any(n and n != m for n, m in zip(shape, entry.shape, strict=True)):
            wanted = " x ".join(str(n) if n else "r" for n in shape)
            raise InputError(
                f"{self.folder.where}: {ending} of {name} is {' x '.join(map(str, entry.shape))}, and the model asks "
                f"for {wanted}. It was made for {self.made_for!r}: name that model."
            )
        return np.asarray(entry.read(), np.float32)

    def make(self, options: dict[str, Any], leaves: Callable[[], Leaves]) -> Saved:
        """The adapter: what its kind says, and what the folder has of the model itself.

        Raises:
          InputError: the model has no such parameter, or it has another shape.
        """
        targets = [f"{module.name}.weight" for module, _, _ in self.modules()]
        besides, copies = self._of_model(targets)
        names = [
            path if not at or len(parts) == self.c.num_layers else path.replace("layers/", f"layers/{at[0]}/", 1)
            for path, parts in besides.items()
            for at in parts
        ]
        options |= {"also": "|".join(dict.fromkeys(names))} if names else {}
        return Saved(self.folder, options, lambda: {**leaves(), **besides}, copies)

    def _of_model(self, targets: list[str]) -> tuple[Leaves, Leaves]:
        """Parameters of the model that the folder has: those that were trained, and an embedding that only stands
        beside what is added to it. `targets` are the tensors that something is added to."""
        places = modules_lib.parameter_places(self.family, self.c)
        known = {experts_lib.current_name(name): place for name, place in places.items()}
        trained: Leaves = collections.defaultdict(dict)
        copies: Leaves = collections.defaultdict(dict)
        for name, entry in self.whole.items():
            if name == modules_lib.tied_head(self.family, self.c):
                self._check_tied(name, entry)
                continue
            if name not in known:
                raise InputError(
                    f"{self.folder.where}: holds {name}, and the model has no such tensor. "
                    f"{remedy(self.folder.config['peft_type'])}"
                )
            tensor, at = known[name]
            for path, x in modules_lib.split(entry.read(), name, tensor, self.c, self.folder.where):
                (copies if tensor.name in targets else trained)[path][at] = np.asarray(x, np.float32)
        return dict(trained), dict(copies)

    def _check_tied(self, head: str, entry: Entry) -> None:
        """Raises InputError where the folder has a head that isn't its embedding, for a model in which they are one."""
        (embed,) = (tensor.name for tensor in self.family.tensors(self.c) if tensor.paths == ("embed",))
        if embed not in self.whole or not np.array_equal(entry.read(), self.whole[embed].read()):
            raise InputError(
                f"{self.folder.where}: holds {head}, trained apart from {embed}, and in the model they are one matrix "
                "(model.tie_embeddings). Merge it in PEFT (merge_and_unload), set tie_word_embeddings = False in the "
                "model's config, save it, and read that."
            )


def _map_name(path: str, layers: list[int], c: ModelConfig) -> str:
    """An expression for a map of ours at some layers; of the embedding, which has none, its name."""
    rest = path.removeprefix("layers/")
    if rest == path or len(layers) == c.num_layers:
        return rest
    return f"layers/({'|'.join(map(str, layers))})/{rest}"


def _at(layer: int | None) -> tuple[int, ...]:
    return () if layer is None else (layer,)


def _targets(places: Mapping[str, list[int]], c: ModelConfig) -> str:
    """The option `targets`: name of a map -> its layers."""
    return "|".join(_map_name(path, sorted(layers), c) for path, layers in places.items())


class _Lora:
    """LoRA and DoRA: arXiv:2106.09685, arXiv:2402.09353."""

    def __init__(self, reader: _Reader):
        self.reader = reader

    def saved(self) -> Saved:
        reader = self.reader
        rank, alpha = reader.take("r", 8), reader.take("lora_alpha", 8)
        alphas, ranks = reader.take("alpha_pattern", {}), reader.take("rank_pattern", {})
        init = reader.take("init_lora_weights", True)
        if init not in _INITS:
            raise _refuse(
                reader, "init_lora_weights", init, "changed the base in a way that can't be done again from it"
            )
        options = {"kind": "lora", "rank": rank, "alpha": float(alpha)}
        options |= {name: True for name in ("rslora", "dora") if reader.take(f"use_{name}", False)}
        options |= {"init": _INITS[init]} if _INITS[init] != "default" else {}
        options |= {"dropout": float(dropout)} if (dropout := reader.take("lora_dropout", 0.0)) else {}
        reader.finish()
        places: dict[str, list[int]] = collections.defaultdict(list)
        rank_pattern, alpha_pattern = {}, {}
        names = [module.name.format(layer=layer) for module, layer, _ in reader.modules()]
        alphas, ranks = (_by_name(values, names, reader.folder.where) for values in (alphas, ranks))
        for module, layer, entries in reader.modules():
            own_rank = module.rank(entries[_ending("A", module)].shape) if _ending("A", module) in entries else rank
            name = module.name.format(layer=layer)
            if isinstance(module, Experts):
                self._check_experts(name, module, entries, ranks.get(name, rank))
            own_alpha = float(alphas.get(name, alpha))
            for path in module.paths:
                places[path].append(0 if layer is None else layer)
                key = path if layer is None else path.replace("layers/", f"layers/{layer}/", 1)
                if own_rank != rank:
                    rank_pattern[key] = own_rank
                if own_alpha != alpha:
                    alpha_pattern[key] = own_alpha
        options["targets"] = _targets(places, reader.c)
        options |= {"rank_pattern": rank_pattern} if rank_pattern else {}
        options |= {"alpha_pattern": alpha_pattern} if alpha_pattern else {}
        return reader.make(options, functools.partial(self.leaves, "dora" in options))

    def _check_experts(self, name: str, module: Experts, entries: Mapping[str, Entry], rank: int) -> None:
        """Raises InputError where A is of another number of experts. Of other maps the shapes say the rank."""
        rows = entries["lora_A"].shape[0] if "lora_A" in entries else 0
        if rows != rank * module.num_experts:
            raise InputError(
                f"{self.reader.folder.where}: lora_A of {name} has {rows} rows, and {module.num_experts} experts of "
                f"rank {rank} ask for another number. It was made for {self.reader.made_for!r}: name that model."
            )

    def leaves(self, dora: bool) -> Leaves:
        """The parameters, by our names."""
        leaves: Leaves = collections.defaultdict(dict)
        for module, layer, _ in self.reader.modules():
            at = _at(layer)
            a = module.read_inputs(self.reader.read(module, layer, _ending("A", module), (0, module.ins)))
            rows = module.read_outputs(self.reader.read(module, layer, _ending("B", module), (module.outs, 0)))
            for path, b in zip(module.paths, rows, strict=True):
                place = "embed_lora" if path == "embed" else f"{path}/lora"
                leaves[f"{place}/a"][at], leaves[f"{place}/b"][at] = a, b
            if dora:
                sizes = self.reader.read(module, layer, "lora_magnitude_vector", (module.outs,))
                for path, x in zip(module.paths, module.read_outputs(sizes[:, None]), strict=True):
                    leaves[f"{path}/lora/magnitude"][at] = x[0]
        return leaves


def _ending(letter: str, module: Module | Experts) -> str:
    return f"lora_embedding_{letter}" if module.paths == ("embed",) else f"lora_{letter}"


def _by_name(patterns: Mapping[str, Any], names: Sequence[str], where: Path) -> dict[str, Any]:
    """Name of a module -> its value in PEFT's rank_pattern or alpha_pattern: that of the first key that the end of its
    name matches. Modules without one are left out."""
    values = list(patterns.values())
    groups = [(name, now, f"{now}.weight") for name in names for now in [experts_lib.current_name(name)]]
    found = first_matching([rf"(.*\.)?({key})" for key in patterns], groups, where) if values else []
    return {name: values[i] for name, i in zip(names, found, strict=False) if i is not None}


class _Ia3:
    """(IA)^3: arXiv:2205.05638."""

    def __init__(self, reader: _Reader):
        self.reader = reader

    def saved(self) -> Saved:
        reader = self.reader
        feedforward = reader.take("feedforward_modules", [])
        reader.finish()
        places: dict[str, list[int]] = collections.defaultdict(list)
        inputs: dict[str, None] = {}
        names = [module.name.format(layer=layer) for module, layer, _ in reader.modules()]
        targets = _targeted(feedforward, names, reader.folder.where)
        for name, (module, layer, _) in zip(names, reader.modules(), strict=True):
            for path in module.paths:
                places[path].append(0 if layer is None else layer)
                if name in targets:
                    inputs[path.removeprefix("layers/")] = None
        options = {"kind": "ia3", "targets": _targets(places, reader.c), "inputs": "|".join(inputs)}
        return reader.make(options, functools.partial(self.leaves, list(inputs)))

    def leaves(self, inputs: list[str]) -> Leaves:
        """The parameters, by our names."""
        leaves: Leaves = collections.defaultdict(dict)
        for module, layer, entries in self.reader.modules():
            at, of_inputs = _at(layer), module.paths[0].removeprefix("layers/") in inputs
            size = module.ins if of_inputs else module.outs
            shape = entries["ia3_l"].shape if "ia3_l" in entries else ()
            x = self.reader.read(module, layer, "ia3_l", (1, size) if shape[:1] == (1,) else (size, 1)).reshape(1, size)
            parts = [module.read_inputs(x)[..., 0]] * len(module.paths) if of_inputs else module.read_outputs(x.T)
            for path, part in zip(module.paths, parts, strict=True):
                leaves[f"{path}/ia3/{'in' if of_inputs else 'out'}"][at] = part if of_inputs else part[0]
        return leaves


def _targeted(targets: Any, names: Sequence[str], where: Path) -> set[str]:
    """Of modules, those that PEFT's target_modules or feedforward_modules name."""
    if isinstance(targets, str):
        found = first_matching([targets], [(name,) for name in names], where)
        return {name for name, i in zip(names, found, strict=True) if i is not None}
    return {name for name in names if any(name == target or name.endswith(f".{target}") for target in targets)}


class _Vera:
    """VeRA: arXiv:2310.11454."""

    def __init__(self, reader: _Reader):
        self.reader = reader

    def saved(self) -> Saved:
        reader = self.reader
        options = {"kind": "vera", "rank": reader.take("r", 256)}
        options |= {"dropout": float(dropout)} if (dropout := reader.take("vera_dropout", 0.0)) else {}
        reader.finish()
        if not {"vera_A", "vera_B"} <= reader.shared.keys():
            raise _refuse(
                reader,
                "save_projection",
                False,
                "the random matrices aren't in the folder, and torch draws others",
            )
        places: dict[str, list[int]] = collections.defaultdict(list)
        for module, layer, _ in reader.modules():
            if len(module.paths) > 1:
                raise _refuse(reader, "target_modules", module.name, "holds several maps of ours")
            places[module.paths[0]].append(layer)
        options["targets"] = _targets(places, reader.c)
        return reader.make(options, functools.partial(self.leaves, options["rank"]))

    def leaves(self, rank: int) -> Leaves:
        """The parameters, by our names."""
        leaves: Leaves = collections.defaultdict(dict)
        ins = outs = 0
        for module, layer, _ in self.reader.modules():
            path, ins, outs = module.paths[0], max(ins, module.ins), max(outs, module.outs)
            leaves[f"{path}/vera/d"][_at(layer)] = self.reader.read(module, layer, "vera_lambda_d", (rank,))
            out = self.reader.read(module, layer, "vera_lambda_b", (module.outs,))
            leaves[f"{path}/vera/out"][_at(layer)] = module.read_outputs(out[:, None])[0][0]
        a, b = (np.asarray(self.reader.shared[name].read(), np.float32) for name in ("vera_A", "vera_B"))
        leaves["vera/a"][()], leaves["vera/b"][()] = a[:, :ins].T, b[:outs].T
        return leaves


class _InFront:
    """Virtual tokens and prefixes: arXiv:2104.08691, arXiv:2103.10385, arXiv:2101.00190. A folder holds what stands in
    front of documents; a network that computed it is thrown away after training."""

    def __init__(self, reader: _Reader):
        self.reader = reader

    def saved(self) -> Saved:
        reader, c = self.reader, self.reader.c
        prefix = reader.folder.config["peft_type"] == "PREFIX_TUNING"
        tokens = reader.take("num_virtual_tokens")
        if reader.take("num_transformer_submodules", 1) != 1:
            raise _refuse(reader, "num_transformer_submodules", 2, "is of models with an encoder and a decoder")
        for name in list(reader.config):
            if re.fullmatch(_OF_ENCODERS, name):  # of networks that the folder no longer has
                reader.take(name)
        reader.finish()
        if not prefix:
            modules_lib.check_virtual_tokens(reader.family, reader.where)
        entry = reader.shared.get("prompt_embeddings")
        width = c.num_layers * 2 * c.num_kv_heads * c.dim_per_head if prefix else c.d_model
        if entry is None or entry.shape != (tokens, width):
            raise InputError(
                f"{reader.folder.where}: prompt_embeddings is {list(entry.shape) if entry else 'missing'}, and the "
                f"model asks for {[tokens, width]}. It was made for {reader.made_for!r}: name that model."
            )
        options = {"kind": "prefix" if prefix else "prompt", "tokens": tokens}
        return reader.make(options, functools.partial(self.leaves, entry, prefix))

    def leaves(self, entry: Entry, prefix: bool) -> Leaves:
        """The parameters, by our names."""
        table, c = np.asarray(entry.read(), np.float32), self.reader.c
        if not prefix:
            return {"prompt/rows": {(): table}}
        shape = (c.num_layers, len(table), c.num_kv_heads, c.dim_per_head)
        both = zip(("keys", "values"), virtual.from_entries(table, shape), strict=True)
        return {f"layers/attention/prefix/{name}": {(): np.asarray(x)} for name, x in both}


_KINDS = {"LORA": _Lora, "IA3": _Ia3, "VERA": _Vera}
_KINDS |= dict.fromkeys(("PROMPT_TUNING", "P_TUNING", "PREFIX_TUNING"), _InFront)
