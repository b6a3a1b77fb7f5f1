"""Prefix language modelling: what is drawn, what is read whole and what is predicted."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import runs
from contexts import context
from test_train import CONFIG, INITIAL, MODEL, adamw, close, make_batch, one_step

from research import objectives, params, train
from research.devices import sharding
from research.errors import InputError
from research.models.transformer import make_model
from research.objectives import prefix_lm
from research.objectives.types import Forward

PREFIX = make_model(dataclasses.replace(CONFIG, prefix=True))


def spec(**options):
    return {"terms": {"prefix_lm": options}}


def mean_nll(batch, prefix, mask=None):
    """Of the tokens after the prefix, from the logits of all."""
    hidden = PREFIX.hidden(INITIAL, {**batch, "prefix": jnp.asarray(prefix)})
    logprobs = np.asarray(jax.nn.log_softmax(hidden @ PREFIX.unembed(INITIAL).kernel))
    nll = -np.take_along_axis(logprobs[:, :-1], np.asarray(batch["tokens"])[:, 1:, None], axis=2)[..., 0]
    segments = np.asarray(batch["segment_ids"])
    counts = (segments[:, 1:] == segments[:, :-1]) & (segments[:, 1:] > 0) & (np.asarray(prefix)[:, 1:] == 0)
    counts = counts if mask is None else counts & (np.asarray(mask)[:, 1:] > 0)
    return np.sum(nll * counts) / np.sum(counts)


def evaluate(batch, **options):
    step = jax.jit(train.EvalStep(objectives.load(spec(**options)), {"policy": PREFIX}))
    return train.means([step({"policy": INITIAL}, {}, batch, jax.random.PRNGKey(3))])


def draws(batch, share=(0.0, 1.0), **fields):
    return np.asarray(prefix_lm.random_prefix(context(batch, **fields), batch, share))


def lengths(batch, prefix):
    """[(tokens, tokens of the prefix)] of all documents."""
    segments = np.asarray(batch["segment_ids"])
    documents = [segments[row] == n for row in range(len(segments)) for n in np.unique(segments[row]) if n]
    rows = [row for row in range(len(segments)) for n in np.unique(segments[row]) if n]
    return [(int(here.sum()), int(prefix[row][here].sum())) for row, here in zip(rows, documents, strict=True)]


def test_a_random_prefix_begins_its_document_and_leaves_a_token():
    batch = make_batch(rows=64)
    prefix = draws(batch)
    for n, length in lengths(batch, prefix):
        assert (1 <= length < n) if n > 1 else length == 0  # nothing can be predicted of a single token
    positions, segments = np.asarray(batch["positions"]), np.asarray(batch["segment_ids"])
    inside = (positions[:, 1:] > 0) & (segments[:, 1:] > 0)
    assert not np.any((prefix[:, 1:] > prefix[:, :-1])[inside])
    assert not np.any(prefix[segments == 0])
    assert any(n == 1 for n, _ in lengths(batch, prefix))


def test_random_lengths_are_uniform_within_the_shares():
    """Documents of 11 tokens have prefixes of 1 to 10 alike; a fixed share gives them all the same."""
    rows, T = 2000, 22
    segments = np.repeat([[1] * 11 + [2] * 11], rows, axis=0).astype(np.int32)
    batch = {"tokens": segments, "segment_ids": segments, "positions": np.tile(np.arange(T) % 11, (rows, 1))}
    batch = {name: jnp.asarray(value, jnp.int32) for name, value in batch.items()}
    counts = np.bincount([length for _, length in lengths(batch, draws(batch))], minlength=11)
    assert counts[0] == 0
    np.testing.assert_allclose(counts[1:], 400, atol=90)  # 4.7 standard deviations
    assert {length for _, length in lengths(batch, draws(batch, (0.5, 0.5)))} == {6}
    assert {length for _, length in lengths(batch, draws(batch, (0.8, 1.0)))} == {9, 10}
    two = draws(batch)
    assert np.mean(two[:, :11].sum(1) == two[:, 11:].sum(1)) < 0.2  # each document has a draw of its own


def test_draws_are_those_of_the_row_and_the_step():
    batch = make_batch()
    whole, rows = draws(batch), jnp.asarray([5, 2])
    part = {name: value[rows] for name, value in batch.items()}
    np.testing.assert_array_equal(draws(part, rows=rows), whole[rows])
    assert not np.array_equal(draws(batch, key=jax.random.PRNGKey(9)), whole)


def test_the_loss_is_that_of_what_follows_a_random_prefix():
    batch, seen = make_batch(), []
    counted = PREFIX._replace(hidden=lambda p, b: seen.append(b["prefix"]) or PREFIX.hidden(p, b))
    step = train.EvalStep(objectives.load(spec()), {"policy": counted})
    means = train.means([step({"policy": INITIAL}, {}, batch, jax.random.PRNGKey(3))])
    assert len(seen) == 1
    np.testing.assert_allclose(means["loss"], mean_nll(batch, seen[0]), rtol=1e-5)
    real = np.asarray(batch["segment_ids"]) > 0
    np.testing.assert_allclose(means["prefix_share"], np.asarray(seen[0])[real].mean(), rtol=1e-5)
    assert means.keys() == {"loss", "suffix_nll", "suffix_accuracy", "prefix_share"}


def test_a_given_split_is_the_data_s_or_where_prompts_end():
    """Prompts end before the first token of loss_mask; a document without any is read and not trained on."""
    batch = make_batch()
    positions, segments, mask = (np.asarray(batch[k]) for k in ("positions", "segment_ids", "loss_mask"))
    prompt = np.zeros(mask.shape, np.int32)
    for row, t in np.ndindex(*mask.shape):
        before = mask[row, t - positions[row, t] : t + 1]
        prompt[row, t] = segments[row, t] > 0 and not before.any()
    assert 0.2 < prompt.mean() < 0.8
    found = evaluate(batch, split="given")
    np.testing.assert_allclose(found["loss"], mean_nll(batch, prompt, mask), rtol=1e-5)
    np.testing.assert_allclose(found["nll"], found["loss"], rtol=1e-6)
    own = ((positions < 2) & (segments > 0)).astype(np.int32)
    found = evaluate({**batch, "prefix": jnp.asarray(own)}, split="given")
    np.testing.assert_allclose(found["loss"], mean_nll(batch, own, mask), rtol=1e-5)


def test_a_split_of_the_data_is_read_in_the_pass_of_all_terms():
    batch, calls = make_batch(), []
    batch["prefix"] = (batch["positions"] < 2).astype(jnp.int32)
    counted = PREFIX._replace(hidden=lambda p, b: calls.append(1) or PREFIX.hidden(p, b))
    terms = objectives.load({"terms": {"prefix_lm": {"split": "given"}, "sft": 1.0, "next_token": 1.0}})
    forward = Forward({"policy": counted}, {"policy": INITIAL}, batch)
    outs = {name: term.objective.loss(forward, batch, context(batch)) for name, term in terms.items()}
    assert len(calls) == 1
    # What stands in a prefix is seen, hence not predicted by next_token either; a causal model predicts it.
    np.testing.assert_allclose(
        outs["next_token"].loss_sum / outs["next_token"].weight, mean_nll(batch, batch["prefix"]), rtol=1e-5
    )
    causal = Forward({"policy": MODEL}, {"policy": INITIAL}, batch)
    assert float(terms["next_token"].objective.loss(causal, batch, context(batch)).weight) > float(
        outs["next_token"].weight
    )


@pytest.fixture(scope="module")
def whole():
    return one_step(spec(), make_batch(), model=PREFIX, optimizer=adamw(PREFIX), steps=3)


@pytest.mark.slow
@pytest.mark.parametrize("parts", [2, 4])
def test_microbatches_give_the_update_of_the_whole_batch(whole, parts):
    cut = one_step(spec(), make_batch(), model=PREFIX, optimizer=adamw(PREFIX), steps=3, microbatches=parts)
    close(cut[0].params, whole[0].params, rtol=1e-3, atol=1e-5)
    for name in ("loss", "prefix_share", "supervised_fraction"):
        np.testing.assert_allclose(*(m[name][0] / m[name][1] for m in (cut[1], whole[1])), rtol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("axes", [{"data": 8}, {"fsdp": 2, "sequence": 2, "tensor": 2}])
def test_sharded_equals_single_device(whole, axes):
    mesh = sharding.make_mesh(axes)
    with jax.set_mesh(mesh):
        values = jax.device_put({"policy": INITIAL}, params.shardings({"policy": PREFIX.specs}, mesh))
        state = train.init_state(values, adamw(PREFIX), jax.random.PRNGKey(1))
        rows = jax.device_put(make_batch(), sharding.named(mesh, ("batch", "time")))
        step = jax.jit(
            train.TrainStep(objectives.load(spec()), {"policy": PREFIX}, adamw(PREFIX), lambda t: jnp.asarray(1.0))
        )
        for _ in range(3):
            state, metrics = step(state, {}, rows)
    close(state.params, whole[0].params, rtol=1e-3, atol=1e-5)
    assert float(metrics["prefix_share"][0]) == float(whole[1]["prefix_share"][0])


def test_a_resumed_run_is_the_uninterrupted_one(tmp_path, whole):
    batch, optimizer = make_batch(), adamw(PREFIX)
    step = jax.jit(train.TrainStep(objectives.load(spec()), {"policy": PREFIX}, optimizer, lambda t: jnp.asarray(1.0)))
    first, _ = step(train.init_state({"policy": INITIAL}, optimizer, jax.random.PRNGKey(1)), {}, batch)
    state = runs.restored(first, tmp_path)
    for _ in range(2):
        state, _ = step(state, {}, batch)
    jax.tree.map(np.testing.assert_array_equal, state.params, whole[0].params)


def test_a_causal_model_is_refused():
    with pytest.raises(InputError, match=r"^model.prefix = False: .* Set model.prefix = True"):
        one_step(spec(), make_batch(), model=MODEL, optimizer=optax.sgd(1.0))


def test_an_encoder_is_refused_by_what_it_is():
    encoder = make_model(dataclasses.replace(CONFIG, causal=False))
    with pytest.raises(InputError, match=r"^model.causal = False: every token sees those after it"):
        one_step(spec(), make_batch(), model=encoder, optimizer=optax.sgd(1.0))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"split": "radnom"}, r"split = 'radnom': .*Did you mean 'random'\?"),
        ({"share": (0.5, 0.2)}, r"share = \(0.5, 0.2\): must be the least and the greatest share"),
        ({"share": (0.5, 1.2)}, r"share = 1.2: must be in \[0, 1\]"),
        ({"share": 0.5}, "share = 0.5: must be of type list"),
        ({"split": "given", "share": (0.5, 1.0)}, "is of split = 'random'"),
    ],
)
def test_what_cannot_be_is_named(options, message):
    with pytest.raises(InputError, match=f"^objective.terms.prefix_lm.{message}" if message[0] == "s" else message):
        objectives.load(spec(**options))
