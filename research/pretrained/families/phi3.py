"""Phi-3 (arXiv:2404.14219) and Phi-4-mini: Llama with fused maps, part of each head turned, and LongRoPE."""

from typing import Any

from research.models.config import ModelConfig
from research.pretrained.families import common, llama
from research.pretrained.types import Fields, Tensor

ARCHITECTURES = ("Phi3ForCausalLM", "Phi3ForSequenceClassification")


def read(f: Fields) -> dict[str, Any]:
    values = common.read_decoder(f, eps=1e-5)
    f.expect("attention_bias", False)
    return {
        **values,
        **common.read_rope(f, values),
        "mlp": common.read_activation(f, "hidden_act", gated=True, default="silu"),
        "sliding_window": common.read_windows(f, values["num_layers"]),
    }


def write(c: ModelConfig) -> dict[str, Any]:
    values = common.write_decoder(c) | common.write_rope(c)
    del values["head_dim"]  # phi3 has no such field
    values.setdefault("original_max_position_embeddings", c.max_length)
    if (
        c.rope_scaling.kind == "longrope"
    ):  # factor is the ratio of the two lengths, and the object holds the lists alone
        scaling = values["rope_scaling"]
        values["rope_scaling"] = {"type": "longrope", **{k: scaling[k] for k in ("short_factor", "long_factor")}}
    return values | {
        "hidden_act": common.write_activation(c, gated=True),
        "sliding_window": c.sliding_window[0] or None,
    }


def tensors(c: ModelConfig) -> list[Tensor]:
    layer = "model.layers.{layer}."
    qkv = tuple(f"layers/attention/{name}/kernel" for name in "qkv")
    gate_up = ("layers/mlp/gate/kernel", "layers/mlp/up/kernel")
    fused = [
        Tensor(layer + "self_attn.qkv_proj.weight", qkv, "(heads h) D -> D heads h", axis=1),
        Tensor(layer + "mlp.gate_up_proj.weight", gate_up, "FF D -> D FF", axis=1),
    ]
    apart = {path for tensor in fused for path in tensor.paths}
    return [*(t for t in common.decoder_tensors(c, llama.NORMS) if t.paths[0] not in apart), *fused]
