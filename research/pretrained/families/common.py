"""What many families share: Llama's names of fields and tensors, and RoPE in its two spellings."""

from typing import Any

from research import options
from research.errors import InputError, located
from research.models.config import ModelConfig
from research.ops.rope import RopeScaling
from research.pretrained.types import Fields, Tensor, windows

_FIELDS = {
    "vocab_size": "vocab_size",
    "num_hidden_layers": "num_layers",
    "hidden_size": "d_model",
    "num_attention_heads": "num_heads",
    "intermediate_size": "d_ff",
    "max_position_embeddings": "max_length",
    "rms_norm_eps": "norm_eps",
}
_GATED = {
    "silu": "swiglu",
    "swish": "swiglu",
    "gelu": "geglu",
    "gelu_pytorch_tanh": "geglu_tanh",
    "gelu_new": "geglu_tanh",
}
_PLAIN = {
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "relu": "relu",
}
_SCALING = {"default": "none", "su": "longrope"}


def read_decoder(f: Fields, *, tied: bool = False, eps: float = 1e-6) -> dict[str, Any]:
    """The fields that Llama and its descendants share. `tied` and `eps` stand where the file says nothing."""
    values = f.take_all(_FIELDS, norm_eps=eps)
    values["num_kv_heads"] = f.take("num_key_value_heads", values["num_heads"])
    values["head_dim"] = f.take("head_dim", 0)
    if values["head_dim"] * values["num_heads"] == values["d_model"]:
        values["head_dim"] = 0
    values["tie_embeddings"] = f.take_flag("tie_word_embeddings", tied)
    return values | read_labels(f)


def write_decoder(c: ModelConfig) -> dict[str, Any]:
    """The inverse of `read_decoder`."""
    return {key: getattr(c, field) for key, field in _FIELDS.items()} | {
        "num_key_value_heads": c.num_kv_heads,
        "head_dim": c.dim_per_head,
        "tie_word_embeddings": c.tie_embeddings,
        **write_labels(c),
    }


def read_labels(f: Fields) -> dict[str, Any]:
    """The size of the head of a classifier or reward model; nothing for a language model."""
    if not f.take("architectures", [""])[0].endswith("ForSequenceClassification"):
        return {}
    return {"num_labels": len(f.take("id2label", {})) or f.take("num_labels", 2)}


def write_labels(c: ModelConfig) -> dict[str, Any]:
    """The inverse of `read_labels`."""
    if not c.num_labels:
        return {}
    names = [f"LABEL_{i}" for i in range(c.num_labels)]
    return {"id2label": {str(i): name for i, name in enumerate(names)}, "label2id": {n: i for i, n in enumerate(names)}}


def read_activation(f: Fields, name: str, *, gated: bool, default: str) -> str:
    """ModelConfig.mlp from the name of an activation."""
    table, value = _GATED if gated else _PLAIN, f.take(name, default)
    if not isinstance(value, str) or value not in table:
        raise InputError(f"{f.where}: {name} = {value!r:.80}: no such activation here. There are {', '.join(table)}.")
    return table[value]


def write_activation(c: ModelConfig, *, gated: bool) -> str:
    """The inverse of `read_activation`. A family that has no such activation gets another, by which save.choose tells
    that it can't hold the model."""
    known = {field: key for key, field in reversed((_GATED if gated else _PLAIN).items())}
    return known.get(c.mlp, "silu" if gated else "gelu")


def read_rope(f: Fields, values: dict[str, Any], *, theta: float = 10_000.0) -> dict[str, Any]:
    """RoPE's fields, as transformers 5 writes them (rope_parameters) or 4 (rope_theta, rope_scaling).

    Args:
      f: the config.
      values: what has been read so far: the sizes.
      theta: where the file says nothing.
    """
    part = f.take("partial_rotary_factor", 1.0)
    old, new = f.section("rope_scaling"), f.section("rope_parameters")
    base = f.take("rope_theta", theta)
    original = f.take("original_max_position_embeddings", 0)
    if new is not None:
        base, part = new.take("rope_theta", base), new.take("partial_rotary_factor", part)
    head_dim = values["head_dim"] or values["d_model"] // values["num_heads"]
    rotary_dim = int(head_dim * part)
    fields = {"rope_theta": float(base), "rotary_dim": 0 if rotary_dim == head_dim else rotary_dim}
    scaling = new or old
    if scaling is not None:
        fields["rope_scaling"] = _read_scaling(scaling, values["max_length"], original)
    return fields


def _read_scaling(f: Fields, max_length: int, original: int) -> RopeScaling:
    kind = f.take("rope_type", f.take("type", "default"))
    kind = _SCALING.get(kind, kind)
    original = f.take("original_max_position_embeddings", original)
    if kind == "none":
        return RopeScaling()
    values: dict[str, Any] = {"kind": kind}
    if kind != "linear":
        values["original_length"] = original or max_length
    if kind == "longrope":
        values |= {"short_factors": f.take("short_factor", []), "long_factors": f.take("long_factor", [])}
        values["factor"] = f.take("factor", max_length / values["original_length"])
    elif kind in ("linear", "llama3", "yarn"):
        values["factor"] = f.take_number("factor")
    else:
        known = "only linear, llama3, yarn and longrope"
        raise InputError(f"{f.where}: rope_type = {kind!r:.80} is not supported, {known}.")
    if kind == "llama3":
        values |= {f"{side}_freq_factor": f.take_number(f"{side}_freq_factor") for side in ("low", "high")}
    if kind == "yarn":
        values |= {"beta_fast": f.take("beta_fast", 32.0), "beta_slow": f.take("beta_slow", 1.0)}
        values["truncate"] = f.take("truncate", True)
        f.expect("mscale", None, 0, 1.0)
        f.expect("mscale_all_dim", None, 0)
        f.expect("extrapolation_factor", None, 1.0)
    if kind in ("yarn", "longrope"):
        values["attention_factor"] = f.take("attention_factor", 0.0)
    f.finish()
    with located(f.where):
        return options.build(RopeScaling, values, "")


def write_rope(c: ModelConfig) -> dict[str, Any]:
    """RoPE's fields as transformers 4 writes them, which 5 reads too."""
    s = c.rope_scaling
    fields: dict[str, Any] = {"rope_theta": c.rope_theta, "rope_scaling": None}
    if c.rotary_dim:
        fields["partial_rotary_factor"] = c.rotary_dim / c.dim_per_head
    if s.kind == "none":
        return fields
    scaling: dict[str, Any] = {"rope_type": s.kind, "factor": s.factor}
    if s.kind != "linear":
        scaling["original_max_position_embeddings"] = s.original_length
    if s.kind == "llama3":
        scaling |= {"low_freq_factor": s.low_freq_factor, "high_freq_factor": s.high_freq_factor}
    if s.kind == "yarn":
        scaling |= {"beta_fast": s.beta_fast, "beta_slow": s.beta_slow, "truncate": s.truncate}
    if s.kind == "longrope":
        scaling |= {"short_factor": list(s.short_factors), "long_factor": list(s.long_factors)}
        fields["original_max_position_embeddings"] = s.original_length
    if s.attention_factor:
        scaling["attention_factor"] = s.attention_factor
    return fields | {"rope_scaling": scaling}


def read_windows(f: Fields, num_layers: int) -> tuple[int, ...]:
    """sliding_window of families where all layers have it, or those from max_window_layers on (Qwen)."""
    window = f.take("sliding_window", 0)
    used, first = f.take("use_sliding_window", True), f.take("max_window_layers", 0)
    if not window or not used:
        f.take("layer_types", None)
        return (0,)
    first = min(first, num_layers)
    types = read_layer_types(f, num_layers, ["full_attention"] * first + ["sliding_attention"] * (num_layers - first))
    return windows(types, window)


def read_layer_types(f: Fields, num_layers: int, default: list[str]) -> list[str]:
    """The kind of each layer. Raises InputError where the file names them for more or fewer layers."""
    types = f.take("layer_types", default)
    if len(types) != num_layers:
        raise InputError(f"{f.where}: layer_types: has {len(types)} names, and num_hidden_layers = {num_layers}.")
    return types


def decoder_tensors(c: ModelConfig, norms: dict[str, str]) -> list[Tensor]:
    """Llama's tensors. `norms`: field -> key, of the norms in a layer."""
    layer = "model.layers.{layer}."
    tensors = [
        Tensor("model.embed_tokens.weight", ("embed",), "V D -> V D"),
        Tensor("model.norm.weight", ("final_norm/scale",), "D -> D"),
        *(Tensor(f"{layer}{key}.weight", (f"layers/{field}/scale",), "D -> D") for field, key in norms.items()),
        *attention_tensors(c, layer + "self_attn."),
    ]
    if not c.num_experts:
        tensors += mlp_tensors(c, layer + "mlp.")
    return tensors + head_tensors(c)


def head_tensors(c: ModelConfig) -> list[Tensor]:
    if c.num_labels:
        return [Tensor("score.weight", ("head",), "C D -> D C")]
    return [] if c.tie_embeddings else [Tensor("lm_head.weight", ("head",), "V D -> D V")]


def attention_tensors(c: ModelConfig, prefix: str) -> list[Tensor]:
    tensors = []
    for name, heads in (("q", "H"), ("k", "K"), ("v", "K")):
        tensors.append(
            Tensor(f"{prefix}{name}_proj.weight", (f"layers/attention/{name}/kernel",), f"({heads} h) D -> D {heads} h")
        )
        if c.attention_bias:
            tensors.append(
                Tensor(f"{prefix}{name}_proj.bias", (f"layers/attention/{name}/bias",), f"({heads} h) -> {heads} h")
            )
        if name != "v" and c.qk_norm == "head":
            tensors.append(Tensor(f"{prefix}{name}_norm.weight", (f"layers/attention/{name}_norm/scale",), "h -> h"))
        if name != "v" and c.qk_norm == "full":
            layout = f"({heads} h) -> {heads} h"
            tensors.append(Tensor(f"{prefix}{name}_norm.weight", (f"layers/attention/{name}_norm/scale",), layout))
    tensors.append(Tensor(f"{prefix}o_proj.weight", ("layers/attention/o/kernel",), "D (H h) -> H h D"))
    if c.attention_out_bias:
        tensors.append(Tensor(f"{prefix}o_proj.bias", ("layers/attention/o/bias",), "D -> D"))
    return tensors


def mlp_tensors(
    c: ModelConfig, prefix: str, names: tuple[str, str, str] = ("gate_proj", "up_proj", "down_proj")
) -> list[Tensor]:
    """A gated MLP, or each expert of a mixture where the prefix has an {expert}."""
    tensors = []
    for field, key in zip(("gate", "up", "down"), names, strict=True):
        layout = "D F -> F D" if field == "down" else "F D -> D F"
        tensors.append(Tensor(f"{prefix}{key}.weight", (f"layers/mlp/{field}/kernel",), layout))
        if c.mlp_bias:
            tensors.append(
                Tensor(f"{prefix}{key}.bias", (f"layers/mlp/{field}/bias",), "D -> D" if field == "down" else "F -> F")
            )
    return tensors
