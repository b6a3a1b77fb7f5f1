"""GPT-NeoX (arXiv:2204.06745) and Pythia: attention and MLP side by side, part of each head turned, fused maps."""

from typing import Any

from research.models.config import ModelConfig
from research.pretrained.families import common
from research.pretrained.types import Fields, Tensor

ARCHITECTURES = ("GPTNeoXForCausalLM", "GPTNeoXForSequenceClassification")
BODY = "gpt_neox"
_FIELDS = {
    "vocab_size": "vocab_size",
    "num_hidden_layers": "num_layers",
    "hidden_size": "d_model",
    "num_attention_heads": "num_heads",
    "intermediate_size": "d_ff",
    "max_position_embeddings": "max_length",
    "layer_norm_eps": "norm_eps",
}


def read(f: Fields) -> dict[str, Any]:
    values = f.take_all(_FIELDS) | {"head_dim": 0}
    part, theta = f.take("rotary_pct", 0.25), f.take("rotary_emb_base", 10_000.0)
    f.replace("partial_rotary_factor", f.take("partial_rotary_factor", part))
    rope = common.read_rope(f, values, theta=theta)
    bias = f.take("attention_bias", True)
    return {
        **values,
        **rope,
        **common.read_labels(f),
        "num_kv_heads": values["num_heads"],
        "mlp": common.read_activation(f, "hidden_act", gated=False, default="gelu"),
        "block": "parallel" if f.take("use_parallel_residual", True) else "pre",
        "norm": "layernorm",
        "tie_embeddings": f.take_flag("tie_word_embeddings", False),
        "attention_bias": bias,
        "attention_out_bias": bias,
        "mlp_bias": True,
    }


def write(c: ModelConfig) -> dict[str, Any]:
    rope = common.write_rope(c)
    part = rope.pop("partial_rotary_factor", 1.0)
    return {key: getattr(c, field) for key, field in _FIELDS.items()} | {
        **rope,
        "rotary_pct": part,
        "rotary_emb_base": c.rope_theta,
        "hidden_act": common.write_activation(c, gated=False),
        "use_parallel_residual": c.block == "parallel",
        "tie_word_embeddings": c.tie_embeddings,
        "attention_bias": c.attention_bias,
        **common.write_labels(c),
    }


def tensors(c: ModelConfig) -> list[Tensor]:
    layer = "gpt_neox.layers.{layer}."
    all_tensors = [Tensor("gpt_neox.embed_in.weight", ("embed",), "V D -> V D")]
    if c.num_labels:
        all_tensors += common.head_tensors(c)
    elif not c.tie_embeddings:
        all_tensors += [Tensor("embed_out.weight", ("head",), "V D -> D V")]
    for key, field in (
        ("gpt_neox.final_layer_norm", "final_norm"),
        (layer + "input_layernorm", "layers/attention_norm"),
        (layer + "post_attention_layernorm", "layers/mlp_norm"),
    ):
        all_tensors += [Tensor(f"{key}.weight", (f"{field}/scale",), "D -> D")]
        all_tensors += [Tensor(f"{key}.bias", (f"{field}/bias",), "D -> D")]
    qkv = tuple(f"layers/attention/{name}/" for name in "qkv")
    for key, field, kernel, bias, axis in (
        ("attention.query_key_value", qkv, "(H part h) D -> D (part H) h", "(H part h) -> (part H) h", 1),
        ("attention.dense", ("layers/attention/o/",), "D (H h) -> H h D", "D -> D", 0),
        ("mlp.dense_h_to_4h", ("layers/mlp/up/",), "F D -> D F", "F -> F", 0),
        ("mlp.dense_4h_to_h", ("layers/mlp/down/",), "D F -> F D", "D -> D", 0),
    ):
        all_tensors += [Tensor(f"{layer}{key}.weight", tuple(path + "kernel" for path in field), kernel, axis)]
        if key.startswith("mlp") or c.attention_bias:
            all_tensors += [Tensor(f"{layer}{key}.bias", tuple(path + "bias" for path in field), bias)]
    return all_tensors
