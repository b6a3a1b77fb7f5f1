"""One server, asked by HTTP: JSON in, JSON out, each request on a connection of its own."""

import http.client
import json
import os
import re
import urllib.parse
from typing import Any

from research.errors import InputError
from research.rollouts.engines.weights import ServerError

KEY = "VLLM_API_KEY"  # the environment variable of the servers' key, as vLLM calls it
_SHOWN = 300  # letters of a server's error


class Refused(ServerError):
    """The server is well, and doesn't do what it was asked (4xx).

    Attributes:
      status: of its answer.
    """

    def __init__(self, text: str, status: int):
        super().__init__(text)
        self.status = status


def check_url(field: str, url: str) -> None:
    """Raises InputError where a URL isn't that of a server."""
    try:
        parts = urllib.parse.urlsplit(url)
        fits = parts.scheme in ("http", "https") and not (parts.query or parts.fragment or parts.username)
        fits = fits and (parts.port is None or parts.port > 0) and re.search(r"[\s\x00-\x1f]", url) is None
        fits = fits and bool((parts.hostname or "").encode("idna"))
    except ValueError:
        fits = False
    if not fits:
        raise InputError(f"{field} = {url!r}: isn't the URL of a server. Write it as in http://127.0.0.1:8000.")


def ask(server: str, path: str, body: Any = None, *, seconds: float) -> Any:
    """What a server answers: to a GET, or with a body to a POST. Text that isn't JSON is None.

    Args:
      server: its URL.
      path: of the route, from / on.
      body: of JSON types.
      seconds: how long it may say nothing.

    Raises:
      Refused: it answers with a status of 4xx.
      ServerError: it doesn't answer, or answers with another status than 2xx.
    """
    parts = urllib.parse.urlsplit(server)
    kind = http.client.HTTPSConnection if parts.scheme == "https" else http.client.HTTPConnection
    connection = kind(parts.hostname or "", parts.port, timeout=seconds)
    headers = {"Content-Type": "application/json"} if body is not None else {}
    if key := os.environ.get(KEY):
        headers["Authorization"] = f"Bearer {key}"
    try:
        content = None if body is None else json.dumps(body)
        connection.request("GET" if body is None else "POST", parts.path.rstrip("/") + path, content, headers)
        reply = connection.getresponse()
        text = reply.read()
    except TimeoutError as error:
        raise ServerError(f"{server}: no answer to {path} within {seconds:g} s") from error
    except (OSError, http.client.HTTPException) as error:
        raise ServerError(f"{server}: {type(error).__name__}: {str(error) or 'the connection ended'}") from error
    finally:
        connection.close()
    if not 200 <= reply.status < 300:
        said = f"{server}: {path} answered {reply.status}: {_in_short(text)}"
        refused = 400 <= reply.status < 500 and reply.status not in (408, 429)
        raise Refused(said, reply.status) if refused else ServerError(said)
    try:
        return json.loads(text) if text else None
    except (ValueError, RecursionError):
        return None


def field(server: str, path: str, name: str, *, seconds: float) -> Any:
    """A field of what a server answers to a GET.

    Raises:
      Refused, ServerError: see `ask`; or the answer has no such field.
    """
    reply = ask(server, path, seconds=seconds)
    if not isinstance(reply, dict) or reply.get(name) is None:
        raise ServerError(f"{server}: {path} answers without {name!r}")
    return reply[name]


def models(server: str, seconds: float) -> list[dict[str, Any]]:
    """What a server says of its models and adapters, the model that it was started with first.

    Raises:
      Refused, ServerError: see `ask`; or it names none.
    """
    entries = field(server, "/v1/models", "data", seconds=seconds)
    if not entries or not isinstance(entries, list) or not all(isinstance(e, dict) and "id" in e for e in entries):
        raise ServerError(f"{server}: /v1/models names no model")
    return entries


def _in_short(text: bytes) -> str:
    shown = " ".join(text.decode("utf-8", "replace").split())
    return shown if len(shown) <= _SHOWN else f"{shown[:_SHOWN]} ..."
