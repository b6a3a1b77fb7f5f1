"""Llama 1 to 3 and what is built like it (SmolLM, TinyLlama, Yi): arXiv:2302.13971, arXiv:2407.21783."""

from typing import Any

from research.models.config import ModelConfig
from research.pretrained.families import common
from research.pretrained.types import Fields, Tensor

ARCHITECTURES = ("LlamaForCausalLM", "LlamaForSequenceClassification")
NORMS = {"attention_norm": "input_layernorm", "mlp_norm": "post_attention_layernorm"}


def read(f: Fields) -> dict[str, Any]:
    values = common.read_decoder(f)
    bias = f.take("attention_bias", False)
    return {
        **values,
        **common.read_rope(f, values),
        "mlp": common.read_activation(f, "hidden_act", gated=True, default="silu"),
        "attention_bias": bias,
        "attention_out_bias": bias,
        "mlp_bias": f.take("mlp_bias", False),
    }


def write(c: ModelConfig) -> dict[str, Any]:
    return {
        **common.write_decoder(c),
        **common.write_rope(c),
        "hidden_act": common.write_activation(c, gated=True),
        "attention_bias": c.attention_bias,
        "mlp_bias": c.mlp_bias,
    }


def tensors(c: ModelConfig) -> list[Tensor]:
    return common.decoder_tensors(c, NORMS)
