"""The engine before a real vLLM server: whatever it draws has the log-probabilities that our own model gives it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from research import loading
from research.evals.served import LIMITS, Servers
from research.models.generation import generate_batches, make_generate
from research.models.sampling import SamplingConfig, filter_logits
from research.rollouts.engines import probe
from research.rollouts.engines.policy import Policy
from research.rollouts.engines.sending import make_weights
from research.rollouts.engines.served import Served
from research.rollouts.engines.vllm import Vllm

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]
KEY = np.array([0, 7], np.uint32)
TEXTS = ("The capital of France is", "Once upon a time", "2 + 2 =", "def add(a, b):")
WAYS = {
    "plain": SamplingConfig(16, temperature=1.0),
    "cut short": SamplingConfig(16, temperature=0.7, top_k=20, top_p=0.9),
    "min_p": SamplingConfig(16, temperature=1.3, min_p=0.05),
}


@pytest.fixture(scope="module")
def loaded(vllm_server):
    return loading.load_model(vllm_server.model)


@pytest.fixture(scope="module")
def engine(vllm_server, loaded, tmp_path_factory):
    """An engine whose server has the weights that it was started with, sent anew."""
    size, prompt = loaded.tokenizer.size, loaded.tokenizer.encode(TEXTS[0])
    prober = probe.make_probe(loaded.model, size, WAYS["plain"], prompt)
    policy = Policy(loaded.model, {}, loading.find(vllm_server.model).origin.get("config", {}), vllm_server.model)
    weights = make_weights(policy, tmp_path_factory.mktemp("weights"), dtype="float32")
    engine = Vllm([vllm_server.url], weights, Served(loaded.model, size, LIMITS, print), prober)
    engine.check(40)
    engine.sync(loaded.params, 1)
    return engine


@pytest.mark.parametrize("name", WAYS)
def test_log_probs_of_64_answers_at_once_are_ours(engine, loaded, name):
    prompts, sampling = [loaded.tokenizer.encode(text) for text in TEXTS], WAYS[name]
    out = engine.generate(prompts, 16, sampling, KEY)
    assert (out.versions == 1).all()
    assert len({tuple(row) for row in out.tokens}) > 32
    gaps = [
        np.abs(ours(loaded, prompts[row // 16], out.tokens[row], sampling) - out.log_probs[row]).max()
        for row in range(0, 64, 5)
    ]
    assert max(gaps) < 1e-3


def ours(loaded, prompt, answer, sampling):
    """Log-probabilities of the tokens of an answer that goes on for as long as it may."""
    ids = jnp.asarray([[*prompt, *answer]])
    batch = {"tokens": ids, "segment_ids": jnp.ones_like(ids), "positions": jnp.arange(ids.shape[1])[None]}
    hidden = loaded.model.hidden(loaded.params, batch)[0, len(prompt) - 1 : -1]
    logits = loaded.model.unembed(loaded.params).logits(hidden)[:, : loaded.tokenizer.size]
    logits, tokens = filter_logits(logits, sampling)
    log_probs = jax.nn.log_softmax(logits, axis=1)
    return np.asarray(jnp.where(tokens == jnp.asarray(answer)[:, None], log_probs, 0).sum(axis=1))


def test_the_likeliest_answers_are_those_of_the_devices_here(engine, vllm_server, loaded):
    prompts = [loaded.tokenizer.encode(text) for text in TEXTS]
    sampling = SamplingConfig(12, stop_tokens=loaded.tokenizer.stop)
    served, here = (
        generate_batches(
            make(loaded.model, sampling, loaded.tokenizer.size), loaded.params, prompts, jax.random.key(0), batch_size=4
        )
        for make in (Servers((vllm_server.url,)).make_generate, make_generate)
    )
    for a, b in zip(served, here, strict=True):
        assert a.tokens == b.tokens
        np.testing.assert_allclose(a.logprobs, b.logprobs, atol=1e-3)
