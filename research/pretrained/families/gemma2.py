"""Gemma 2 (arXiv:2408.00118): norms around each map, soft-caps, every other layer with a sliding window."""

from typing import Any

from research import ranges
from research.models.config import ModelConfig
from research.pretrained.families import common
from research.pretrained.types import Fields, Tensor, windows

ARCHITECTURES = ("Gemma2ForCausalLM", "Gemma2ForSequenceClassification")
NORMS = {
    "attention_norm": "input_layernorm",
    "attention_post_norm": "post_attention_layernorm",
    "mlp_norm": "pre_feedforward_layernorm",
    "mlp_post_norm": "post_feedforward_layernorm",
}


def read(f: Fields) -> dict[str, Any]:
    values = read_gemma(f)
    n = values["num_layers"]
    types = common.read_layer_types(f, n, (["sliding_attention", "full_attention"] * n)[:n])
    return {
        **values,
        **common.read_rope(f, values),
        "sliding_window": windows(types, f.take("sliding_window", 4096)),
        "attention_softcap": f.take("attn_logit_softcapping", 0.0),
        "logit_softcap": read_logit_softcap(f, values),
    }


def read_logit_softcap(f: Fields, values: dict[str, Any]) -> float:
    """The cap of tokens' logits: transformers leaves those of a classifier as they are."""
    cap = f.take("final_logit_softcapping", 0.0)
    return 0.0 if values.get("num_labels") else cap


def read_gemma(f: Fields) -> dict[str, Any]:
    """What Gemma 2 and 3 have in common."""
    values = common.read_decoder(f, tied=True)
    bias = f.take("attention_bias", False)
    f.expect("use_bidirectional_attention", False)
    f.take("hidden_act", None)  # an older name, which transformers doesn't read
    head_dim = values["head_dim"] or values["d_model"] // values["num_heads"]
    scaled_by = f.take("query_pre_attn_scalar", 256.0)
    ranges.Range(above=0).check(scaled_by, f"{f.where}: query_pre_attn_scalar")
    scale = float(scaled_by) ** -0.5
    return {
        **values,
        "mlp": common.read_activation(f, "hidden_activation", gated=True, default="gelu_pytorch_tanh"),
        "block": "sandwich",
        "norm_offset": 1.0,
        "embed_scale": True,
        "attention_scale": 0.0 if scale == head_dim**-0.5 else scale,
        "attention_bias": bias,
        "attention_out_bias": bias,
    }


def write(c: ModelConfig) -> dict[str, Any]:
    return {
        **write_gemma(c),
        **common.write_rope(c),
        "attn_logit_softcapping": c.attention_softcap or None,
        "final_logit_softcapping": c.logit_softcap or None,
    }


def write_gemma(c: ModelConfig) -> dict[str, Any]:
    scalar = round(c.scale**-2, 6)
    kinds = [c.sliding_window[i % len(c.sliding_window)] for i in range(c.num_layers)]
    return {
        **common.write_decoder(c),
        "hidden_activation": common.write_activation(c, gated=True),
        "query_pre_attn_scalar": int(scalar) if scalar == int(scalar) else scalar,
        "attention_bias": c.attention_bias,
        "sliding_window": max(kinds) or None,
        "layer_types": ["sliding_attention" if window else "full_attention" for window in kinds],
    }


def tensors(c: ModelConfig) -> list[Tensor]:
    return common.decoder_tensors(c, NORMS)
