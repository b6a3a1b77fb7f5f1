"""Qwen 3's mixtures of experts (arXiv:2505.09388)."""

from typing import Any

from research.models.config import ModelConfig
from research.pretrained.families import common, llama, qwen3
from research.pretrained.types import Fields, Tensor

ARCHITECTURES = ("Qwen3MoeForCausalLM",)


def read(f: Fields) -> dict[str, Any]:
    values = qwen3.read(f)  # intermediate_size, of dense layers, which there are none of
    f.expect("decoder_sparse_step", 1)
    f.expect("mlp_only_layers", [])
    return {
        **values,
        "d_ff": f.take("moe_intermediate_size"),
        "num_experts": f.take("num_experts", f.take("num_local_experts", 0)),
        "experts_per_token": f.take("num_experts_per_tok"),
        "normalize_router": f.take("norm_topk_prob", False),
    }


def write(c: ModelConfig) -> dict[str, Any]:
    return {
        **qwen3.write(c),
        "moe_intermediate_size": c.d_ff,
        "num_experts": c.num_experts,
        "num_experts_per_tok": c.experts_per_token,
        "norm_topk_prob": c.normalize_router,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
    }


def tensors(c: ModelConfig) -> list[Tensor]:
    return [
        *common.decoder_tensors(c, llama.NORMS),
        Tensor("model.layers.{layer}.mlp.gate.weight", ("layers/mlp/router/kernel",), "E D -> D E"),
        *common.mlp_tensors(c, "model.layers.{layer}.mlp.experts.{expert}."),
    ]
