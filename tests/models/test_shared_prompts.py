"""Prompts that a trunk computes once for all rows that begin with them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from research import params
from research.models import transformer
from research.models.config import ModelConfig
from research.models.shared_prompts import SharedPrompts, joined, parted

G, S, T = 3, 6, 16
SIZES = {"vocab_size": 50, "num_layers": 2, "d_model": 16, "num_heads": 4, "num_kv_heads": 2, "d_ff": 24}


def batch():
    """Two prompts, one of which is shorter, with three answers each, of other lengths."""
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, 50, (2, G, T))
    tokens[:, 1:, :S] = tokens[:, :1, :S]
    segments, positions = np.ones((2, G, T), np.int32), np.tile(np.arange(T), (2, G, 1))
    segments[1, :, :2], positions[1] = 0, np.maximum(positions[1] - 2, 0)
    for answer in range(G):
        segments[:, answer, T - answer :] = 0
    fields = {"tokens": tokens, "segment_ids": segments, "positions": positions}
    return {name: jnp.asarray(x.reshape(-1, T), jnp.int32) for name, x in fields.items()}


def test_parted_is_whole_again():
    shared = SharedPrompts(G, S)
    tokens = batch()["tokens"]
    assert joined(shared, tokens).shape == (2, S + G * (T - S))
    np.testing.assert_array_equal(parted(shared, joined(shared, tokens)), tokens)


@pytest.mark.parametrize(
    "fields",
    [
        {"mlp": "swiglu"},
        {"sliding_window": (4, 0), "attention_softcap": 5.0, "block": "sandwich", "remat": "full"},
        pytest.param(
            {"positions": "learned", "norm": "layernorm", "num_experts": 4, "experts_per_token": 2, "max_length": 16},
            marks=pytest.mark.slow,
        ),
    ],
)
def test_hidden_states_and_gradients_are_those_of_whole_rows(fields):
    model = transformer.make_model(ModelConfig(**SIZES, **fields))
    values, rows = params.init(model.specs, jax.random.PRNGKey(0)), batch()
    real = np.asarray(rows["segment_ids"]) > 0
    weights = np.where(real[..., None], np.random.default_rng(1).normal(size=(2 * G, T, 16)), 0)

    def run(model):
        def total(values):
            out, states = model.hidden_at(values, rows, (1,))
            return jnp.sum(out * jnp.asarray(weights, jnp.float32)), (out, states[0])

        return jax.jit(jax.grad(total, has_aux=True))(values)

    whole, shared = run(model), run(transformer.sharing(model, SharedPrompts(G, S)))
    for a, b in zip(jax.tree.leaves(whole[0]), jax.tree.leaves(shared[0]), strict=True):
        np.testing.assert_allclose(a, b, atol=3e-6 * max(1.0, float(jnp.abs(a).max())))
    for a, b in zip(whole[1], shared[1], strict=True):
        np.testing.assert_allclose(a[real], b[real], atol=1e-5, rtol=1e-5)
