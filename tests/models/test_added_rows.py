"""Rows of added tokens in parameters of their own: the same model, and how they begin."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from research import params
from research.errors import InputError
from research.models import added_rows
from research.models.config import ModelConfig
from research.models.generation import generate_batches, make_generate
from research.models.sampling import SamplingConfig
from research.models.transformer import make_model
from research.ops.losses import cross_entropy

SMALL = {"num_layers": 1, "d_model": 16, "num_heads": 2, "num_kv_heads": 1, "d_ff": 16, "init_std": 0.3}
KINDS = {
    "tied": {},
    "untied": {"tie_embeddings": False},
    "bias": {"tie_embeddings": False, "head_bias": True, "embed_scale": True},
    "tied with bias": {"head_bias": True, "logit_softcap": 5.0},
}
V, FIRST, N = 24, 17, 3
TOKENS = jax.random.randint(jax.random.key(2), (2, 12), 0, V).at[:, ::3].set(FIRST + 1)
BATCH = {
    "tokens": TOKENS,
    "segment_ids": jnp.ones_like(TOKENS),
    "positions": jnp.broadcast_to(jnp.arange(12, dtype=jnp.int32)[None], (2, 12)),
}


def models(kind):
    """A model with added rows, its parameters, and the same in one matrix."""
    c = ModelConfig(vocab_size=V, added_from=FIRST, added_rows=N, **SMALL, **KINDS[kind])
    model, whole = make_model(c), make_model(added_rows.whole(c))
    values = params.init(model.specs, jax.random.key(0))
    if c.head_bias:
        values["head_bias_added"] += 1.0
    rest = {name: x for name, x in values.items() if name in whole.specs}
    return model, values, whole, rest | added_rows.join(c, values)


@pytest.mark.parametrize("kind", KINDS)
def test_rows_apart_are_the_same_model(kind):
    model, values, whole, joined = models(kind)

    def loss(model, values):
        out = cross_entropy(
            model.hidden(values, BATCH), model.unembed(values), jnp.roll(TOKENS, -1, 1), jnp.ones((2, 12))
        )
        return out.loss_sum

    ours = jax.jit(jax.value_and_grad(lambda p: loss(model, p)))(values)
    theirs = jax.jit(jax.value_and_grad(lambda p: loss(whole, p)))(joined)
    np.testing.assert_allclose(ours[0], theirs[0], rtol=1e-6)
    rows = slice(FIRST, FIRST + N)
    for name in added_rows.grown_names(model.config):
        assert not np.asarray(ours[1][name].T[..., rows] if name == "embed" else ours[1][name][..., rows]).any()
    joined_gradient = {n: g for n, g in ours[1].items() if n in joined} | added_rows.join(model.config, ours[1])
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), joined_gradient, theirs[1])


def test_decoding_reads_added_rows():
    model, values, whole, joined = models("untied")
    prompts = [[FIRST, 1, FIRST + 2], [2]]

    def tokens(model, values):
        generate = make_generate(model, SamplingConfig(max_new_tokens=6, temperature=0.0))
        return [each.tokens for each in generate_batches(generate, values, prompts, jax.random.key(1), batch_size=2)]

    assert tokens(model, values) == tokens(whole, joined)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("rows", [17, 19, 24])
def test_new_rows_begin_as_the_mean_of_the_others(kind, rows):
    """The embedding of before ends at the last token, has room for some of the new ones, or for all of them."""
    c = ModelConfig(vocab_size=V, added_from=FIRST, added_rows=N, **SMALL, **KINDS[kind])
    specs = added_rows.before(c, make_model(c).specs, rows)
    assert not set(specs) & {"embed_added", "head_added", "head_bias_added"}
    old = params.init(specs, jax.random.key(0))
    if c.head_bias:
        old["head_bias"] = jnp.arange(rows, dtype=jnp.float32)
    new = added_rows.grow(c, old, {})
    for name in added_rows.grown_names(c):
        axis = 1 if name == "head" else 0
        before, after, own = (np.moveaxis(np.asarray(x), axis, 0) for x in (old[name], new[name], new[f"{name}_added"]))
        mean = before[:FIRST].mean(axis=0)
        assert (after.shape[0], own.shape[0]) == (V, N)
        np.testing.assert_array_equal(after[:rows], before)
        np.testing.assert_allclose(after[rows:], np.broadcast_to(mean, after[rows:].shape), rtol=1e-5, atol=1e-7)
        np.testing.assert_allclose(own, np.broadcast_to(mean, own.shape), rtol=1e-5, atol=1e-7)
    shapes = lambda tree: jax.tree.map(lambda x: x.shape, tree, is_leaf=params.is_spec)  # noqa: E731
    assert shapes({**old, **new}) == shapes(make_model(c).specs)


def test_random_rows_have_the_spread_of_the_others():
    c = ModelConfig(vocab_size=4000, added_from=1000, added_rows=3000, **SMALL)
    scale = np.arange(1, 17, dtype=np.float32)
    old = {"embed": scale * (1 + np.random.default_rng(0).normal(size=(1000, 16)).astype(np.float32))}
    noise = params.init(added_rows.noise_specs(c), jax.random.key(0))
    new = np.asarray(added_rows.grow(c, old, noise)["embed_added"])
    np.testing.assert_allclose(new.mean(axis=0), old["embed"].mean(axis=0), atol=0.1 * scale.max())
    np.testing.assert_allclose(new.std(axis=0), old["embed"].std(axis=0), rtol=0.1)


def test_muon_leaves_added_rows_to_adamw_and_they_decay():
    specs = make_model(ModelConfig(vocab_size=V, added_from=FIRST, added_rows=N, **SMALL, **KINDS["bias"])).specs
    names = ("embed_added", "head_added", "head_bias_added")
    assert [params.muon_dimensions(specs)[name] for name in names] == [None, None, None]
    assert [params.decay_mask(specs)[name] for name in names] == [True, True, False]


def test_sizes():
    assert [added_rows.grown_size(rows, 261) for rows in (300, 261, 260)] == [300, 261, 384]


def test_rows_that_can_not_be():
    c = ModelConfig(vocab_size=V, **SMALL)
    for fields, words in (
        (
            {"added_from": 20, "added_rows": 5},
            "model.added_rows = 5 from model.added_from = 20 on: aren't among the 24",
        ),
        ({"added_from": 20}, "model.added_from = 20: has no effect while model.added_rows = 0"),
    ):
        with pytest.raises(InputError, match=words):
            dataclasses.replace(c, **fields)
    with pytest.raises(InputError, match=r"model.new_rows = 'meen': no such choice. Did you mean 'mean'"):
        added_rows.check("meen", "model.new_rows")
