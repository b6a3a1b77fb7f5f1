"""Mistral 7B (arXiv:2310.06825): Llama with a sliding window in every layer."""

from typing import Any

from research.models.config import ModelConfig
from research.pretrained.families import common, llama
from research.pretrained.types import Fields, Tensor

ARCHITECTURES = ("MistralForCausalLM", "MistralForSequenceClassification")


def read(f: Fields) -> dict[str, Any]:
    values = common.read_decoder(f)
    return {
        **values,
        **common.read_rope(f, values),
        "mlp": common.read_activation(f, "hidden_act", gated=True, default="silu"),
        "sliding_window": common.read_windows(f, values["num_layers"]),
    }


def write(c: ModelConfig) -> dict[str, Any]:
    return {
        **common.write_decoder(c),
        **common.write_rope(c),
        "hidden_act": common.write_activation(c, gated=True),
        "sliding_window": c.sliding_window[0] or None,
    }


def tensors(c: ModelConfig) -> list[Tensor]:
    return common.decoder_tensors(c, llama.NORMS)
