"""OLMo 2 (arXiv:2501.00656): Llama with norms after attention and MLP, and over all queries and keys."""

from typing import Any

from research.models.config import ModelConfig
from research.pretrained.families import common
from research.pretrained.types import Fields, Tensor

ARCHITECTURES = ("Olmo2ForCausalLM", "Olmo2ForSequenceClassification")


def read(f: Fields) -> dict[str, Any]:
    values = common.read_decoder(f, eps=1e-5)
    bias = f.take("attention_bias", False)
    return {
        **values,
        **common.read_rope(f, values),
        "mlp": common.read_activation(f, "hidden_act", gated=True, default="silu"),
        "block": "post",
        "qk_norm": "full",
        "attention_bias": bias,
        "attention_out_bias": bias,
    }


def write(c: ModelConfig) -> dict[str, Any]:
    values = common.write_decoder(c) | common.write_rope(c)
    return values | {"hidden_act": common.write_activation(c, gated=True), "attention_bias": c.attention_bias}


def tensors(c: ModelConfig) -> list[Tensor]:
    norms = {"attention_norm": "post_attention_layernorm", "mlp_norm": "post_feedforward_layernorm"}
    return common.decoder_tensors(c, norms)
