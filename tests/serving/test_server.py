"""The server as its clients see it: OpenAI's own, many at once, those that leave, and those that send nonsense."""

import concurrent.futures
import contextlib
import http.client
import json
import random
import socket
import threading
import time

import openai
import pytest
from fake_rows import FakeRows

from research.serving import server as server_lib
from research.serving.routes import Service
from research.serving.scheduler import Scheduler
from research.serving.server import Limits, Server
from research.sources.tokenizers import TokenizerSpec, make_tokenizer

TOKENIZER = make_tokenizer(TokenizerSpec("byte"), lambda: iter(()))
HI = [{"role": "user", "content": "hello é☕!"}]


class Running:
    """A server of FakeRows, and how it is asked."""

    def __init__(self, slots=4, waiting=64, seconds=30.0, token="", **limits):
        self.rows = FakeRows(slots, 400, TOKENIZER.eos)
        self.scheduler = Scheduler(self.rows, waiting)
        service = Service("small", TOKENIZER, "chat", self.scheduler, 400, 200, seconds)
        self.server = Server(("127.0.0.1", 0), service, token, Limits(**limits))
        self.port = self.server.server_address[1]

    def __enter__(self):
        self.scheduler.start()
        threading.Thread(target=self.server.serve_forever, args=(0.01,), daemon=True).start()
        return self

    def __exit__(self, *error):
        self.server.shutdown()
        self.scheduler.close()
        self.server.server_close()

    def openai(self, **options):
        return openai.OpenAI(
            base_url=f"http://127.0.0.1:{self.port}/v1", **{"api_key": "x", "max_retries": 0, **options}
        )

    def connection(self):
        return contextlib.closing(http.client.HTTPConnection("127.0.0.1", self.port, timeout=20))

    def ask(self, path="/v1/chat/completions", body=None, method="POST", headers=None):
        """Status, headers and JSON of a reply."""
        with self.connection() as connection:
            content = json.dumps({"messages": HI} if body is None else body) if not isinstance(body, bytes) else body
            connection.request(method, path, content if method == "POST" else None, headers or {})
            reply = connection.getresponse()
            return reply.status, reply.headers, json.loads(reply.read())

    def fault(self, **more):
        """Status and message of a reply that is an error."""
        status, _, body = self.ask(**more)
        return status, body["error"]["message"]

    def raw(self, content):
        """What the server says to these bytes, until it closes the connection."""
        with contextlib.closing(socket.create_connection(("127.0.0.1", self.port), timeout=20)) as connection:
            with contextlib.suppress(ConnectionError):
                connection.sendall(content)
            said = b""
            with contextlib.suppress(ConnectionError):
                while piece := connection.recv(1 << 16):
                    said += piece
            return said

    def at_rest(self):
        """Waits until no request is under way."""
        until = time.monotonic() + 10
        while self.scheduler.counts() != (0, 0) or self.rows.used > self.rows.count - self.rows.free:
            assert time.monotonic() < until
            time.sleep(0.01)
        return True


@pytest.fixture(scope="module")
def served():
    with Running() as running:
        yield running


@pytest.fixture(scope="module")
def client(served):
    with served.openai() as client:
        yield client


def test_chat_by_the_client_of_openai(client):
    assert [model.id for model in client.models.list()] == ["small"]
    assert client.models.retrieve("small").max_model_len == 400
    reply = client.chat.completions.create(model="small", messages=HI, temperature=0, user="me")
    (choice,) = reply.choices
    assert (choice.message.role, choice.message.content) == ("assistant", "hello é☕!")
    assert (choice.finish_reason, choice.logprobs) == ("stop", None)
    size = len(TOKENIZER.encode("hello é☕!"))
    assert (reply.usage.prompt_tokens, reply.usage.completion_tokens) == (size + 3, size + 1)
    cut = client.chat.completions.create(model="small", messages=HI, max_completion_tokens=3).choices[0]
    assert (cut.message.content, cut.finish_reason) == ("hel", "length")
    parts = [{"role": "user", "content": [{"type": "text", "text": "one "}, {"type": "text", "text": "two"}]}]
    assert client.chat.completions.create(model="small", messages=parts).choices[0].message.content == "one two"


def test_chat_in_pieces(client):
    options = {"model": "small", "messages": HI, "stream": True, "stream_options": {"include_usage": True}}
    *pieces, last = client.chat.completions.create(**options, logprobs=True, top_logprobs=2)
    assert pieces[0].choices[0].delta.role == "assistant"
    assert "".join(piece.choices[0].delta.content or "" for piece in pieces) == "hello é☕!"
    assert len([piece for piece in pieces if piece.choices[0].delta.content]) > 2
    assert [piece.choices[0].finish_reason for piece in pieces] == [None] * (len(pieces) - 1) + ["stop"]
    assert (last.choices, last.usage.completion_tokens) == ([], 13)
    tokens = [token for piece in pieces if piece.choices[0].logprobs for token in piece.choices[0].logprobs.content]
    assert [token.token for token in tokens[:5]] == list("hello")
    assert (tokens[0].logprob, tokens[0].bytes, tokens[6].bytes) == (-0.5, [ord("h")], None)
    assert [(top.token, top.logprob) for top in tokens[0].top_logprobs] == [("h", -0.5), ("A", -9999.0)]


def test_a_stop_ends_an_answer_and_its_row(served, client):
    for stream in (False, True):
        with served.connection() as connection:
            body = {"messages": [{"role": "user", "content": "one two three four"}], "stop": ["three", "wo th"]}
            connection.request("POST", "/v1/chat/completions", json.dumps({**body, "stream": stream}))
            said = connection.getresponse().read().decode()
        assert ("one t" in said, "wo" in said) == (not stream, False)
        assert '"finish_reason": "stop"' in said
    reply = client.chat.completions.create(model="small", messages=body["messages"], stop="three", logprobs=True)
    assert reply.choices[0].message.content == "one two "
    assert reply.usage.completion_tokens == len(reply.choices[0].logprobs.content) == len("one two three")
    assert served.at_rest()


def test_completions_by_the_client_of_openai(served, client):
    reply = client.completions.create(model="small", prompt="abc", max_tokens=9, logprobs=1)
    (choice,) = reply.choices
    assert (choice.text, choice.finish_reason) == ("abc", "stop")
    assert choice.logprobs.tokens == ["a", "b", "c", "<|eos|>"]
    assert (choice.logprobs.token_logprobs, choice.logprobs.text_offset) == ([-0.5] * 4, [0, 1, 2, 3])
    assert choice.logprobs.top_logprobs[0] == {"a": -0.5}
    several = client.completions.create(model="small", prompt=["abc", "de"], n=2, seed=5, temperature=0.7, top_p=0.9)
    assert [(c.index, c.text) for c in several.choices] == [(0, "abc"), (1, "abc"), (2, "de"), (3, "de")]
    asks = served.rows.admitted[-4:]
    assert sorted((ask.choice, ask.seed, ask.temperature, ask.top_p) for ask in asks) == [
        (i, 5, 0.7, 0.9) for i in range(4)
    ]
    assert client.completions.create(model="small", prompt=[[97, 98], [99]]).choices[1].text == "c"
    pieces = list(client.completions.create(model="small", prompt="a long prompt", stream=True, max_tokens=200))
    assert "".join(piece.choices[0].text for piece in pieces) == "a long prompt"
    # Without a seed two requests don't draw the same.
    for _ in range(2):
        client.completions.create(model="small", prompt="x")
    assert served.rows.admitted[-1].seed != served.rows.admitted[-2].seed


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (b"", "the body isn't JSON in UTF-8"),
        (b"\xff{}", "the body isn't JSON in UTF-8"),
        (b"[" * 100_000, "nested too deep"),
        (b'{"seed": ' + b"9" * 5000 + b"}", "the body isn't JSON"),
        (b"[1]", "the body must be a JSON object."),
        ({}, "messages: must be a list"),
        ({"messages": HI, "temprature": 1}, "'temprature': no such field. Did you mean 'temperature'?"),
        ({"messages": HI, "temperature": -1}, "temperature = -1: must be 0, or a number from 0.01 to 100."),
        ({"messages": HI, "temperature": True}, "temperature = True: must be"),
        (b'{"messages": [{"role": "user", "content": "x"}], "temperature": NaN}', "temperature = nan: must be"),
        ({"messages": HI, "top_p": 0}, "top_p = 0: must be a number in (0, 1]."),
        ({"messages": HI, "max_tokens": 0}, "max_tokens = 0: must be a whole number, at least 1."),
        ({"messages": HI, "max_tokens": 390}, "the prompt has 15 tokens and 390 new ones, and there is room for 400"),
        (
            {"messages": [{"role": "user", "content": "x" * 500}]},
            "the prompt has 503 tokens, and there is room for 400",
        ),
        ({"messages": HI, "n": 65}, "n = 65: must be a whole number from 1 to 64."),
        ({"messages": HI, "n": 10**400}, "n = a number of very many digits: must be"),
        ({"messages": HI, "stop": ["a", ""]}, "stop = ['a', '']: must be a text, or a list of at most 16"),
        ({"messages": HI, "stop": "\ud800"}, "stop = '\\ud800': must be"),
        ({"messages": HI, "logit_bias": {"5": 1}}, "logit_bias = {'5': 1}: isn't supported here. Leave it out."),
        ({"messages": HI, "tools": [{"type": "function"}]}, "tools = [{'type': 'function'}]: isn't supported here."),
        ({"messages": HI, "top_logprobs": 2}, "top_logprobs = 2: is of logprobs"),
        ({"messages": HI, "stream_options": {}, "stream": 1}, "stream = 1: must be true or false."),
        ({"messages": HI, "stream_options": {"include_usage": True}}, "stream_options: is of stream"),
        ({"messages": [{"role": "robot", "content": "x"}]}, "messages[0].role = 'robot': must be system"),
        ({"messages": [{"role": "user", "content": "\udfff"}]}, "messages[0].content: must be a text"),
        ({"messages": [{"role": "user", "content": ""}]}, "messages: "),
        ({"messages": [*HI, {"role": "assistant", "content": "x"}]}, "messages: end with the assistant's."),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages[0].content: must be a text"),
        ({"messages": [{"role": "user", "content": "x", "audio": "x"}]}, "messages[0].audio: isn't supported"),
        ({"messages": HI * 600}, "messages: are 600, and may be 512."),
    ],
)
def test_bad_requests_name_the_field_and_what_it_must_be(served, body, message):
    status, said = served.fault(body=body)
    assert status == 400
    assert message in said


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ({}, "prompt: must be a text, a list of token ids, or a list of either, none empty."),
        ({"prompt": [[1], []]}, "prompt: must be"),
        ({"prompt": [5, 999]}, "prompt: has the id 999, and the model has 261."),
        ({"prompt": "a", "echo": True}, "echo = True: isn't supported here. Leave it out."),
        ({"prompt": ["a"] * 30, "n": 3}, "n = 3: of 30 prompts is more than 64 answers."),
    ],
)
def test_bad_completions(served, body, message):
    assert (
        served.fault(path="/v1/completions", body=body) == (400, message)
        or message in served.fault(path="/v1/completions", body=body)[1]
    )


def test_errors_are_those_that_the_client_of_openai_knows(client, served):
    with pytest.raises(openai.NotFoundError, match="model = 'gpt-5': isn't served here; 'small' is"):
        client.chat.completions.create(model="gpt-5", messages=HI)
    with pytest.raises(openai.BadRequestError, match="top_p = 3"):
        client.chat.completions.create(model="small", messages=HI, top_p=3)
    assert served.fault(path="/v2/chat")[0] == 404
    assert served.fault(path="/v1/chat/completions", method="GET")[0] == 404


def test_a_thousand_malformed_requests(served):
    """Bodies with a byte or a field wrong, and what isn't HTTP: each gets an error or nothing, and nothing stays."""
    rng = random.Random(0)
    threads, body = threading.active_count(), json.dumps({"messages": HI, "max_tokens": 3, "stop": ["a"]}).encode()
    values = [None, True, -1, 1e300, "", "x", [], [[]], {}, {"a": {}}, [None], 2**80, "\ud800"]
    statuses = []
    with served.connection() as connection:
        for i in range(900):
            fields = json.loads(body)
            if i % 3 == 0:  # a byte is another one, or gone
                at = rng.randrange(len(body))
                content = body[:at] + (bytes([rng.randrange(256)]) if i % 2 else b"") + body[at + 1 :]
            elif i % 3 == 1:
                content = body[: rng.randrange(len(body))]
            else:
                fields[rng.choice(["messages", "max_tokens", "stop", "n", "seed", "stream", "x"])] = rng.choice(values)
                content = json.dumps(fields).encode()
            connection.request("POST", rng.choice(["/v1/chat/completions", "/v1/completions"]), content)
            reply = connection.getresponse()
            reply.read()
            statuses.append(reply.status)
    assert set(statuses) == {200, 400}  # another byte may leave a request as good as it was
    assert statuses.count(400) > 700
    lines = [b"GET / HTTP/9.9", b"\x00\xff\x16\x03\x01", b"GET", b"POST  HTTP/1.1", b"BREW / HTTP/1.1", b"A" * 70_000]
    headers = [b"Content-Length: -5", b"Content-Length: 1e3", b"Content-Length: 5\r\nContent-Length: 6"]
    headers += [b"Transfer-Encoding: chunked", b"Content-Length: 99999999999999999999", b"X: " + b"y" * 70_000]
    headers += [b"Z: 1\r\n" * 200 + b"Z: 1", b"Content-Length: 2"]
    post = b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n"
    for i in range(100):
        broken = rng.choice(lines) + b"\r\n\r\n" if i % 2 else post + rng.choice(headers) + b"\r\n\r\n{}"
        said = served.raw(broken)
        assert b" 200 " not in said
        assert not said or b'"error"' in said
    assert served.at_rest()
    assert threading.active_count() <= threads + 1
    assert served.ask()[0] == 200


def test_thirty_two_clients_at_once(served):
    """Each gets its own answer, streamed or not; rows are shared, and never more than there are."""

    def ask(number):
        text = f"I am client number {number}, " * (1 + number % 5)
        with served.openai() as client:
            options = {"model": "small", "messages": [{"role": "user", "content": text}]}
            if number % 2:
                return text, client.chat.completions.create(**options).choices[0].message.content
            pieces = client.chat.completions.create(**options, stream=True)
            return text, "".join(piece.choices[0].delta.content or "" for piece in pieces)

    served.rows.most = 0
    with concurrent.futures.ThreadPoolExecutor(32) as pool:
        assert all(said == text for text, said in pool.map(ask, range(32)))
    assert served.rows.most == served.rows.count
    assert served.at_rest()


def long_request(stream):
    body = json.dumps({"messages": [{"role": "user", "content": "a" * 190}], "stream": stream}).encode()
    head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(body)}\r\n\r\n"
    return head.encode() + body


def test_clients_that_leave_give_up_their_rows_and_their_places_in_line():
    with Running(slots=1) as running:
        running.rows.seconds = 0.05  # an answer would take 2.4 s
        address = ("127.0.0.1", running.port)
        for stream in (True, False):
            writing, waiting = (socket.create_connection(address, timeout=10) for _ in range(2))
            writing.sendall(long_request(stream))
            while running.scheduler.counts() != (1, 0):
                time.sleep(0.01)
            waiting.sendall(long_request(stream))
            while running.scheduler.counts() != (1, 1):
                time.sleep(0.01)
            if stream:
                assert b"aaaa" in writing.recv(1 << 16) + writing.recv(1 << 16) + writing.recv(1 << 16)
            began = time.monotonic()
            waiting.close()
            writing.close()
            assert running.at_rest()
            assert time.monotonic() - began < 1.5
        running.rows.seconds = 0.0
        assert running.ask()[0] == 200


def test_limits(monkeypatch):
    with Running(slots=1, waiting=1, seconds=0.4, body=1000, rate=12) as running:
        assert running.ask()[0] == 200
        assert running.fault(body=b" " * 1001) == (413, "the body has 1001 bytes, and may have 1000.")
        running.rows.seconds = 0.1
        with concurrent.futures.ThreadPoolExecutor(4) as pool:
            long = {"messages": [{"role": "user", "content": "a" * 190}]}
            replies = list(pool.map(lambda _: running.fault(body=long), range(4)))
        assert sorted(status for status, _ in replies) == [429, 429, 504, 504]
        assert (504, "no answer within 0.4 s (--seconds). Ask for fewer tokens.") in replies
        assert (429, "too many requests wait already. Try again later.") in replies
        assert running.at_rest()
        for _ in range(6):
            running.ask("/health", method="GET")
        status, headers, body = running.ask("/health", method="GET")
        assert (status, headers["Retry-After"]) == (429, "2")
        assert "more than 12 requests in a minute. Wait for" in body["error"]["message"]
    monkeypatch.setattr(server_lib, "_READ_SECONDS", 0.3)
    with Running(connections=2) as running:
        slow = [socket.create_connection(("127.0.0.1", running.port), timeout=10) for _ in range(2)]
        for drip in b"GET /he":  # each byte comes in time, and the whole doesn't
            for connection in slow:
                with contextlib.suppress(ConnectionError):
                    connection.sendall(bytes([drip]))
            time.sleep(0.06)
        assert all(not connection.recv(100) for connection in slow)
        assert running.ask("/health", method="GET")[0] == 200
        monkeypatch.setattr(server_lib, "_READ_SECONDS", 60)  # so that a busy machine closes none of these two
        time.sleep(0.5)  # until the server knows that the connections before have ended
        fast = [socket.create_connection(("127.0.0.1", running.port), timeout=10) for _ in range(2)]
        assert running.raw(b"GET /health HTTP/1.1\r\n\r\n") == b""  # a third connection
        for connection in (*slow, *fast):
            connection.close()


def test_who_may_ask():
    with Running(token="secret") as running:
        for given in ({}, {"Authorization": "Bearer wrong"}, {"Authorization": "Bearer sécret"}):
            assert running.fault(headers=given)[0] == 401
        assert running.ask(headers={"Authorization": "Bearer secret"})[0] == 200
        assert running.ask("/health", method="GET")[0] == 200
        with running.openai(api_key="none") as client, pytest.raises(openai.AuthenticationError):
            client.models.list()
        here = f"http://127.0.0.1:{running.port}"
        right = {"Authorization": "Bearer secret"}
        assert running.ask(headers={**right, "Origin": here})[0] == 200
        for origin in ("http://evil", "null", "http://127.0.0.1:1"):
            assert running.fault(headers={**right, "Origin": origin})[0] == 403
        # A name that leads here by another's name server isn't this machine's own.
        assert running.fault(headers={**right, "Host": "evil.example"})[0] == 403
        with running.connection() as connection:
            connection.request("GET", "/")
            page = connection.getresponse()
            assert page.headers["Content-Security-Policy"].startswith("default-src 'none'")
            assert b"chat/completions" in page.read()


def test_a_model_that_fails_fails_its_requests_alone(served, capfd):
    served.rows.broken = RuntimeError("RESOURCE_EXHAUSTED: as planted")
    assert served.fault() == (500, "the model failed; the server's log says why.")
    assert "RESOURCE_EXHAUSTED: as planted" in capfd.readouterr().err
    assert served.ask()[0] == 200


def test_a_server_that_ends_says_so():
    with Running(slots=1) as running:
        running.rows.seconds = 0.1
        with concurrent.futures.ThreadPoolExecutor(1) as pool:
            asked = pool.submit(running.fault, body={"messages": [{"role": "user", "content": "a" * 190}]})
            while running.scheduler.counts() != (1, 0):
                time.sleep(0.01)
            running.scheduler.close()
            assert asked.result()[0] == 500
        assert running.fault() == (503, "the server ends.")
