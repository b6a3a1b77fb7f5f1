"""Qwen 3 (arXiv:2505.09388): Llama with norms on queries and keys."""

from typing import Any

from research.models.config import ModelConfig
from research.pretrained.families import common, llama
from research.pretrained.types import Fields, Tensor

ARCHITECTURES = ("Qwen3ForCausalLM", "Qwen3ForSequenceClassification")


def read(f: Fields) -> dict[str, Any]:
    values = common.read_decoder(f)
    bias = f.take("attention_bias", False)
    return {
        **values,
        **common.read_rope(f, values),
        "mlp": common.read_activation(f, "hidden_act", gated=True, default="silu"),
        "sliding_window": common.read_windows(f, values["num_layers"]),
        "qk_norm": "head",
        "attention_bias": bias,
        "attention_out_bias": bias,
    }


def write(c: ModelConfig) -> dict[str, Any]:
    return {
        **common.write_decoder(c),
        **common.write_rope(c),
        "hidden_act": common.write_activation(c, gated=True),
        "attention_bias": c.attention_bias,
        "use_sliding_window": bool(c.sliding_window[0]),
        "sliding_window": c.sliding_window[0] or None,
        "max_window_layers": 0 if c.sliding_window[0] else c.num_layers,
    }


def tensors(c: ModelConfig) -> list[Tensor]:
    return common.decoder_tensors(c, llama.NORMS)
