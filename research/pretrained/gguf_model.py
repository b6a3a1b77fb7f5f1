"""Models in .gguf files: what of a config.json they say, and their tensors by the names of transformers."""

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from research import options, ranges
from research.errors import InputError, did_you_mean
from research.pretrained.gguf_file import Stored, read_header
from research.pretrained.safetensors_file import Entry

# GGUF's names of architectures -> the model_type of transformers. Their tensors are those of transformers but for
# names, Llama's order of rows and Gemma's norms.
_ARCHITECTURES = {
    "llama": "llama",
    "qwen2": "qwen2",
    "qwen3": "qwen3",
    "gemma2": "gemma2",
    "gemma3": "gemma3_text",
    "olmo2": "olmo2",
    "phi3": "phi3",
}


class Gguf(NamedTuple):
    """A .gguf file: the fields of a config.json that say the same, its architecture, and its tensors by name."""

    path: Path
    config: dict[str, Any]
    arch: str
    stored: dict[str, Stored]


def open_gguf(file: Path) -> Gguf:
    """Reads a file's metadata; `gguf_entries` then gives its tensors.

    Raises:
      InputError: the file is damaged, of an architecture that isn't known, or needs what isn't supported.
    """
    header = read_header(file)
    arch, stored = header.metadata.get("general.architecture"), header.tensors
    if arch not in _ARCHITECTURES:
        raise InputError(
            f"{file}: general.architecture = {arch!r}: no such architecture here.{did_you_mean(arch, _ARCHITECTURES)}"
        )
    if (parts := header.metadata.get("split.count", 1)) not in (0, 1):
        raise InputError(f"{file}: is one of {parts} parts. Join them: llama-gguf-split --merge {file.name} WHOLE.gguf")
    if "token_embd.weight" not in stored:
        raise InputError(f"{file}: lacks the tensor 'token_embd.weight': it holds no model. Take the file that does.")
    _check_places(file, stored)
    get = _gguf_getter(file, arch, header.metadata)
    if get("expert_count", 0):
        raise InputError(f"{file}: mixtures of experts are read from safetensors, not from GGUF. Take that copy.")
    return Gguf(file, _gguf_config(file, arch, get, stored), arch, stored)


def _check_places(file: Path, stored: Mapping[str, Stored]) -> None:
    """Raises InputError where a tensor lies beyond the end of the file, or in another one."""
    size, end, before = file.stat().st_size, 0, ""
    for name in sorted(stored, key=lambda name: stored[name].start):
        start, needed = stored[name].start, stored[name].start + _stored_bytes(file, name, stored[name])
        if needed > size:
            raise InputError(f"{file}: is cut short: {size:,} bytes of {needed:,}. Copy it anew.")
        if start < end:
            raise InputError(f"{file}: the tensors {before!r:.80} and {name!r:.80} overlap. Copy it anew.")
        end, before = needed, name


def _gguf_getter(file: Path, arch: str, fields: dict[str, Any]) -> Callable[..., Any]:
    """(name, default, least of a whole number) -> the value of a field, which is of the default's type, or whole."""

    def get(name: str, *default: Any, least: int = 0) -> Any:
        value, field = fields.get(f"{arch}.{name}"), f"{file}: {arch}.{name}"
        if value is None and not default:
            raise InputError(f"{file}: lacks the field '{arch}.{name}'. Convert the model anew.")
        if value is None:
            return default[0]
        kind = type(default[0]) if default and default[0] is not None else float
        value = options.convert(kind, value, field)
        if kind is int:
            ranges.Range(least).check(value, field)
        return value

    return get


def _gguf_config(file: Path, arch: str, get: Callable[..., Any], stored: dict[str, Stored]) -> dict[str, Any]:
    layers = get("block_count", 0)
    if not 0 < layers <= len(stored):
        raise InputError(f"{file}: {arch}.block_count = {layers}: and there are {len(stored)} tensors. Copy it anew.")
    width, heads = (_size(file, arch, get, name) for name in ("embedding_length", "attention.head_count"))
    config = {
        "model_type": _ARCHITECTURES[arch],
        "vocab_size": stored["token_embd.weight"].shape[0],
        "num_hidden_layers": layers,
        "hidden_size": width,
        "num_attention_heads": heads,
        "num_key_value_heads": get("attention.head_count_kv", heads, least=1),
        "intermediate_size": _size(file, arch, get, "feed_forward_length"),
        "max_position_embeddings": _size(file, arch, get, "context_length"),
        "rms_norm_eps": get("attention.layer_norm_rms_epsilon"),
        "rope_theta": get("rope.freq_base", 10_000.0),
        "tie_word_embeddings": "output.weight" not in stored,
    }
    head_dim = get("attention.key_length", width // heads, least=1)
    config["head_dim"] = head_dim
    if arch == "phi3":
        del config["head_dim"]
    turned = get("rope.dimension_count", head_dim)
    if turned != head_dim:
        config["partial_rotary_factor"] = turned / head_dim
    config |= _gguf_rope(file, get, stored, config)
    if window := get("attention.sliding_window", 0):
        config["sliding_window"] = window
    if arch == "llama":
        config["attention_bias"] = "blk.0.attn_q.bias" in stored
        config["mlp_bias"] = "blk.0.ffn_up.bias" in stored
    if arch in ("gemma2", "gemma3"):
        # llama.cpp holds the scale of Gemma's scores by name of the model's size: head_dim^-0.5 for all but 27B.
        per_head = width // heads
        big = layers == {"gemma2": 46, "gemma3": 62}[arch]
        config["query_pre_attn_scalar"] = per_head if big else head_dim
    if arch == "gemma3":
        config["rope_local_base_freq"] = get("rope.freq_base_swa", 10_000.0)
        config["sliding_window_pattern"] = get("attention.sliding_window_pattern", 6)
    if arch == "gemma2":
        config["attn_logit_softcapping"] = get("attn_logit_softcapping", 50.0)
        config["final_logit_softcapping"] = get("final_logit_softcapping", 30.0)
    return config


def _size(file: Path, arch: str, get: Callable[..., Any], name: str) -> int:
    """A whole number of at least 1 that has to be there."""
    if (value := get(name, -1, least=1)) < 1:
        raise InputError(f"{file}: lacks the field '{arch}.{name}'. Convert the model anew.")
    return value


def _gguf_rope(
    file: Path, get: Callable[..., Any], stored: dict[str, Stored], config: dict[str, Any]
) -> dict[str, Any]:
    """Stretched RoPE: by a rule in the metadata, or by a tensor of factors for each pair of dimensions."""
    kind, original = get("rope.scaling.type", "none"), get("rope.scaling.original_context_length", 0)
    if "rope_freqs.weight" in stored:  # Llama 3.1 and later: 1 where a frequency stays
        whole = _dequantized(file, stored["rope_freqs.weight"]).tolist()
        length = config["max_position_embeddings"]
        return {
            "original_max_position_embeddings": length,
            "rope_scaling": {
                "rope_type": "longrope",
                "factor": 1.0,
                "attention_factor": 1.0,
                "short_factor": whole,
                "long_factor": whole,
            },
        }
    if "rope_factors_long.weight" in stored:
        lists = {kind: _dequantized(file, stored[f"rope_factors_{kind}.weight"]).tolist() for kind in ("long", "short")}
        scaling = {"rope_type": "longrope", "long_factor": lists["long"], "short_factor": lists["short"]}
        if attention := get("rope.scaling.attn_factor", 0.0):
            scaling["attention_factor"] = attention
        return {"original_max_position_embeddings": original, "rope_scaling": scaling}
    if kind == "none":
        return {}
    scaling = {"rope_type": kind, "factor": get("rope.scaling.factor")}
    if kind == "yarn":
        scaling |= {
            "original_max_position_embeddings": original,
            "attention_factor": get("rope.scaling.yarn_attn_factor", None),
            "beta_fast": get("rope.scaling.yarn_beta_fast", None),
            "beta_slow": get("rope.scaling.yarn_beta_slow", None),
            "extrapolation_factor": get("rope.scaling.yarn_ext_factor", None),
        }
    return {"rope_scaling": scaling}


def _stored_bytes(file: Path, name: str, stored: Stored) -> int:
    import gguf  # 0.1 s that only a .gguf file needs

    try:
        block, size = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType(stored.type)]
    except ValueError as error:
        raise InputError(
            f"{file}: tensor {name!r:.80} is of type {stored.type}, which the package gguf doesn't know."
        ) from error
    if stored.shape[-1] % block:
        raise InputError(
            f"{file}: tensor {name!r:.80}: rows of {stored.shape[-1]} aren't blocks of {block}. Copy it anew."
        )
    return math.prod(stored.shape) // block * size


def _dequantized(file: Path, stored: Stored) -> np.ndarray:
    import gguf  # 0.1 s that only a .gguf file needs

    kind = gguf.GGMLQuantizationType(stored.type)
    shape = gguf.quants.quant_shape_to_byte_shape(stored.shape, kind)
    data = np.memmap(file, np.uint8, "r", stored.start, shape)
    return gguf.quants.dequantize(data, kind).reshape(stored.shape)


def gguf_entries(file: Gguf, names: Sequence[str]) -> dict[str, Entry]:
    """The file's tensors as float32 and in transformers' order of rows.

    Args:
      file: of `open_gguf`.
      names: the tensors that transformers has for such a model. What the file holds beyond them keeps its own name.
    """
    import gguf  # 0.1 s that only a .gguf file needs

    arch = file.arch
    table = gguf.get_tensor_name_map(
        next(key for key, name in gguf.MODEL_ARCH_NAMES.items() if name == arch), file.config["num_hidden_layers"]
    )
    heads = {"q_proj": file.config["num_attention_heads"], "k_proj": file.config["num_key_value_heads"]}
    known = {table.get_name(name, try_suffixes=(".weight", ".bias")): name for name in names}
    entries = {}
    for own, stored in file.stored.items():
        if own.startswith("rope_"):  # of the config (see _gguf_rope)
            continue
        name = known.get(own, own)
        part = name.rpartition(".")[0].rpartition(".")[2]

        def read(stored=stored, part=part) -> np.ndarray:
            x = _dequantized(file.path, stored)
            if arch == "llama" and part in heads:  # its rows lie in pairs (i, i + h/2), side by side
                pairs = x.reshape(heads[part], -1, 2, *x.shape[1:])
                x = pairs.swapaxes(1, 2).reshape(x.shape)
            if arch.startswith("gemma") and part.endswith("norm"):
                x = x - np.float32(1)  # it holds what is multiplied by, 1 + the scale
            return x

        entries[name] = Entry(stored.shape, np.dtype(np.float32), (file.path.name, stored.start), read)
    return entries
