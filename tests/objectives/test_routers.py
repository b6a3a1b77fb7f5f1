"""Losses of routers: what they are of a batch and of its parts, and where they can't be."""

import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_train import EXPERTS, INITIAL, INITIAL_EXPERTS, MODEL, make_batch

from research import objectives
from research.errors import InputError
from research.objectives import load_balance, router_z
from research.objectives.types import Context, Forward
from research.ops.moe import Routing

L, B, E = 2, 4, 3


@pytest.fixture(scope="module")
def routing():
    rng = np.random.default_rng(0)
    tokens = np.asarray([5, 0, 9, 2], np.float32)
    counts = rng.multinomial(2 * tokens.astype(int), [0.6, 0.3, 0.1], size=(L, B)).astype(np.float32)
    probabilities = rng.dirichlet(np.ones(E), size=(L, B)).astype(np.float32) * tokens[:, None]
    squares, entropies = rng.random((2, L, B), np.float32) * tokens
    return Routing(*map(jnp.asarray, (counts, probabilities, squares, entropies, np.tile(tokens, (L, 1)))))


def of_rows(objective, routing, rows, gathered=()):
    """The loss of some rows, and its weight."""
    batch = {}
    part = jax.tree.map(lambda y: y[:, rows], routing)
    forward = types.SimpleNamespace(batch=batch, routing=lambda: part)
    if objective.gather is not None and gathered == ():
        gathered = objective.gather(forward, batch)
    out = objective.loss(forward, batch, Context(None, None, None, gathered=gathered))
    return float(out.loss_sum), float(out.weight), gathered


def by_hand(counts, probabilities, tokens):
    return E * np.sum(counts / tokens * probabilities / tokens)


def test_loads_are_those_of_the_whole_batch(routing):
    total, weight, gathered = of_rows(load_balance.make(), routing, slice(None))
    counts, probabilities = (np.sum(y, axis=1) for y in routing[:2])
    np.testing.assert_allclose(
        total / weight, np.mean([by_hand(counts[i], probabilities[i], 16) for i in range(L)]), rtol=1e-5
    )
    parts = [of_rows(load_balance.make(), routing, rows, gathered)[:2] for rows in (slice(0, 2), slice(2, 4))]
    np.testing.assert_allclose(np.sum(parts, axis=0), [total, weight], rtol=1e-5)


def test_loads_may_be_those_of_each_microbatch(routing):
    own = load_balance.make(whole_batch=False)
    parts = [of_rows(own, routing, rows)[:2] for rows in (slice(0, 2), slice(2, 4))]
    expected = [of_rows(load_balance.make(), routing, rows)[:2] for rows in (slice(0, 2), slice(2, 4))]
    np.testing.assert_allclose(parts, expected, rtol=1e-5)
    whole = of_rows(load_balance.make(), routing, slice(None))[0]
    assert abs(sum(total for total, _ in parts) / whole - 1) > 0.01


def test_even_loads_cost_as_much_as_there_are_experts_for_a_token(routing):
    even = routing._replace(
        counts=jnp.full((L, B, E), 2 / 3) * routing.tokens[..., None],
        probabilities=jnp.full((L, B, E), 1 / 3) * routing.tokens[..., None],
    )
    total, weight, _ = of_rows(load_balance.make(), even, slice(None))
    np.testing.assert_allclose(total / weight, 2, rtol=1e-5)


def test_the_z_loss_is_a_mean_over_tokens_and_layers(routing):
    total, weight, _ = of_rows(router_z.make(), routing, slice(None))
    np.testing.assert_allclose(total / weight, np.sum(routing.squares) / (16 * L), rtol=1e-5)


@pytest.mark.parametrize("name", ["load_balance", "router_z"])
def test_what_has_no_router_and_what_is_of_some_sources_is_refused(name):
    batch = make_batch()
    batch["source"] = jnp.zeros_like(batch["tokens"])

    def trace(model, initial, term):
        terms = objectives.load({"terms": {name: term}})
        forward = Forward({"policy": model}, {"policy": initial}, batch)
        inputs = objectives.terms.Inputs(jax.random.PRNGKey(0), jnp.asarray(0), jnp.arange(8), {})
        objectives.terms.losses(terms, forward, inputs, ("a", "b"))

    with pytest.raises(InputError, match=r"model.num_experts = 0: the model has no router"):
        trace(MODEL, INITIAL, 0.01)
    with pytest.raises(InputError, match="sources: routers are judged by all tokens"):
        trace(EXPERTS, INITIAL_EXPERTS, {"sources": ["a"]})
