"""Variants of the transformer: shapes and axes agree, packed documents and the future stay unseen."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from research import params
from research.devices import sharding
from research.errors import InputError
from research.models.config import ModelConfig
from research.models.transformer import flops_per_token, make_model

BASE = ModelConfig(vocab_size=64, num_layers=3, d_model=32, num_heads=4, num_kv_heads=2, d_ff=48, max_length=32)
VARIANTS = {
    "llama": {},
    "gpt": {
        "norm": "layernorm",
        "mlp": "gelu",
        "attention_bias": True,
        "attention_out_bias": True,
        "mlp_bias": True,
        "num_kv_heads": 4,
    },
    "gemma": {
        "mlp": "geglu_tanh",
        "embed_scale": True,
        "attention_softcap": 5.0,
        "logit_softcap": 3.0,
        "sliding_window": (4, 0),  # three layers: a period and a remainder
        "head_dim": 16,
    },
    "qwen": {"qk_norm": "head", "tie_embeddings": False},
}


def build(variant, **changes):
    model = make_model(dataclasses.replace(BASE, **VARIANTS[variant], **changes))
    return model, params.init(model.specs, jax.random.PRNGKey(0))


def packed(tokens, lengths):
    """One row [1, T] of documents of these lengths."""
    segments = np.repeat(np.arange(len(lengths)) + 1, lengths)[None].astype(np.int32)
    positions = np.concatenate([np.arange(n) for n in lengths])[None].astype(np.int32)
    return {"tokens": jnp.asarray(tokens), "segment_ids": jnp.asarray(segments), "positions": jnp.asarray(positions)}


def logits(model, values, batch):
    head = model.unembed(values)
    x = model.hidden(values, batch).astype(jnp.float32) @ head.kernel
    return head.softcap * jnp.tanh(x / head.softcap) if head.softcap else x


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_packed_document_is_as_if_alone_and_sees_no_future(variant):
    model, values = build(variant)
    tokens = np.random.default_rng(0).integers(0, 64, (1, 20)).astype(np.int32)
    row = logits(model, values, packed(tokens, [7, 13]))
    for where, length in ((slice(0, 7), 7), (slice(7, 20), 13)):
        alone = logits(model, values, packed(tokens[:, where], [length]))
        np.testing.assert_allclose(row[:, where], alone, rtol=1e-4, atol=1e-5)
    changed = tokens.copy()
    changed[0, 12] = (changed[0, 12] + 1) % 64
    other = logits(model, values, packed(changed, [7, 13]))
    np.testing.assert_array_equal(other[:, :12], row[:, :12])
    assert not np.allclose(other[:, 12:], row[:, 12:])


@pytest.mark.parametrize("variant", VARIANTS)
def test_specs_agree_with_the_initial_values_and_shard(variant):
    model, values = build(variant)
    mesh = sharding.make_mesh({"fsdp": 4, "tensor": 2})
    placed = params.shardings(model.specs, mesh)
    for spec, value, where in zip(
        jax.tree.leaves(model.specs, is_leaf=params.is_spec),
        jax.tree.leaves(values),
        jax.tree.leaves(placed),
        strict=True,
    ):
        assert spec.shape == value.shape
        assert value.dtype == jnp.float32
        assert where.shard_shape(spec.shape)
    kernel = placed["layers"]["mlp"]["up"]["kernel"]
    assert kernel.shard_shape((3, 32, 48)) == (3, 8, 24)
    assert params.count(model.specs) == sum(v.size for v in jax.tree.leaves(values))


def test_sliding_window_forgets():
    model, values = build("llama", sliding_window=(4,), num_layers=1)
    tokens = np.random.default_rng(0).integers(0, 64, (1, 12)).astype(np.int32)
    row = logits(model, values, packed(tokens, [12]))
    changed = tokens.copy()
    changed[0, 0] = (changed[0, 0] + 1) % 64
    other = logits(model, values, packed(changed, [12]))
    np.testing.assert_array_equal(other[:, 4:], row[:, 4:])
    assert not np.allclose(other[:, :4], row[:, :4])


def test_bfloat16_is_close_and_parameters_stay_float32():
    full, values = build("gemma")
    half = make_model(dataclasses.replace(full.config, dtype="bfloat16"))
    batch = packed(np.arange(16, dtype=np.int32)[None], [16])
    assert half.hidden(values, batch).dtype == jnp.bfloat16
    np.testing.assert_allclose(
        half.hidden(values, batch).astype(jnp.float32), full.hidden(values, batch), rtol=0.1, atol=0.1
    )


def test_flops_count_matmuls_and_causal_attention():
    c = ModelConfig(
        vocab_size=4096, num_layers=6, d_model=256, num_heads=8, num_kv_heads=4, d_ff=768, tie_embeddings=False
    )
    attention = 256 * 256 * 2 + 2 * 256 * 128
    weights = 6 * (attention + 3 * 256 * 768) + 256 * 4096
    assert flops_per_token(c, 256) == 6 * weights + 6 * 6 * 256 * 256
    windowed = flops_per_token(dataclasses.replace(c, sliding_window=(32,)), 256)
    assert 6 * weights < windowed < flops_per_token(c, 256)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"head_dim": 7}, "model.head_dim = 7"),
        ({"dtype": "float16"}, "model.dtype"),
        ({"sliding_window": ()}, "sliding"),
    ],
)
def test_impossible_configs(changes, words):
    with pytest.raises(InputError, match=words):
        dataclasses.replace(BASE, **changes)


@pytest.mark.parametrize("sliding_window", [(0,), (0, 0)])
def test_neither_the_scan_nor_remat_keeps_the_weights_a_second_time(sliding_window):
    """A wide model and a short text: its gradient takes less than the weights beside its arguments and results."""
    wide = ModelConfig(64, 8, 32, 2, 2, d_ff=8192, remat="full", sliding_window=sliding_window)
    model = make_model(wide)
    values = params.tree_map(lambda s: jax.ShapeDtypeStruct(s.shape, s.dtype), model.specs)
    batch = {k: jax.ShapeDtypeStruct((1, 16), jnp.int32) for k in ("tokens", "segment_ids", "positions")}
    compiled = jax.jit(jax.grad(lambda p, b: jnp.sum(model.hidden(p, b)))).lower(values, batch).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < 0.7 * 4 * params.count(model.specs)
