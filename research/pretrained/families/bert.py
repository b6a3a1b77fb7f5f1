"""BERT (arXiv:1810.04805) with its masked-LM head: an encoder, norms after the residual."""

from typing import Any

from research.models.config import ModelConfig
from research.pretrained.families import common
from research.pretrained.types import Fields, Tensor

ARCHITECTURES = ("BertForMaskedLM", "BertForPreTraining")
BODY = "bert"
SPARE = (  # the heads of its pretraining
    r".*embeddings\.position_ids",
    r"bert\.pooler\..*",
    r"cls\.seq_relationship\..*",
)
COPIES = {
    "cls.predictions.decoder.weight": "bert.embeddings.word_embeddings.weight",
    "cls.predictions.decoder.bias": "cls.predictions.bias",
}
_FIELDS = {
    "vocab_size": "vocab_size",
    "num_hidden_layers": "num_layers",
    "hidden_size": "d_model",
    "num_attention_heads": "num_heads",
    "intermediate_size": "d_ff",
    "max_position_embeddings": "max_length",
    "layer_norm_eps": "norm_eps",
    "type_vocab_size": "token_types",
}


def read(f: Fields) -> dict[str, Any]:
    values = f.take_all(_FIELDS)
    f.expect("position_embedding_type", "absolute")
    f.expect("is_decoder", False)
    f.expect("add_cross_attention", False)
    f.expect("tie_word_embeddings", True)
    return {
        **values,
        "num_kv_heads": values["num_heads"],
        "mlp": common.read_activation(f, "hidden_act", gated=False, default="gelu"),
        "block": "residual",
        "norm": "layernorm",
        "positions": "learned",
        "causal": False,
        "attention_bias": True,
        "attention_out_bias": True,
        "mlp_bias": True,
        "head_bias": True,
        "head_transform": True,
        "embed_norm": True,
    }


def write(c: ModelConfig) -> dict[str, Any]:
    values = {key: getattr(c, field) for key, field in _FIELDS.items()}
    return values | {"hidden_act": common.write_activation(c, gated=False), "tie_word_embeddings": c.tie_embeddings}


def tensors(c: ModelConfig) -> list[Tensor]:
    layer = "bert.encoder.layer.{layer}."
    transform = "cls.predictions.transform."
    all_tensors = [
        Tensor("bert.embeddings.word_embeddings.weight", ("embed",), "V D -> V D"),
        Tensor("bert.embeddings.position_embeddings.weight", ("position_embed",), "P D -> P D"),
        Tensor("bert.embeddings.token_type_embeddings.weight", ("token_type_embed",), "N D -> N D"),
        Tensor("cls.predictions.bias", ("head_bias",), "V -> V"),
        Tensor(transform + "dense.weight", ("head_transform/dense/kernel",), "out D -> D out"),
        Tensor(transform + "dense.bias", ("head_transform/dense/bias",), "D -> D"),
    ]
    for key, field in (
        ("bert.embeddings.LayerNorm", "embed_norm"),
        (transform + "LayerNorm", "head_transform/norm"),
        (layer + "attention.output.LayerNorm", "layers/attention_norm"),
        (layer + "output.LayerNorm", "layers/mlp_norm"),
    ):
        all_tensors += [Tensor(f"{key}.weight", (f"{field}/scale",), "D -> D")]
        all_tensors += [Tensor(f"{key}.bias", (f"{field}/bias",), "D -> D")]
    for key, field, kernel, bias in (
        ("attention.self.query", "attention/q", "(H h) D -> D H h", "(H h) -> H h"),
        ("attention.self.key", "attention/k", "(H h) D -> D H h", "(H h) -> H h"),
        ("attention.self.value", "attention/v", "(H h) D -> D H h", "(H h) -> H h"),
        ("attention.output.dense", "attention/o", "D (H h) -> H h D", "D -> D"),
        ("intermediate.dense", "mlp/up", "F D -> D F", "F -> F"),
        ("output.dense", "mlp/down", "D F -> F D", "D -> D"),
    ):
        all_tensors += [Tensor(f"{layer}{key}.weight", (f"layers/{field}/kernel",), kernel)]
        all_tensors += [Tensor(f"{layer}{key}.bias", (f"layers/{field}/bias",), bias)]
    return all_tensors
