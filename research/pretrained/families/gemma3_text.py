"""Gemma 3's text models (arXiv:2503.19786): Gemma 2 with norms on queries and keys, and a RoPE of its own in layers
with a sliding window."""

from typing import Any

from research import ranges
from research.errors import InputError
from research.models.config import ModelConfig
from research.pretrained.families import common, gemma2
from research.pretrained.types import Fields, Tensor, windows

ARCHITECTURES = ("Gemma3ForCausalLM", "Gemma3TextForSequenceClassification")


def read(f: Fields) -> dict[str, Any]:
    values = gemma2.read_gemma(f)
    f.expect("attn_logit_softcapping", None)
    pattern = f.take("sliding_window_pattern", f.take("_sliding_window_pattern", 6))
    ranges.Range(1).check(pattern, f"{f.where}: sliding_window_pattern")
    every = ["full_attention" if (i + 1) % pattern == 0 else "sliding_attention" for i in range(values["num_layers"])]
    types = common.read_layer_types(f, values["num_layers"], every)
    local, ropes = f.take("rope_local_base_freq", 10_000.0), f.section("rope_parameters")
    if ropes is not None:
        sliding = ropes.section("sliding_attention")
        if sliding is None:
            raise InputError(f"{ropes.where}: lacks the field 'sliding_attention'. Copy the file anew.")
        local = sliding.take("rope_theta", local)
        sliding.expect("rope_type", "default")
        f.replace("rope_parameters", ropes.take("full_attention"))
    return {
        **values,
        **common.read_rope(f, values, theta=1_000_000.0),
        "local_rope_theta": float(local),
        "sliding_window": windows(types, f.take("sliding_window", 4096)),
        "qk_norm": "head",
        "logit_softcap": gemma2.read_logit_softcap(f, values),
    }


def write(c: ModelConfig) -> dict[str, Any]:
    return {
        **gemma2.write_gemma(c),
        **common.write_rope(c),
        "rope_local_base_freq": c.local_rope_theta,
        "final_logit_softcapping": c.logit_softcap or None,
    }


def tensors(c: ModelConfig) -> list[Tensor]:
    return common.decoder_tensors(c, gemma2.NORMS)
