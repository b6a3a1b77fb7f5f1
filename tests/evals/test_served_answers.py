"""Answers of servers are those that the devices here would give."""

import jax
import numpy as np
import pytest
from fake_vllm import FakeServer, OwnModel

from research import params
from research.commands import evaluate, generate
from research.errors import InputError
from research.evals.served import Servers
from research.models import transformer
from research.models.config import ModelConfig
from research.models.generation import generate_batches, make_generate
from research.models.sampling import SamplingConfig
from research.rollouts.engines.pool import Limits

V, STOP = 24, (3, 9)
MODEL = transformer.make_model(
    ModelConfig(vocab_size=32, num_layers=1, d_model=32, num_heads=2, num_kv_heads=2, d_ff=64, max_length=64)
)
PARAMS = params.init(MODEL.specs, jax.random.key(0))
OTHER = {**PARAMS, "embed": -10.0 * PARAMS["embed"]}
PROMPTS = [[5, 6, 7], [8], [1, 2]]
LIMITS = Limits(outage_seconds=2.0, pauses=(0.01, 0.02), field="--servers", option="")


@pytest.fixture
def server():
    with FakeServer(OwnModel(MODEL), 32, PARAMS) as server:
        yield server


def test_the_likeliest_answers_are_the_same(server):
    sampling = SamplingConfig(6, stop_tokens=STOP)
    served, here = (make(MODEL, sampling, V) for make in (Servers((server.url,), LIMITS).make_generate, make_generate))
    both = [generate_batches(each, PARAMS, PROMPTS, jax.random.key(0), batch_size=4) for each in (served, here)]
    for a, b in zip(*both, strict=True):
        assert a.tokens == b.tokens
        np.testing.assert_allclose(a.logprobs, b.logprobs, atol=1e-5)
    assert len(server.requests) == 1 + len(PROMPTS)


def test_draws_depend_on_the_key_and_the_number(server):
    made = Servers((server.url,), LIMITS).make_generate(MODEL, SamplingConfig(6, temperature=1.0, stop_tokens=STOP), V)
    all_of, second = (
        generate_batches(made, PARAMS, prompts, jax.random.key(1), batch_size=4, numbers=numbers)
        for prompts, numbers in ((PROMPTS, None), (PROMPTS[1:2], [1]))
    )
    assert all_of[1] == second[0]
    other = generate_batches(made, PARAMS, PROMPTS, jax.random.key(2), batch_size=4)
    assert other != all_of


def test_another_model_is_refused(server):
    served = Servers((server.url,), LIMITS).make_generate(MODEL, SamplingConfig(6, stop_tokens=STOP), V)
    with pytest.raises(InputError, match=r"^--servers: http.*nats from ours"):
        generate_batches(served, OTHER, PROMPTS, jax.random.key(0), batch_size=4)


@pytest.mark.parametrize(
    ("command", "flags", "message"),
    [
        (generate, ["--prompt=x", "--servers=a:80"], "--servers = a:80: must be URLs of servers"),
        (generate, ["--interactive", "--servers=http://a"], "--interactive: isn't for servers"),
        (
            evaluate,
            ["--task=choice:x.jsonl", "--servers=http://a"],
            "--servers = http://a: write answers, and choice:x",
        ),
    ],
)
def test_what_servers_cannot_do_is_refused(command, flags, message, capsys):
    assert command.main(["--model=none", *flags]) == 2
    assert message in capsys.readouterr().err
