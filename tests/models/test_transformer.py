"""Variants of the transformer compute what a few lines of numpy do; packed documents and the future stay unseen."""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from research import params
from research.devices import sharding
from research.errors import InputError
from research.models.config import ModelConfig
from research.models.transformer import make_model

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


@functools.cache
def build(variant, **changes):
    model = make_model(dataclasses.replace(BASE, **VARIANTS[variant], **changes))
    return model, jax.jit(lambda key: params.init(model.specs, key))(jax.random.PRNGKey(0))


def packed(tokens, lengths):
    """One row [1, T] of documents of these lengths."""
    segments = np.repeat(np.arange(len(lengths)) + 1, lengths)[None].astype(np.int32)
    positions = np.concatenate([np.arange(n) for n in lengths])[None].astype(np.int32)
    return {"tokens": jnp.asarray(tokens), "segment_ids": jnp.asarray(segments), "positions": jnp.asarray(positions)}


def logits(model, values, batch):
    return compiled(model.hidden, model.unembed)(values, batch)


@functools.cache
def compiled(hidden, unembed):
    def f(values, batch):
        head = unembed(values)
        x = hidden(values, batch).astype(jnp.float32) @ head.kernel
        return head.softcap * jnp.tanh(x / head.softcap) if head.softcap else x

    return jax.jit(f)


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


def with_prefix(batch, lengths):
    """The batch where so many first tokens of each document are its prefix."""
    starts = jnp.asarray(lengths, jnp.int32)[batch["segment_ids"] - 1]
    return {**batch, "prefix": (batch["positions"] < starts).astype(jnp.int32)}


@pytest.mark.parametrize("variant", ["llama", "gemma"])
def test_a_prefix_is_read_in_both_directions_and_the_rest_in_one(variant):
    """With no prefix a document is as in the causal model, and all of it as in an encoder; packed it is as if alone."""
    model, values = build(variant, prefix=True)
    tokens = np.random.default_rng(0).integers(0, 64, (1, 20)).astype(np.int32)
    batch = packed(tokens, [7, 13])
    causal, encoder = (logits(build(variant, causal=c)[0], values, batch) for c in (True, False))
    np.testing.assert_array_equal(logits(model, values, batch), causal)  # the field is missing
    np.testing.assert_array_equal(logits(build(variant)[0], values, with_prefix(batch, [7, 5])), causal)  # or not read
    mixed = logits(model, values, with_prefix(batch, [7, 0]))
    np.testing.assert_allclose(mixed[:, :7], encoder[:, :7], rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(mixed[:, 7:], causal[:, 7:], rtol=1e-4, atol=1e-5)
    row = logits(model, values, with_prefix(batch, [3, 5]))
    alone = logits(model, values, with_prefix(packed(tokens[:, 7:], [13]), [5]))
    np.testing.assert_allclose(row[:, 7:], alone, rtol=1e-4, atol=1e-5)
    for t, first in ((16, 16), (9, 7)):  # after the prefix of the second document, and in it
        changed = tokens.copy()
        changed[0, t] = (changed[0, t] + 1) % 64
        other = logits(model, values, with_prefix(packed(changed, [7, 13]), [3, 5]))
        np.testing.assert_array_equal(np.asarray((other != row).any(axis=2))[0], np.arange(20) >= first)


@pytest.mark.slow
@pytest.mark.parametrize("remat", ["none", "full", "dots"])
def test_a_prefix_reaches_every_layer_whatever_is_recomputed(remat):
    plain, values = build("llama", prefix=True, remat="none", attention="reference")
    other, _ = build("llama", prefix=True, remat=remat, attention="cpu")
    batch = with_prefix(packed(np.arange(20, dtype=np.int32)[None], [7, 13]), [3, 5])

    def loss(model, values):
        hidden, (state,) = model.hidden_at(values, batch, (2,))
        return jnp.sum(jnp.sin(hidden)) + jnp.sum(jnp.sin(state))

    one, two = (jax.jit(jax.grad(lambda v, m=m: loss(m, v)))(values) for m in (plain, other))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=2e-4), one, two)


def shaken(values):
    """Values with noise, so that biases are no longer 0 nor scales 1."""
    leaves, structure = jax.tree.flatten(values)
    rng = np.random.default_rng(1)
    return structure.unflatten([jnp.asarray(v + 0.1 * rng.normal(size=v.shape), v.dtype) for v in leaves])


def numpy_hidden(c, params, tokens):
    """The final hidden states [T, D] of one document by the papers' formulas, in float64, head by head."""
    p = jax.tree.map(lambda w: np.asarray(w, np.float64), params)
    T, h = len(tokens), c.dim_per_head
    frequencies = c.rope_theta ** (-np.arange(0, h, 2) / h)
    cos, sin = (f(np.arange(T)[:, None] * frequencies) for f in (np.cos, np.sin))
    erf = np.vectorize(math.erf)
    activation = {
        "swiglu": lambda x: x / (1 + np.exp(-x)),
        "gelu": lambda x: 0.5 * x * (1 + erf(x / 2**0.5)),
        "geglu_tanh": lambda x: 0.5 * x * (1 + np.tanh((2 / np.pi) ** 0.5 * (x + 0.044715 * x**3))),
    }[c.mlp]

    def linear(p, x, path="td,dn->tn"):
        y = np.einsum(path, x, p["kernel"])
        return y + p["bias"] if "bias" in p else y

    def norm(p, x, center=c.norm == "layernorm"):
        x = x - x.mean(-1, keepdims=True) if center else x
        return x / np.sqrt((x**2).mean(-1, keepdims=True) + c.norm_eps) * p["scale"] + p.get("bias", 0)

    def rope(x):
        a, b = x[:, : h // 2], x[:, h // 2 :]
        return np.concatenate([a * cos - b * sin, b * cos + a * sin], -1)

    x = p["embed"][tokens] * (c.d_model**0.5 if c.embed_scale else 1)
    for i in range(c.num_layers):
        layer = jax.tree.map(lambda w, i=i: w[i], p["layers"])
        attention, y = layer["attention"], norm(layer["attention_norm"], x)
        q, k, v = (linear(attention[name], y, "td,dnh->tnh") for name in "qkv")
        if c.qk_norm == "head":
            q, k = norm(attention["q_norm"], q, False), norm(attention["k_norm"], k, False)
        out = np.zeros((T, c.num_heads, h))
        age = np.arange(T)[:, None] - np.arange(T)[None]
        visible = (age >= 0) & (age < (c.sliding_window[i % len(c.sliding_window)] or T))
        for head in range(c.num_heads):
            group = head // (c.num_heads // c.num_kv_heads)
            scores = rope(q[:, head]) @ rope(k[:, group]).T / h**0.5
            if c.attention_softcap:
                scores = c.attention_softcap * np.tanh(scores / c.attention_softcap)
            weights = np.where(visible, np.exp(scores - scores.max()), 0)
            out[:, head] = weights / weights.sum(-1, keepdims=True) @ v[:, group]
        x = x + linear(attention["o"], out, "tnh,nhd->td")
        mlp, y = layer["mlp"], norm(layer["mlp_norm"], x)
        up = linear(mlp["up"], y)
        x = x + linear(mlp["down"], activation(linear(mlp["gate"], y)) * up if "gate" in mlp else activation(up))
    return norm(p["final_norm"], x)


@pytest.mark.parametrize("variant", VARIANTS)
def test_hidden_states_are_those_of_a_transformer_in_numpy(variant):
    model, values = build(variant)
    values = shaken(values)
    tokens = np.random.default_rng(0).integers(0, 64, 12).astype(np.int32)
    ours = jax.jit(model.hidden)(values, packed(tokens[None], [12]))[0]
    np.testing.assert_allclose(ours, numpy_hidden(model.config, values, tokens), rtol=2e-3, atol=2e-4)


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_parameter_has_an_effect(variant):
    """What is in the specs is used: another value of any array gives other logits."""
    model, values = build(variant)
    values = shaken(values)
    batch = packed(np.random.default_rng(0).integers(0, 64, (1, 8)).astype(np.int32), [8])
    gradient = jax.jit(jax.grad(lambda values: jnp.sum(jnp.sin(logits(model, values, batch)))))(values)
    for path, x in jax.tree_util.tree_leaves_with_path(gradient):
        assert np.max(np.abs(x)) > 1e-4, params.path_name(path)


def test_initial_values_are_spread_as_the_specs_say():
    """Kernels that write to the residual stream start smaller, by sqrt(2 L); scales at 1 - norm_offset; biases at 0."""
    _, values = build("gpt", norm_offset=0.25, d_model=128, d_ff=256)
    layers = values["layers"]
    for kernel, std in (
        (layers["attention"]["q"]["kernel"], 0.02),
        (layers["attention"]["o"]["kernel"], 0.02 / 6**0.5),
        (layers["mlp"]["down"]["kernel"], 0.02 / 6**0.5),
        (values["embed"], 0.02),
    ):
        np.testing.assert_allclose(np.std(kernel), std, rtol=0.05)
    np.testing.assert_array_equal(layers["mlp_norm"]["scale"], 0.75)
    np.testing.assert_array_equal(layers["mlp"]["up"]["bias"], 0.0)


def test_every_kernel_is_cut_over_both_axes_of_a_mesh():
    """What one of eight devices holds of each array: kernels an eighth, norms all of it."""
    model = make_model(dataclasses.replace(BASE, **VARIANTS["qwen"]))
    placed = params.shardings(model.specs, sharding.make_mesh({"fsdp": 4, "tensor": 2}))
    shapes = jax.tree.map(lambda s, where: where.shard_shape(s.shape), model.specs, placed, is_leaf=params.is_spec)
    layers = shapes["layers"]
    assert {name: layers["attention"][name]["kernel"] for name in "qkvo"} == {
        "q": (3, 8, 2, 8),
        "k": (3, 8, 1, 8),
        "v": (3, 8, 1, 8),
        "o": (3, 2, 8, 8),
    }
    assert layers["attention"]["q_norm"]["scale"] == (3, 8)
    assert layers["attention_norm"]["scale"] == (3, 32)
    assert layers["mlp"]["up"]["kernel"] == layers["mlp"]["gate"]["kernel"] == (3, 8, 24)
    assert layers["mlp"]["down"]["kernel"] == (3, 24, 8)
    assert shapes["head"] == (8, 32)


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
    hidden = jax.jit(half.hidden)(values, batch)
    assert hidden.dtype == jnp.bfloat16
    np.testing.assert_allclose(hidden.astype(jnp.float32), jax.jit(full.hidden)(values, batch), rtol=0.1, atol=0.1)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"head_dim": 7}, "model.head_dim = 7"),
        ({"dtype": "float16"}, "model.dtype"),
        ({"sliding_window": ()}, "sliding"),
        ({"prefix": True, "causal": False}, "model.prefix = True: .* model.causal = False"),
        ({"prefix": True, "num_labels": 2}, "model.prefix = True: .* model.num_labels = 2"),
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
