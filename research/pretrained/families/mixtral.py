"""Mixtral (arXiv:2401.04088): Mistral with a mixture of experts in every layer."""

from typing import Any

from research.models.config import ModelConfig
from research.pretrained.families import common, llama, mistral
from research.pretrained.types import Fields, Tensor

ARCHITECTURES = ("MixtralForCausalLM",)


def read(f: Fields) -> dict[str, Any]:
    return {
        **mistral.read(f),
        "num_experts": f.take("num_local_experts", 8),
        "experts_per_token": f.take("num_experts_per_tok", 2),
    }


def write(c: ModelConfig) -> dict[str, Any]:
    return {**mistral.write(c), "num_local_experts": c.num_experts, "num_experts_per_tok": c.experts_per_token}


def tensors(c: ModelConfig) -> list[Tensor]:
    moe = "model.layers.{layer}.block_sparse_moe."
    return [
        *common.decoder_tensors(c, llama.NORMS),
        Tensor(moe + "gate.weight", ("layers/mlp/router/kernel",), "E D -> D E"),
        *common.mlp_tensors(c, moe + "experts.{expert}.", ("w1", "w3", "w2")),
    ]
