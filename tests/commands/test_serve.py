"""The command `serve`: its flags, and a model that answers over HTTP as `generate` does."""

import contextlib
import http.client
import json
import threading
from types import SimpleNamespace

import jax
import numpy as np
import pytest
import table_models

from research import params
from research.commands import serve
from research.evals.served import Servers
from research.loading import LoadedModel
from research.models import transformer
from research.models.config import ModelConfig
from research.models.generation import generate_batches, make_generate
from research.models.sampling import SamplingConfig
from research.rollouts.engines.pool import Limits
from research.serving.server import Server
from research.sources.tokenizers import TokenizerSpec, make_tokenizer

TOKENIZER = make_tokenizer(TokenizerSpec("byte"), lambda: iter(()))
V = TOKENIZER.size
ANSWER = "é☕!"  # its bytes all differ


@contextlib.contextmanager
def serving(model, values, **flags):
    """A server of a model; yields its port."""
    args = serve.COMMAND.parse(["--model=folder/tiny", *(f"--{name}={value}" for name, value in flags.items())])
    service = serve.make_service(LoadedModel(model, values, TOKENIZER, "chat", None), args)
    server = Server(("127.0.0.1", 0), service)
    service.scheduler.rows.warm_up()
    service.scheduler.start()
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    try:
        yield server.server_address[1]
    finally:
        server.shutdown()
        service.scheduler.close()
        server.server_close()


def ask(port, body):
    with contextlib.closing(http.client.HTTPConnection("127.0.0.1", port, timeout=60)) as connection:
        connection.request("POST", "/v1/chat/completions", json.dumps(body))
        return json.loads(connection.getresponse().read())


def test_a_model_answers():
    with serving(table_models.make(V, scale=9), table_models.answering(TOKENIZER, ANSWER), slots=2) as port:
        body = {"model": "tiny", "messages": [{"role": "user", "content": "hello"}], "temperature": 0}
        reply = ask(port, body)
        assert (reply["choices"][0]["message"]["content"], reply["choices"][0]["finish_reason"]) == (ANSWER, "stop")
        assert "there is room for 64 together" in ask(port, {**body, "max_tokens": 64})["error"]["message"]


@pytest.mark.slow
def test_commands_ask_a_server_for_answers():
    """What `generate --servers` and `evaluate --servers` do: it shows that it has the model, and answers as here."""
    config = ModelConfig(vocab_size=272, num_layers=1, d_model=32, num_heads=2, num_kv_heads=2, d_ff=64, max_length=64)
    model = transformer.make_model(config)
    values = params.init(model.specs, jax.random.key(0))
    prompts, limits = [[5, 6, 7], [8], [1, 2]], Limits(outage_seconds=5.0, field="--servers", option="")
    with serving(model, values, slots=2) as port:
        for sampling in (
            SamplingConfig(6, stop_tokens=TOKENIZER.stop),
            SamplingConfig(6, 0.7, stop_tokens=TOKENIZER.stop),
        ):
            served = Servers((f"http://127.0.0.1:{port}",), limits).make_generate(model, sampling, V)
            here = make_generate(model, sampling, V)
            there, own = (generate_batches(f, values, prompts, jax.random.key(0), batch_size=4) for f in (served, here))
            assert [len(answer.tokens) for answer in there] == [len(answer.logprobs) for answer in there]
            if not sampling.temperature:
                assert [answer.tokens for answer in there] == [answer.tokens for answer in own]
                np.testing.assert_allclose(there[0].logprobs, own[0].logprobs, atol=1e-4)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--port=70000"], "--port = 70000: must be a whole number, at most 65535."),
        (["--slots=0"], "--slots = 0: must be a whole number, at least 1."),
        (["--max_length=65"], "--max_length = 65: the model reads 64 tokens. Lower it."),
        (
            ["--max_length=32", "--max_new_tokens=32"],
            "--max_new_tokens = 32: leaves no room for a prompt in 32 tokens.",
        ),
        (
            ["--host=no.such.host.invalid", "--port=0"],
            "--host = no.such.host.invalid, --port = 0: can't be listened on",
        ),
    ],
)
def test_flags_that_cannot_work(flags, message, monkeypatch, capsys):
    model, table = table_models.make(V), table_models.answering(TOKENIZER, ANSWER)
    monkeypatch.setattr(
        "research.loading.load_model", lambda *args, **options: LoadedModel(model, table, TOKENIZER, "chat", None)
    )
    assert serve.main(["--model=x", *flags]) == 2
    assert message in capsys.readouterr().err


def test_a_token_is_needed_where_others_can_ask(monkeypatch, capsys):
    assert serve.make_token(local=True) == ""
    made = serve.make_token(local=False)
    assert len(made) >= 32
    assert made != serve.make_token(local=False)
    monkeypatch.setenv(serve.TOKEN, "mine")
    assert serve.make_token(local=True) == serve.make_token(local=False) == "mine"
    monkeypatch.setenv(serve.TOKEN, "with\nline")
    assert serve.main(["--model=x"]) == 2
    assert "UNDERSTUDY_TOKEN: holds what no header of HTTP can." in capsys.readouterr().err
    monkeypatch.delenv(serve.TOKEN)
    server = SimpleNamespace(server_address=("0.0.0.0", 8000), service=SimpleNamespace(name="tiny"), token=made)
    serve.say(server, SimpleNamespace(count=2, longest=64, cache_bytes=lambda: 10**9))
    said = capsys.readouterr().err
    assert f"http://127.0.0.1:8000/#token={made}" in said
    assert "2 slots of 64 tokens, up to 1 GB of cache" in said
