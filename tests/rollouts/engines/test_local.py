"""The engine on the run's own devices: what it answers, and with which probabilities."""

import jax
import numpy as np
import pytest

from research import params
from research.models import transformer
from research.models.config import ModelConfig
from research.models.sampling import SamplingConfig
from research.rollouts.engines.local import Local

V, STOP = 24, (3, 9, 11, 19)
MODEL = transformer.make_model(
    ModelConfig(vocab_size=32, num_layers=1, d_model=32, num_heads=2, num_kv_heads=2, d_ff=64, max_length=32)
)
PARAMS = params.init(MODEL.specs, jax.random.key(0))
PARAMS["embed"] *= 3.0  # so that probabilities differ
PROMPTS, KEY = [[5, 6, 7], [8]], np.array([0, 7], np.uint32)
ENGINE = Local(MODEL, V, prompts=3, longest=4)
ENGINE.sync(PARAMS, 5)


@jax.jit
def logits_of(batch):
    return MODEL.unembed(PARAMS).logits(MODEL.hidden(PARAMS, batch))[0, :, :V]


def log_softmax(tokens, temperature):
    """[N, V] of the token after each, by the whole model."""
    ids, n = np.zeros((1, 16), np.int32), len(tokens)
    ids[0, :n] = tokens
    batch = {"tokens": ids, "segment_ids": np.int32(np.arange(16)[None] < n), "positions": np.arange(16)[None]}
    return np.asarray(jax.nn.log_softmax(logits_of(batch)[:n] / temperature))


@pytest.mark.parametrize("top_k", [0, 4])
def test_log_probs_are_those_of_the_draw(top_k):
    sampling = SamplingConfig(6, temperature=0.7, top_k=top_k, stop_tokens=STOP)
    out = ENGINE.generate(PROMPTS, 4, sampling, KEY)
    assert out.tokens.shape == (8, 6)
    assert (out.versions == 5).all()
    assert len({tuple(tokens) for tokens in out.tokens}) > 2
    for row in range(8):
        prompt, n = PROMPTS[row // 4], out.lengths[row]
        answer = out.tokens[row, :n].tolist()
        log_p = log_softmax(prompt + answer, 0.7)[len(prompt) - 1 : -1]
        if top_k:
            log_p = log_p - np.log(np.exp(np.sort(log_p, axis=1)[:, -top_k:]).sum(axis=1, keepdims=True))
        np.testing.assert_allclose(out.log_probs[row, :n], log_p[np.arange(n), answer], atol=1e-4)
        assert not out.tokens[row, n:].any()
        assert not out.log_probs[row, n:].any()
        assert out.stopped[row] == (answer[-1] in STOP)
        assert out.stopped[row] or n == 6
    assert out.stopped.any()


def test_an_answer_depends_on_the_key_and_its_number_alone():
    sampling = SamplingConfig(6, temperature=0.7, stop_tokens=STOP)
    both, one = ENGINE.generate(PROMPTS, 4, sampling, KEY), ENGINE.generate(PROMPTS[:1], 4, sampling, KEY)
    np.testing.assert_array_equal(both.tokens[:4], one.tokens)
    other = ENGINE.generate(PROMPTS, 4, sampling, KEY + np.uint32(1))
    assert not np.array_equal(both.tokens, other.tokens)
    turns = Local(MODEL, V, prompts=3, longest=4, slots=2)
    turns.sync(PARAMS, 0)
    np.testing.assert_array_equal(turns.generate(PROMPTS, 4, sampling, KEY).tokens, both.tokens)
