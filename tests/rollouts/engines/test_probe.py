"""What a server is to say after one prompt: our own model's log-probabilities, as answers are drawn."""

import jax
import numpy as np
import pytest
from test_local import MODEL, PARAMS, V, log_softmax

from research.devices import sharding
from research.models.sampling import SamplingConfig
from research.rollouts.engines import probe

PROMPT = list(range(3, 20)) * 5


@pytest.mark.parametrize("sampling", [SamplingConfig(4, temperature=0.7, top_k=4), SamplingConfig(4)])
def test_it_expects_what_the_model_draws_from(sampling):
    expected = probe.make_probe(MODEL, V, sampling, PROMPT[:9]).expected(PARAMS)
    whole = log_softmax(PROMPT[:9], sampling.temperature or 1.0)[-1]
    kept = np.argsort(-whole)[: sampling.top_k or V]
    np.testing.assert_allclose(expected[kept], whole[kept] - np.log(np.exp(whole[kept]).sum()), atol=1e-4)
    assert np.isinf(expected).sum() == len(expected) - len(kept)


def test_a_long_prompt_is_cut():
    assert len(probe.make_probe(MODEL, V, SamplingConfig(4), PROMPT).prompt) == 64


def test_the_difference_is_the_mean_of_what_is_shown():
    expected = np.array([-0.5, -2.0, -np.inf], np.float32)
    assert probe.difference(expected, {0: -0.5, 1: -2.2}) == pytest.approx(0.1)
    assert probe.difference(expected, {2: -9999.0}) == 0
    assert probe.difference(expected, {0: -0.5, 2: -1.0}) == pytest.approx(24.5)
    assert probe.difference(expected, {3: -1.0}) == float("inf")
    assert not probe.difference(expected, {0: float("nan")}) < probe.REFUSED


def test_it_is_computed_on_several_devices():
    prober = probe.make_probe(MODEL, V, SamplingConfig(4, temperature=0.7), PROMPT[:9])
    alone = prober.expected(PARAMS)
    with jax.set_mesh(sharding.make_mesh({"data": 2, "fsdp": 2, "sequence": 2})):
        there = probe.make_probe(MODEL, V, SamplingConfig(4, temperature=0.7), PROMPT[:9]).expected(PARAMS)
    np.testing.assert_allclose(there, alone, atol=1e-4)
