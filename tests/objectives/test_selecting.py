"""Objectives that select: rho1's tokens, rho's documents, doremi's weights; the same however a batch is cut."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import runs
from test_train import close, make_batch

from research import objectives, params, train
from research.devices import sharding
from research.errors import InputError
from research.models.config import ModelConfig
from research.models.transformer import make_model
from research.objectives import excess
from research.objectives.terms import init_carry
from research.objectives.types import Forward, next_token_targets
from research.sources import tokenizers

SOURCES = ("code", "prose", "talk")
TERMS = {
    "rho1": {"keep": 0.4},
    "rho": {"keep": 0.3},
    "doremi": {"weights": {"code": 2.0, "prose": 1.0, "talk": 1.0}, "eta": 2.0},
}
CONFIG = ModelConfig(vocab_size=128, num_layers=1, d_model=16, num_heads=2, num_kv_heads=2, d_ff=16, max_length=32)


def embeddings_alone():
    """A model whose last hidden states are its embeddings, which compiles in no time."""
    model = make_model(CONFIG)
    specs = {name: spec for name, spec in model.specs.items() if name in ("embed", "head")}
    return model._replace(specs=specs, hidden=lambda params, batch: params["embed"][batch["tokens"]])


MODEL = embeddings_alone()
POLICY, REFERENCE = (
    jax.tree.map(lambda x: 30 * x, params.init(MODEL.specs, key)) for key in jax.random.split(jax.random.PRNGKey(0))
)


def batch():
    rows = make_batch()
    source = jnp.where(rows["segment_ids"] > 0, rows["segment_ids"] % 3, 0)
    return rows | {"source": source.at[4:].set(0)}


@functools.cache
def three_steps(name, microbatches=1, mesh=None):
    tokenizer = tokenizers.make_tokenizer(tokenizers.TokenizerSpec(kind="byte"), lambda: iter(()))
    terms = objectives.load({"terms": {name: TERMS[name]}}, tokenizer)
    models = {"policy": MODEL, "reference": MODEL}
    optimizer = optax.sgd(1.0)
    names = SOURCES if name == "doremi" else ()
    step = train.TrainStep(terms, models, optimizer, lambda t: jnp.asarray(1.0), microbatches, sources=names)
    rows, trained, frozen = batch(), {"policy": POLICY}, {"reference": REFERENCE}
    if mesh:
        mesh = sharding.make_mesh(dict(mesh))
        placed = params.shardings({"policy": MODEL.specs}, mesh)
        trained = jax.device_put(trained, placed)
        rows = jax.device_put(rows, sharding.named(mesh, ("batch", "time")))
    with jax.set_mesh(mesh or sharding.make_mesh({}, jax.devices()[:1])):
        state = train.init_state(trained, optimizer, jax.random.PRNGKey(1), carry=init_carry(terms, rows))
        metrics, step = [], jax.jit(step)
        for _ in range(3):
            state, more = step(state, frozen, rows)
            metrics.append({k: float(s) / float(w) for k, (s, w) in more.items() if float(w)})
    return state, metrics


@pytest.mark.slow
@pytest.mark.parametrize("name", TERMS)
@pytest.mark.parametrize(("microbatches", "mesh"), [(4, None), (1, (("data", 8),))])
def test_a_batch_selects_the_same_in_microbatches_and_on_a_mesh(name, microbatches, mesh):
    whole, expected = three_steps(name)
    cut, metrics = three_steps(name, microbatches, mesh)
    close((cut.params, cut.carry), (whole.params, whole.carry), rtol=1e-3, atol=1e-5)
    for one, other in zip(metrics, expected, strict=True):
        for key in ("loss", "nll", "supervised_fraction", *(["selected"] if name != "doremi" else [])):
            np.testing.assert_allclose(one[key], other[key], rtol=1e-4, err_msg=key)


def read():
    forward = Forward({"policy": MODEL, "reference": MODEL}, {"policy": POLICY, "reference": REFERENCE}, batch())
    return excess.read(forward, batch())


def by_hand(role):
    rows = batch()
    log_p = jax.nn.log_softmax(role["embed"][rows["tokens"]] @ MODEL.unembed(role).kernel)
    targets, weights = next_token_targets(rows, rows["loss_mask"])
    return np.asarray(-jnp.take_along_axis(log_p, targets[:, :, None], axis=2)[..., 0]), np.asarray(weights)


def test_rho1_learns_the_share_of_all_tokens_with_the_highest_excess_loss():
    (nll, weights), (reference, _) = by_hand(POLICY), by_hand(REFERENCE)
    np.testing.assert_allclose(read().values, (nll - reference) * weights, rtol=1e-4, atol=1e-4)
    counted = np.flatnonzero(weights)
    best = counted[np.argsort(-(nll - reference).reshape(-1)[counted], kind="stable")]
    best = best[: round(0.4 * len(counted))]
    _, (first, *_) = three_steps("rho1")
    np.testing.assert_allclose(first["loss"], nll.reshape(-1)[best].mean(), rtol=1e-4)
    np.testing.assert_allclose(first["nll"], nll[weights > 0].mean(), rtol=1e-4)
    np.testing.assert_allclose(first["selected"], len(best) / len(counted), rtol=1e-5)
    assert first["selected_excess"] > first["excess"]


def test_rho_learns_whole_documents():
    (nll, weights), (reference, _) = by_hand(POLICY), by_hand(REFERENCE)
    segments = np.asarray(batch()["segment_ids"])
    documents = [
        (row, number)
        for row in range(len(segments))
        for number in np.unique(segments[row])
        if number and weights[row][segments[row] == number].sum()
    ]
    places = {each: (segments[each[0]] == each[1]) & (weights[each[0]] > 0) for each in documents}
    means = [(nll - reference)[row][places[row, number]].mean() for row, number in documents]
    best = [documents[i] for i in np.argsort(-np.array(means), kind="stable")[: round(0.3 * len(documents))]]
    tokens = np.concatenate([nll[row][places[row, number]] for row, number in best])
    _, (first, *_) = three_steps("rho")
    np.testing.assert_allclose(first["loss"], tokens.mean(), rtol=1e-4)
    np.testing.assert_allclose(first["documents"], len(best) / len(documents), rtol=1e-5)


def test_doremi_weighs_the_mean_losses_of_sources_and_reports_the_mean_of_its_weights():
    (nll, weights), (reference, _) = by_hand(POLICY), by_hand(REFERENCE)
    source = np.asarray(batch()["source"])
    own = [(source == i) & (weights > 0) for i in range(3)]
    scores = np.array([np.maximum(nll - reference, 0)[where].mean() for where in own])
    alpha = np.array([0.5, 0.25, 0.25]) * np.exp(2 * scores)
    alpha = (1 - 1e-3) * alpha / alpha.sum() + 1e-3 / 3
    state, (first, second, third) = three_steps("doremi")
    np.testing.assert_allclose([first[f"weight/{name}"] for name in SOURCES], alpha, rtol=1e-3)
    np.testing.assert_allclose(first["loss"], alpha @ [nll[where].mean() for where in own], rtol=1e-3)
    np.testing.assert_allclose([first[f"average/{name}"] for name in SOURCES], [0.5, 0.25, 0.25], rtol=1e-6)
    seen = np.array([[step[f"weight/{name}"] for name in SOURCES] for step in (first, second, third)])
    np.testing.assert_allclose([third[f"average/{name}"] for name in SOURCES], seen[:2].mean(axis=0), rtol=1e-4)
    np.testing.assert_allclose(state.carry["doremi"].average, seen.mean(axis=0), rtol=1e-4)


def test_with_all_kept_rho1_is_sft():
    state = {}
    for spec in ({"rho1": {"keep": 1.0}}, {"sft": 1.0}):
        terms = objectives.load({"terms": spec})
        step = train.TrainStep(terms, {"policy": MODEL, "reference": MODEL}, optax.sgd(1.0), lambda t: jnp.asarray(1.0))
        begin = train.init_state({"policy": POLICY}, step.optimizer, jax.random.PRNGKey(1))
        (name,) = spec
        state[name], _ = jax.jit(step)(begin, {"reference": REFERENCE}, batch())
    close(state["rho1"].params, state["sft"].params)


@pytest.mark.parametrize(
    ("term", "words"),
    [
        ({"rho1": {"keep": 0}}, "objective.terms.rho1.keep = 0: must be in (0, 1]"),
        ({"rho": {"keep": 1.5}}, "objective.terms.rho.keep = 1.5: must be in (0, 1]"),
        ({"doremi": 1.0}, "names the sources of data.sources"),
        (
            {"doremi": {"weights": {"a": 1.0, "b": 0.0}}},
            "weights.b = 0.0: must be above 0",
        ),
        ({"doremi": {"weights": {"a": 1.0, "b": 1.0}, "epsilon": 1}}, "epsilon = 1: must be in [0, 1)"),
    ],
)
def test_options_that_cannot_work(term, words):
    with pytest.raises(InputError) as error:
        objectives.load({"terms": term})
    assert words in str(error.value)


def test_other_sources_than_the_data_has_are_refused():
    c = runs.small(objective={"terms": {"doremi": {"weights": {"a": 1.0, "b": 1.0}}}})
    terms = objectives.load(c.objective)
    with pytest.raises(InputError, match=r"doremi: weighs the sources a, b, and data.sources has b, c. Name the same"):
        terms["doremi"].source_numbers(("b", "c"))
