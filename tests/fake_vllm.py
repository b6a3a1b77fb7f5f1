"""A server that speaks as vLLM does, in the process of the test, and fails where the test says so."""

import contextlib
import http.server
import json
import threading
import time

import jax
import numpy as np

from research.models.generation import make_generate, pad_prompts
from research.models.sampling import SamplingConfig
from research.rollouts.engines.weights import ServerError


class Bigrams:
    """A model that a test can check by hand: parameters are logits [V, V] of the token after each."""

    def __call__(self, params, prompt, sampling):
        """Draws as vLLM does: tokens, log-probabilities and, for each place, those of all ids."""
        rng, tokens, drawn, rows = np.random.default_rng(sampling["seed"]), list(prompt), [], []
        while len(drawn) < sampling["max_tokens"] and not (drawn and tokens[-1] in sampling["stop_token_ids"]):
            row = log_probs(params, tokens[-1], sampling["temperature"], sampling["top_k"])
            tokens.append(int(rng.choice(len(row), p=np.exp(row) / np.exp(row).sum())))
            drawn.append(row[tokens[-1]])
            rows.append(row)
        return tokens[len(prompt) :], drawn, rows


def log_probs(params, token, temperature=1.0, top_k=0):
    """Of the token after one, float64."""
    row = np.asarray(params[token], np.float64) / (temperature or 1.0)
    if top_k:
        row = np.where(row >= np.sort(row)[-top_k], row, -np.inf)
    return row - np.log(np.exp(row - row.max()).sum()) - row.max()


class FakeServer:
    """A server; use it as a context.

    Args:
      model: (params, prompt, sampling parameters) -> tokens, their log-probabilities, and rows of those of all ids.
      vocab_size: of the model.

    Attributes:
      params, stamp: what it serves, and what it says that is.
      fault: (number of the request, reply) -> the reply to give instead; a status of HTTP; or "close".
      seconds: how long it takes for an answer.
      requests: bodies that it was asked for answers with.
      most: of requests that it had at the same time.
    """

    def __init__(self, model, vocab_size, params=None, max_model_len=64):
        self.model, self.vocab_size, self.max_model_len = model, vocab_size, max_model_len
        self.params, self.stamp, self.start = params, "default", params
        self.fault, self.seconds = lambda number, reply: reply, 0.0
        self.requests, self.most, self.now, self.lock = [], 0, 0, threading.Lock()
        self.port, self.server = 0, None

    def __enter__(self):
        self.begin()
        return self

    def __exit__(self, *error):
        self.end()

    @property
    def url(self):
        return f"http://127.0.0.1:{self.port}"

    def begin(self):
        """Starts it, with the weights of its start, at the port that it had."""
        self.params, self.stamp = self.start, "default"
        handler = type("Handler", (_Handler,), {"fake": self})
        self.server = _Server(("127.0.0.1", self.port), handler)
        self.port = self.server.server_address[1]
        threading.Thread(target=self.server.serve_forever, args=(0.005,), daemon=True).start()

    def end(self):
        """Kills it: what is under way gets no answer."""
        if self.server is not None:
            server, self.server = self.server, None
            server.shutdown()
            server.server_close()

    def answer(self, body):
        """The reply to a request, or a status."""
        sampling = body["sampling_params"]
        if max(body["token_ids"]) >= self.vocab_size:
            return 400
        with self.lock:
            number = len(self.requests)
            self.requests.append(body)
            self.now += 1
            self.most = max(self.most, self.now)
        params, stamp = self.params, self.stamp
        time.sleep(self.seconds)
        tokens, drawn, rows = self.model(params, body["token_ids"], sampling)
        with self.lock:
            self.now -= 1
        content = [
            {"token_id": token, "logprob": float(x), "top_logprobs": _top(row, sampling["logprobs"])}
            for token, x, row in zip(tokens, drawn, rows, strict=True)
        ]
        choice = {
            "index": 0,
            "token_ids": tokens,
            "logprobs": {"content": content},
            "finish_reason": "stop" if tokens[-1] in sampling["stop_token_ids"] else "length",
            "weight_versions": [{"version": stamp, "start": 0, "end": len(tokens)}],
        }
        return self.fault(number, {"choices": [choice]})


def _top(row, count):
    if row is None or not count:
        return []
    return [{"token_id": int(i), "logprob": float(max(row[i], -9999.0))} for i in np.argsort(-row)[:count]]


class _Server(http.server.ThreadingHTTPServer):
    daemon_threads = False  # so that it waits for those that answer
    allow_reuse_address = True
    request_queue_size = 256

    def handle_error(self, request, client_address):
        pass  # the other side went away


class _Handler(http.server.BaseHTTPRequestHandler):
    fake = None

    def do_GET(self):
        model = {"id": "policy", "max_model_len": self.fake.max_model_len}
        self._send({"data": [model]} if self.path == "/v1/models" else {})

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        reply = self.fake.answer(body)
        if self.fake.server is None or reply == "close":  # killed meanwhile
            return
        self._send(*((reply,) if isinstance(reply, dict) else ({"error": "as planted"}, reply)))

    def _send(self, body, status=200):
        self._send_text(json.dumps(body).encode(), status)

    def _send_text(self, content, status):
        with contextlib.suppress(OSError):
            self.send_response(status)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

    def log_message(self, *args):
        pass


class FakeWeights:
    """See engines.weights.Weights: hands parameters to fake servers of this process.

    Attributes:
      fail: server -> why it takes no weights.
      committed: (server, version) of each commit.
    """

    def __init__(self, servers, run="run"):
        self.servers, self.run = {server.url: server for server in servers}, run
        self.staged, self.fail, self.committed = {}, {}, []

    def stage(self, params, version):
        self.staged[version] = params

    def prepare(self, server, version):
        if server in self.fail:
            raise ServerError(f"{server}: {self.fail[server]}")

    def commit(self, server, version):
        self.servers[server].params, self.servers[server].stamp = self.staged[version], self.stamp(version)
        self.committed.append((server, version))

    def served(self, server):
        run, _, version = self.servers[server].stamp.partition(":")
        return int(version) if run == self.run else None

    def model(self, version):
        return "policy"

    def stamp(self, version):
        return f"{self.run}:{version}"


class OwnModel:
    """A model of ours behind a fake server, so that a run can have it.

    Args:
      model: of the run.
      longest: the most tokens of a prompt.
    """

    def __init__(self, model, longest=32):
        self.model, self.longest = model, longest
        self.programs, self.lock = {}, threading.Lock()

    def __call__(self, params, prompt, sampling):
        """See Bigrams; rows are known of one token alone, as a probe asks for them."""
        with self.lock:
            return self._draw(params, prompt, sampling)

    def _draw(self, params, prompt, sampling):
        stops, size = tuple(sampling["stop_token_ids"]), self.model.config.vocab_size
        size -= len(sampling.get("logit_bias", {}))  # ids that no token has
        config = SamplingConfig(sampling["max_tokens"], sampling["temperature"], stop_tokens=stops)
        if config not in self.programs:
            self.programs[config] = make_generate(self.model, config, size, of_draws=config.temperature > 0)
        padded, lengths = pad_prompts([prompt], bucket=self.longest)
        out = jax.device_get(self.programs[config](params, padded, lengths, jax.random.key(sampling["seed"] % 2**32)))
        n = int(out.lengths[0])
        rows = [None] * n
        if sampling["logprobs"]:
            ids = np.zeros((1, self.longest), np.int32)
            ids[0, : len(prompt)] = prompt
            batch = {"tokens": ids, "segment_ids": np.ones_like(ids), "positions": np.arange(self.longest)[None]}
            logits = self.model.unembed(params).logits(self.model.hidden(params, batch)[:, len(prompt) - 1])
            ids = np.arange(logits.shape[1])
            taken = np.isin(ids, sampling["allowed_token_ids"]) if "allowed_token_ids" in sampling else ids < size
            logits = np.where(taken, logits[0], -np.inf) / (config.temperature or 1.0)
            rows = [logits - np.log(np.exp(logits - logits.max()).sum()) - logits.max()]
        return out.tokens[0, :n].tolist(), out.logprobs[0, :n].tolist(), rows
