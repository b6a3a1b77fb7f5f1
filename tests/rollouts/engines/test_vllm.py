"""The engine that asks servers, before servers that fail as a test wants it."""

import collections
import contextlib
import threading
import types

import numpy as np
import pytest
from fake_vllm import Bigrams, FakeServer, FakeWeights, log_probs

from research.errors import InputError, Unavailable
from research.models.sampling import SamplingConfig
from research.rollouts.engines import client, wire
from research.rollouts.engines import server as http
from research.rollouts.engines.pool import Limits
from research.rollouts.engines.served import Served
from research.rollouts.engines.vllm import Vllm
from research.rollouts.engines.weights import ServerError

V, PADDED, STOP = 8, 10, (3,)
TABLE = np.random.default_rng(0).normal(size=(PADDED, PADDED)) * 1.5
TABLE[:, V:] = -200.0  # ids that only pad: a server leaves them out as it is told
NEXT = np.roll(TABLE, 1, axis=0)
SAMPLING = SamplingConfig(6, temperature=0.7, top_k=5, stop_tokens=STOP)
PROMPTS, KEY = [[5, 6, 7], [1]], np.array([0, 7], np.uint32)
MODEL = types.SimpleNamespace(config=types.SimpleNamespace(vocab_size=PADDED, prefix=False), adapter=None)


class Prober:
    """See probe.Probe, of bigrams."""

    prompt, sampling = (5, 6), SAMPLING

    def expected(self, params):
        return log_probs(params, 6, 0.7, 5).astype(np.float32)


class Fleet:
    """An engine and its fake servers."""

    def __init__(self, servers, staleness=0, **limits):
        self.lines, self.servers, self.weights = [], servers, FakeWeights(servers)
        limits = Limits(**{"pauses": (0.01, 0.02), "answer_seconds": 5.0, "outage_seconds": 5.0, **limits})
        served = Served(MODEL, V, limits, self.lines.append)
        self.engine = Vllm([s.url for s in servers], self.weights, served, Prober(), staleness=staleness)
        self.engine.sync(TABLE, 4)

    def generate(self, n=4, sampling=SAMPLING):
        return self.engine.generate(PROMPTS, n, sampling, KEY)


@pytest.fixture
def servers():
    with FakeServer(Bigrams(), PADDED, np.zeros_like(TABLE)) as a, FakeServer(Bigrams(), PADDED, NEXT) as b:
        a.seconds = b.seconds = 0.005
        yield a, b


def check(out, table=TABLE, version=4, sampling=SAMPLING):
    """Answers are drawn from the table, with its log-probabilities."""
    n = len(out.lengths) // len(PROMPTS)
    for row, length in enumerate(out.lengths):
        tokens = [PROMPTS[row // n][-1], *out.tokens[row, :length].tolist()]
        expected = [
            log_probs(table, *pair, sampling.top_k)[token]
            for pair, token in zip([(token, sampling.temperature) for token in tokens[:-1]], tokens[1:], strict=True)
        ]
        np.testing.assert_allclose(out.log_probs[row, :length], expected, atol=1e-5)
        assert not out.tokens[row, length:].any()
        assert out.stopped[row] == (tokens[-1] in STOP)
        assert out.stopped[row] or length == 6
    assert (out.versions == version).all()


def test_answers_are_those_of_the_weights_that_were_handed_over_and_of_no_one_server(servers):
    fleet = Fleet(servers, in_flight=4)
    out = fleet.generate(n=16)
    check(out)
    assert min(len(server.requests) for server in servers) > 1
    assert fleet.weights.committed == [(s.url, 4) for s in servers] or len(fleet.weights.committed) == 2
    alone = Fleet(servers[:1]).generate(n=16)
    np.testing.assert_array_equal(out.tokens, alone.tokens)
    assert len({tuple(row) for row in out.tokens[:16]}) > 8
    other = fleet.engine.generate(PROMPTS, 16, SAMPLING, KEY + np.uint32(1))
    assert not np.array_equal(out.tokens, other.tokens)
    fleet.engine.sync(NEXT, 5)
    check(fleet.generate(), NEXT, 5)
    report = {name: total for name, (total, _) in fleet.engine.report().items() if "seconds" not in name}
    assert report.pop("rollout/servers") >= 1
    assert report == {
        **dict.fromkeys(("rollout/dropped/version", "rollout/dropped/malformed", "rollout/retried", "rollout/lost"), 0),
        "rollout/behind": 0,
    }
    assert fleet.lines == []


def test_what_a_request_says(servers):
    fleet = Fleet(servers[:1])
    fleet.generate()
    probe, *asked = servers[0].requests
    assert probe["sampling_params"]["max_tokens"] == 1
    assert collections.Counter(tuple(body["token_ids"]) for body in asked) == {(5, 6, 7): 4, (1,): 4}
    seeds = {body["sampling_params"].pop("seed") for body in asked}
    assert len(seeds) == 8
    assert all(0 <= seed < 2**63 for seed in seeds)
    assert asked[0]["sampling_params"] == {
        "n": 1,
        "max_tokens": 6,
        "temperature": 0.7,
        "top_k": 5,
        "top_p": 1.0,
        "min_p": 0.0,
        "stop_token_ids": [3],
        "ignore_eos": True,
        "logprobs": 0,
        "detokenize": False,
        "logit_bias": {"8": -100.0, "9": -100.0},
    }


def test_answers_of_wrong_weights_are_dropped_counted_and_asked_for_again(servers):
    """The server's weights are changed by another hand while it answers."""
    fleet = Fleet(servers, in_flight=4)

    def tampered(number, reply):
        if number == 5:
            servers[0].params, servers[0].stamp = NEXT, "other:4"
        return reply

    servers[0].fault, servers[0].seconds, servers[1].seconds = tampered, 0.01, 0.01
    check(fleet.generate(n=30))
    report = fleet.engine.report()
    assert report["rollout/dropped/version"][0] >= 1
    assert fleet.weights.committed.count((servers[0].url, 4)) == 2
    assert any("wrote an answer with the weights other:4, and not with run:4" in line for line in fleet.lines)


def test_a_server_whose_answers_have_no_version_is_not_used(servers):
    fleet = Fleet(servers)

    def unversioned(number, reply):
        del reply["choices"][0]["weight_versions"]
        return reply

    servers[0].fault = unversioned
    check(fleet.generate())
    assert len(servers[1].requests) == 9
    assert "says that it has no version, and not run:4" in fleet.lines[0]


def test_a_server_that_says_the_right_version_and_has_other_weights_is_found_out(servers):
    fleet = Fleet(servers, in_flight=2)
    fleet.generate(n=16)
    fleet.engine.sync(NEXT, 5)
    stage = fleet.weights.commit
    fleet.weights.commit = lambda server, version: (
        stage(server, version),
        setattr(servers[0], "params", TABLE),
    )
    check(fleet.generate(n=16), NEXT, 5)
    assert "nats from ours" in fleet.lines[0]
    assert servers[0].url in fleet.lines[0]


def test_a_server_that_never_had_the_model_ends_the_run(servers):
    fleet = Fleet(servers[:1])
    fleet.weights.commit = lambda server, version: setattr(servers[0], "stamp", "run:4")
    with pytest.raises(InputError, match=r"nats from ours.*--logprobs-mode processed_logprobs"):
        fleet.generate()


def test_a_server_that_is_killed_and_started_again_gets_its_weights_before_it_answers(servers):
    a, b = servers
    fleet, killed = Fleet(servers), threading.Event()

    def kill(number, reply):
        if number == 6:
            killed.set()
            threading.Thread(target=lambda: (a.end(), a.begin())).start()
            return "close"
        return reply

    a.fault, a.seconds, b.seconds = kill, 0.02, 0.02
    check(fleet.generate(n=60))
    assert killed.is_set()
    report = fleet.engine.report()
    assert report["rollout/lost"][0] == 1
    assert report["rollout/retried"][0] >= 1
    assert fleet.weights.committed.count((a.url, 4)) == 2
    assert "is back after" in fleet.lines[-1]


def test_one_of_two_servers_dies_for_good(servers):
    fleet = Fleet(servers)
    servers[0].fault, servers[0].seconds = lambda number, reply: "close" if number >= 3 else reply, 0.005
    check(fleet.generate(n=20))
    servers[0].end()
    fleet.engine.sync(NEXT, 5)
    check(fleet.generate(n=20), NEXT, 5)
    assert fleet.engine.report()["rollout/servers"][0] == 1


def test_all_servers_are_gone_and_come_back(servers):
    fleet = Fleet(servers)
    for server in servers:
        server.end()
        threading.Timer(0.15, server.begin).start()
    check(fleet.generate())
    assert any("no server can be used" in line for line in fleet.lines)


def test_all_servers_stay_away(servers):
    fleet = Fleet(servers, outage_seconds=0.1)
    for server in servers:
        server.end()
    with pytest.raises(Unavailable, match=r"^rollout\.servers: none can be used .*ConnectionRefused"):
        fleet.generate()


def test_a_server_that_is_too_slow_is_given_up(servers):
    fleet = Fleet(servers, answer_seconds=0.3)
    fleet.generate()
    servers[0].seconds = 1.0
    check(fleet.generate(n=8))
    assert any("no answer to /inference/v1/generate within 0.3 s" in line for line in fleet.lines)


@pytest.mark.parametrize(
    ("change", "why"),
    [
        (lambda c: c.update(token_ids=[]), "0 tokens"),
        (lambda c: c.update(token_ids=[9] * 6), "a token that isn't in 0 to 7"),
        (lambda c: c.update(token_ids=[1] * 6), "log-probabilities of other tokens"),
        (lambda c: c["logprobs"]["content"][0].update(logprob=-9999.0), "none of a token that was drawn"),
        (lambda c: c["logprobs"]["content"][0].update(logprob=None), "TypeError"),
        (lambda c: c["logprobs"]["content"][0].update(logprob=-(10**400)), "OverflowError"),
        (lambda c: c.update(logprobs=None), "TypeError"),
        (lambda c: c.clear(), "KeyError"),
    ],
)
def test_what_is_no_answer_is_dropped_and_asked_for_again(servers, change, why):
    fleet = Fleet(servers[:1])
    fleet.generate()
    said = []

    def spoil(number, reply):
        if number % 5 == 3:
            change(reply["choices"][0])
            try:
                wire.read(reply, SAMPLING, V)
            except Exception as error:
                said.append(str(error))
        return reply

    servers[0].fault = spoil
    check(fleet.generate())
    assert fleet.engine.report()["rollout/dropped/malformed"][0] == len(said) >= 1
    assert why in said[0]


def test_a_stop_of_the_servers_own_is_no_answer(servers):
    fleet = Fleet(servers[:1])
    fleet.generate()

    def cut(number, reply):
        choice = reply["choices"][0]
        choice["token_ids"] = choice["token_ids"][:1]
        choice["logprobs"]["content"] = choice["logprobs"]["content"][:1]
        return reply

    servers[0].fault = cut
    with pytest.raises(InputError, match=r"cut off after 1 of 6 tokens|it ended with token"):
        fleet.engine.generate([[5, 6, 7]], 20, SAMPLING, KEY)


def test_staleness_lets_a_server_go_on_with_older_weights(servers):
    for staleness, version in ((0, None), (2, 4)):
        fleet = Fleet(servers[:1], staleness=staleness, outage_seconds=0.2)
        check(fleet.generate())
        fleet.weights.fail[servers[0].url] = "the folder isn't there"
        fleet.engine.sync(NEXT, 6)
        if version is None:
            with pytest.raises(Unavailable, match="the folder isn't there"):
                fleet.generate()
            continue
        check(fleet.generate(), TABLE, version)
        assert fleet.engine.report()["rollout/behind"] == (2.0 * 8, 16.0)  # of two calls
        assert "It goes on with version 4 (rollout.staleness)" in fleet.lines[-1]
        fleet.engine.sync(TABLE, 7)
        with pytest.raises(Unavailable):
            fleet.generate()
        fleet.weights.fail.clear()
        check(fleet.generate(), TABLE, 7)


def test_servers_are_checked_before_the_run(servers):
    fleet = Fleet(servers)
    fleet.engine.check(64)
    with pytest.raises(InputError, match=r"longest document has 64 tokens .*--max-model-len=65"):
        fleet.engine.check(65)
    servers[0].vocab_size, servers[0].params = PADDED + 1, np.zeros((PADDED + 1, PADDED + 1))
    with pytest.raises(InputError, match="takes the id 10, and the model here has 10 ids"):
        fleet.engine.check(64)
    servers[0].end()
    fleet.engine.check(64)
    servers[1].end()
    with pytest.raises(Unavailable):
        Fleet(servers, outage_seconds=0.1).engine.check(64)


@pytest.mark.parametrize(
    ("sampling", "message"),
    [
        (
            SamplingConfig(4, temperature=1.0, top_p=0.9, min_p=0.1),
            "min_p = 0.1 with rollout.top_p = 0.9: vLLM applies",
        ),
        (SamplingConfig(4, temperature=0.001), "temperature = 0.001: vLLM has none between 0 and 0.01"),
    ],
)
def test_what_servers_cannot_draw_is_refused(sampling, message):
    with pytest.raises(InputError, match=message):
        wire.check(sampling, "rollout.")


@pytest.mark.parametrize(
    "url",
    [
        "127.0.0.1:8000",
        "ftp://a",
        "http://",
        "http://a:b",
        "http://a/?x=1",
        "",
        "http://a" + "..b",
        "http://a b",
        "http://u@a",
    ],
)
def test_what_is_no_url_is_refused(url):
    with pytest.raises(InputError, match=r"^rollout\.servers = .*isn't the URL of a server"):
        client.check_url("rollout.servers", url)


def test_the_key_of_servers_comes_from_the_environment(servers, monkeypatch):
    seen = []
    monkeypatch.setenv(client.KEY, "secret")
    handler = servers[0].server.RequestHandlerClass
    monkeypatch.setattr(handler, "do_GET", lambda self: (seen.append(self.headers["Authorization"]), self._send({})))
    client.ask(servers[0].url, "/health", seconds=5.0)
    assert seen == ["Bearer secret"]


@pytest.mark.parametrize(
    ("path", "status", "reply", "error", "message"),
    [
        ("/v1/models", 401, "{}", InputError, "answered 401: .*VLLM_API_KEY"),
        ("/v1/models", 200, '{"data": {"a": 1}}', ServerError, "/v1/models names no model"),
        ("/health", 200, "[" * 100_000, None, ""),
    ],
)
def test_what_a_server_says_of_itself(servers, monkeypatch, path, status, reply, error, message):
    handler = servers[0].server.RequestHandlerClass
    usual = handler.do_GET
    planted = lambda self: self._send_text(reply.encode(), status) if self.path == path else usual(self)  # noqa: E731
    monkeypatch.setattr(handler, "do_GET", planted)
    with pytest.raises(error, match=message) if error else contextlib.nullcontext():
        Fleet(servers[:1]).engine.served.name(servers[0].url)


def test_a_server_that_refuses_the_first_question_ends_the_run_and_one_that_has_answered_is_waited_for(servers):
    """As one of a smaller vocabulary does, or one whose model has another name."""
    fleet = Fleet(servers[:1], outage_seconds=0.1)
    servers[0].fault = lambda number, reply: 400
    with pytest.raises(InputError, match=r"answered 400: .*as planted"):
        fleet.generate()
    servers[0].fault = lambda number, reply: reply
    check(fleet.generate())
    servers[0].fault = lambda number, reply: 400
    fleet.engine.sync(NEXT, 5)
    with pytest.raises(Unavailable, match="answered 400"):
        fleet.generate()


def test_a_server_that_is_not_started_to_take_weights_ends_the_run(servers, monkeypatch):
    handler = servers[0].server.RequestHandlerClass
    monkeypatch.setattr(handler, "do_GET", lambda self: self._send({}, 404))
    with pytest.raises(InputError, match="VLLM_SERVER_DEV_MODE=1"):
        http.stamp(servers[0].url)
    monkeypatch.setattr(handler, "do_GET", lambda self: self._send({}))
    with pytest.raises(ServerError, match="answers without 'weight_version'"):
        http.stamp(servers[0].url)
