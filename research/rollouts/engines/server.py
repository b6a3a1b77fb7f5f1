"""What a vLLM server is asked, and told, of its weights. Answers are no matter here."""

import contextlib
import json
import urllib.error
import urllib.request
from collections.abc import Callable
from typing import Any

from research.rollouts.engines.weights import ServerError

START = "default"  # what vLLM calls the weights that a server began with
SHORT = 30.0  # seconds for what takes none
_NEITHER = "none"  # while some of the weights are the new ones
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


def stamp(server: str) -> str:
    """What a server calls the weights that it has.

    Raises:
      ServerError: it doesn't answer.
    """
    return get(server, "/weight_info", SHORT)["weight_version"]


def change_weights(server: str, new: str, read: Callable[[], None], seconds: float) -> None:
    """Has a server change its weights between answers, and forget what it had cached of prompts.

    Meanwhile they are called neither what they were nor what they will be, so that those of a server that is stopped in
    between aren't taken for either.

    Args:
      server: its URL.
      new: what its weights are called then.
      read: has it read them.
      seconds: how long answers under way may take.

    Raises:
      ServerError: it can't.
    """
    if stamp(server) == new:
        post(server, "/resume", None, SHORT)  # a run that ended here may have left it paused
        return
    post(server, "/pause?mode=wait", None, seconds)
    try:
        post(server, "/update_weight_version", {"new_version": _NEITHER}, SHORT)
        try:
            post(server, "/start_weight_update", None, SHORT)
        except ServerError as error:
            if "already active" not in str(error):  # begun by a run that ended here
                raise
        read()
        post(server, "/reset_prefix_cache", None, SHORT)
        post(server, "/finish_weight_update", {"weight_version": new}, SHORT)
    except ServerError:
        with contextlib.suppress(ServerError):
            post(server, "/resume", None, SHORT)
        raise
    post(server, "/resume", None, SHORT)


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
