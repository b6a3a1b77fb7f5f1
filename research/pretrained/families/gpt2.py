"""GPT-2 (Radford et al. 2019): learned positions, LayerNorm, biases everywhere, kernels stored input first."""

from typing import Any

from research.models.config import ModelConfig
from research.pretrained.families import common
from research.pretrained.types import Fields, Tensor

ARCHITECTURES = ("GPT2LMHeadModel", "GPT2ForSequenceClassification")
BODY = "transformer"
_FIELDS = {
    "vocab_size": "vocab_size",
    "n_layer": "num_layers",
    "n_embd": "d_model",
    "n_head": "num_heads",
    "n_positions": "max_length",
    "layer_norm_epsilon": "norm_eps",
}


def read(f: Fields) -> dict[str, Any]:
    values = f.take_all(_FIELDS)
    f.take("n_ctx", None)  # n_positions, once more
    f.expect("add_cross_attention", False)
    f.take("reorder_and_upcast_attn", False)  # the order of rounding
    return {
        **values,
        **common.read_labels(f),
        "num_kv_heads": values["num_heads"],
        "d_ff": f.take("n_inner", 4 * values["d_model"]),
        "mlp": common.read_activation(f, "activation_function", gated=False, default="gelu_new"),
        "norm": "layernorm",
        "positions": "learned",
        "attention_scale": 0.0 if f.take_flag("scale_attn_weights", True) else 1.0,
        "attention_scale_by_layer": f.take_flag("scale_attn_by_inverse_layer_idx", False),
        "tie_embeddings": f.take_flag("tie_word_embeddings", True),
        "attention_bias": True,
        "attention_out_bias": True,
        "mlp_bias": True,
    }


def write(c: ModelConfig) -> dict[str, Any]:
    return {key: getattr(c, field) for key, field in _FIELDS.items()} | {
        "n_inner": c.d_ff,
        "activation_function": common.write_activation(c, gated=False),
        "scale_attn_weights": c.attention_scale != 1,
        "scale_attn_by_inverse_layer_idx": c.attention_scale_by_layer,
        "tie_word_embeddings": c.tie_embeddings,
        **common.write_labels(c),
    }


def tensors(c: ModelConfig) -> list[Tensor]:
    layer = "transformer.h.{layer}."
    all_tensors = [
        Tensor("transformer.wte.weight", ("embed",), "V D -> V D"),
        Tensor("transformer.wpe.weight", ("position_embed",), "P D -> P D"),
        *common.head_tensors(c),
    ]
    for key, field in (
        ("transformer.ln_f", "final_norm"),
        (layer + "ln_1", "layers/attention_norm"),
        (layer + "ln_2", "layers/mlp_norm"),
    ):
        all_tensors += [Tensor(f"{key}.weight", (f"{field}/scale",), "D -> D")]
        all_tensors += [Tensor(f"{key}.bias", (f"{field}/bias",), "D -> D")]
    qkv = tuple(f"layers/attention/{name}/" for name in "qkv")
    for key, field, kernel, bias, axis in (
        ("attn.c_attn", qkv, "D (part H h) -> D (part H) h", "(part H h) -> (part H) h", 1),
        ("attn.c_proj", ("layers/attention/o/",), "(H h) D -> H h D", "D -> D", 0),
        ("mlp.c_fc", ("layers/mlp/up/",), "D F -> D F", "F -> F", 0),
        ("mlp.c_proj", ("layers/mlp/down/",), "F D -> F D", "D -> D", 0),
    ):
        all_tensors += [Tensor(f"{layer}{key}.weight", tuple(path + "kernel" for path in field), kernel, axis)]
        all_tensors += [Tensor(f"{layer}{key}.bias", tuple(path + "bias" for path in field), bias)]
    return all_tensors
