"""Rows that are decoded together get what they would get alone, and what `generate` gives."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import soft_prompts

from research import params
from research.models import transformer
from research.models.config import ModelConfig
from research.models.generation import make_generate, pad_prompts
from research.models.sampling import SamplingConfig
from research.serving import draws as draws_lib
from research.serving.draws import Draws, choose_by_row
from research.serving.rows import STEPS, Ask, Rows

V, STOP = 24, (3,)
MODEL = transformer.make_model(
    ModelConfig(vocab_size=32, num_layers=1, d_model=32, num_heads=2, num_kv_heads=2, d_ff=64, max_length=640)
)
PARAMS = params.init(MODEL.specs, jax.random.key(0))
DRAWN = {"temperature": 0.9, "top_p": 0.8}


@pytest.fixture(scope="module")
def rows():
    return Rows(MODEL, PARAMS, V, STOP, count=3, longest=512)


def finish(rows, asks):
    """Decodes asks, each as soon as a row is free; returns (tokens, end) of each."""
    left, row_of, out = list(enumerate(asks)), {}, {i: ([], "") for i in range(len(asks))}
    while left or row_of:
        while left and rows.free:
            i, ask = left.pop(0)
            row_of[rows.admit(ask)] = i
        for row, (tokens, end) in rows.step().items():
            i = row_of[row]
            out[i] = ([*out[i][0], *tokens], end)
            if end:
                del row_of[row]
    return [out[i] for i in range(len(asks))]


@functools.cache
def generator(temperature, top_p):
    return make_generate(MODEL, SamplingConfig(24, temperature, top_p=top_p, stop_tokens=STOP), V)


def generated(ask):
    """What `generate` gives to the prompt of an ask."""
    generate = generator(ask.temperature, ask.top_p)
    padded, lengths = pad_prompts([ask.prompt])
    out = generate(PARAMS, padded, lengths, jax.random.key(ask.seed), np.array([ask.choice]), np.array([ask.most]))
    n = int(out.lengths[0])
    return out.tokens[0, :n].tolist(), np.asarray(out.logprobs[0, :n])


def test_rows_are_what_generate_gives(rows):
    """Greedy and drawn, with seeds and choices of their own, more than there are rows, with longer ones in between."""
    rng = np.random.default_rng(0)
    asks = [
        Ask(tuple(rng.integers(4, V, size)), most, seed, choice, **how)
        for size, most, seed, choice, how in (
            *((3, 20, 0, 0, {}), (9, 11, 7, 0, DRAWN), (5, 24, 7, 1, DRAWN)),
            *((1, 1, 0, 0, {}), (30, 24, 1, 2, DRAWN), (2, 7, 5, 0, {"temperature": 2.0})),
        )
    ]
    long = Ask(tuple(rng.integers(4, V, 300)), 100)  # needs more room than there is at first
    got = finish(rows, [*asks[:2], long, *asks[2:]])
    tokens, end = got.pop(2)
    assert len(tokens) == 100 or end == "stop"
    for ask, (tokens, end) in zip(asks, got, strict=True):
        expected, logprobs = generated(ask)
        assert [token.id for token in tokens] == expected
        assert end == ("stop" if expected[-1] in STOP else "length")
        np.testing.assert_allclose([token.logprob for token in tokens], logprobs, atol=1e-4)
    assert (rows.free, rows.used) == (3, 0)
    again = finish(rows, [asks[1]])  # alone, in the smallest room again
    assert [token.id for token in again[0][0]] == generated(asks[1])[0]


def test_a_row_that_is_cancelled_is_free_after_the_next_step(rows):
    first, second = (rows.admit(Ask((5, 6), 200, temperature=1.0, seed=i)) for i in range(2))
    rows.step()
    rows.cancel(first)
    assert (rows.used, rows.free) == (2, 1)
    assert list(rows.step()) == [second]
    assert rows.used == 1
    expected = generated(Ask((7, 8, 9), 12))[0]
    row = rows.admit(Ask((7, 8, 9), 12))
    got = []
    while row is not None:
        tokens, end = rows.step()[row]
        got, row = [*got, *tokens], None if end else row
    assert [token.id for token in got] == expected
    rows.clear()
    assert rows.free == 3


def test_a_cache_that_is_full_is_shifted(rows):
    """Requests that follow each other write past the end of the cache many times over."""
    ask = Ask(tuple(range(4, 24)), 24)
    expected = generated(ask)[0]
    keeper = Ask((4, 5), 200, temperature=1.0)  # begins early, so that the cache can't be moved far
    got = finish(rows, [keeper, *[ask] * 12])
    assert all([token.id for token in tokens] == expected for tokens, _ in got[1:])


def test_log_probabilities_of_the_likeliest(rows):
    ask = Ask((4, 9, 2), STEPS + 2, shows=True)
    ((tokens, _),) = finish(rows, [ask])
    batch = {"tokens": jnp.array([ask.prompt]), "segment_ids": jnp.ones((1, 3), jnp.int32)}
    batch["positions"] = jnp.arange(3)[None]
    logits = MODEL.unembed(PARAMS).logits(MODEL.hidden(PARAMS, batch)[:, -1])[0, :V]
    expected = jax.nn.log_softmax(logits)
    ids = [i for i, _ in tokens[0].likeliest]
    assert ids == np.argsort(-np.asarray(expected))[: draws_lib.SHOWN].tolist()
    np.testing.assert_allclose([p for _, p in tokens[0].likeliest], expected[np.array(ids)], atol=1e-4)
    assert all(token.likeliest[0] == (token.id, pytest.approx(token.logprob, abs=1e-5)) for token in tokens)


@pytest.mark.parametrize("wide", [False, True])
def test_what_few_candidates_leave_is_what_all_do(wide, monkeypatch):
    """Of rows that keep all, the top, the top share, and both; a wide one needs more than the candidates."""
    logits = jnp.asarray(np.random.default_rng(0).normal(size=(5, 30)) * 3, jnp.float32)
    top_p = np.array([1.0, 1.0, 0.97 if wide else 0.5, 0.6, 1.0], np.float32)
    draws = Draws(np.ones(5, np.float32), np.array([0, 4, 0, 6, 20 if wide else 8], np.int32), top_p, None, None, None)
    candidates = draws_lib.Candidates(logits, jnp.broadcast_to(jnp.arange(30, dtype=jnp.int32), (5, 30)))
    sorts = jnp.arange(5) > 0
    whole = draws_lib._truncate(candidates, draws, sorts)
    monkeypatch.setattr(draws_lib, "CANDIDATES", 8)
    few = draws_lib._truncate(candidates, draws, sorts)
    left = np.isfinite(whole.logits)
    np.testing.assert_array_equal(few.logits, whole.logits)
    np.testing.assert_array_equal(np.where(left, few.ids, 0), np.where(left, whole.ids, 0))
    assert left.sum(axis=1).tolist()[:2] == [30, 4]
    assert left[1:].sum(axis=1).max() > 8 if wide else left[1:].sum(axis=1).max() <= 8


@pytest.mark.slow
def test_rows_are_drawn_by_settings_of_their_own():
    """Frequencies of many draws: greedy, from all, from the top, from the top share, from all but the unlikely."""
    logits = jnp.log(jnp.array([0.4, 0.3, 0.15, 0.1, 0.05]))
    settings = [(0.0, 0, 1.0, 0.0), (1.0, 0, 1.0, 0.0), (1.0, 2, 1.0, 0.0), (1.0, 0, 0.6, 0.0), (1.0, 0, 1.0, 0.3)]
    settings += [(0.5, 3, 1.0, 0.0)]
    many, n = 500, len(settings)
    each = [jnp.repeat(jnp.array(x), many) for x in zip(*settings, strict=True)]
    A = n * many
    draws = Draws(*each, of_draws=jnp.ones(A, bool), shows=jnp.ones(A, bool))
    keys = jax.random.split(jax.random.key(1), A)
    tokens, chances = choose_by_row(jnp.broadcast_to(logits, (A, 5)), draws, keys, jnp.zeros(A, jnp.int32), 5)
    p = np.exp(np.asarray(logits))
    expected = [p * 0, p, p * [1, 1, 0, 0, 0], p * [1, 1, 0, 0, 0], p * [1, 1, 1, 0, 0], p**2 * [1, 1, 1, 0, 0]]
    expected[0][0] = 1
    for i, want in enumerate(expected):
        want = want / want.sum()
        got = np.bincount(tokens[i * many : (i + 1) * many], minlength=5) / many
        np.testing.assert_allclose(got, want, atol=0.09)
        assert not got[want == 0].any()
        if i:  # of what is drawn from; where nothing is drawn they are the model's
            first = i * many
            of = {int(k): float(np.exp(v)) for k, v in zip(chances.ids[first], chances.likeliest[first], strict=True)}
            np.testing.assert_allclose([of[k] for k in range(5)], want, atol=1e-5)
            np.testing.assert_allclose(np.exp(chances.chosen[first]), want[int(tokens[first])], atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize(
    "spec", [{"kind": "prompt", "tokens": 3}, {"kind": "prefix", "tokens": 3}], ids=lambda spec: spec["kind"]
)
def test_what_an_adapter_puts_before_documents_stands_before_prompts(spec):
    """Virtual tokens, and prefixes, of requests that share rows, and in a larger room."""
    config, base = soft_prompts.llama()
    model, values = soft_prompts.with_adapter(config, base, **spec)
    size = config.vocab_size
    rows = Rows(model, values, size, STOP, count=2, longest=model.max_length)
    generate = make_generate(model, SamplingConfig(6, stop_tokens=STOP), size)
    asks = [Ask(tuple(range(4, 4 + n)), 6) for n in (3, 9, 1, 20)]
    for ask, (tokens, _) in zip(asks, finish(rows, asks), strict=True):
        out = generate(values, *pad_prompts([ask.prompt]), jax.random.key(0))
        assert [token.id for token in tokens] == out.tokens[0, : int(out.lengths[0])].tolist()
