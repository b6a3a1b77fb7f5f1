"""What a vLLM server is asked, and told, of its weights. Answers are no matter here."""

import json
import urllib.error
import urllib.request
from typing import Any

from research.rollouts.engines.weights import ServerError

_LONGEST = 300  # letters of what a server says of an error


def get(server: str, path: str, seconds: float) -> Any:
    """The JSON that a GET gives.

    Raises:
      ServerError: see `post`.
    """
    return _ask(urllib.request.Request(f"{server}{path}"), server, path, seconds)


def post(server: str, path: str, body: Any, seconds: float) -> Any:
    """What a POST of JSON gives: JSON, else its text.

    Args:
      server: its URL, without a slash at the end.
      path: from the slash on.
      body: JSON; None for none.
      seconds: how long it may take.

    Raises:
      ServerError: the server doesn't answer in time, or answers with an error.
    """
    data = b"" if body is None else json.dumps(body).encode()
    headers = {"Content-Type": "application/json"} if data else {}
    request = urllib.request.Request(f"{server}{path}", data, headers, method="POST")
    return _ask(request, server, path, seconds)


def _ask(request: urllib.request.Request, server: str, path: str, seconds: float) -> Any:
    try:
        with urllib.request.urlopen(request, timeout=seconds) as answer:
            text = answer.read().decode(errors="replace")
    except urllib.error.HTTPError as error:
        said = error.read().decode(errors="replace")
        raise ServerError(f"{server}{path}: status {error.code}: {said[:_LONGEST]}") from error
    except (OSError, ValueError) as error:  # refused, reset, timed out, no HTTP
        raise ServerError(f"{server}{path}: {getattr(error, 'reason', error) or type(error).__name__}") from error
    try:
        return json.loads(text)
    except ValueError:
        return text
