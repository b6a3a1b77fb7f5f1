"""Qwen 2 and 2.5 (arXiv:2407.10671): Llama with biases on queries, keys and values."""

from typing import Any

from research.models.config import ModelConfig
from research.pretrained.families import common, llama
from research.pretrained.types import Fields, Tensor

ARCHITECTURES = ("Qwen2ForCausalLM", "Qwen2ForSequenceClassification")


def read(f: Fields) -> dict[str, Any]:
    values = common.read_decoder(f)
    f.expect("use_mrope", False)
    return {
        **values,
        **common.read_rope(f, values),
        "mlp": common.read_activation(f, "hidden_act", gated=True, default="silu"),
        "sliding_window": common.read_windows(f, values["num_layers"]),
        "attention_bias": True,
    }


def write(c: ModelConfig) -> dict[str, Any]:
    return {
        **common.write_decoder(c),
        **common.write_rope(c),
        "hidden_act": common.write_activation(c, gated=True),
        "use_sliding_window": bool(c.sliding_window[0]),
        "sliding_window": c.sliding_window[0] or None,
        "max_window_layers": 0 if c.sliding_window[0] else c.num_layers,
    }


def tensors(c: ModelConfig) -> list[Tensor]:
    return common.decoder_tensors(c, llama.NORMS)
