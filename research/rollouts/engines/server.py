"""How a vLLM server changes its weights, and what it calls them."""

import contextlib
from collections.abc import Callable

from research.errors import InputError
from research.rollouts.engines.client import Refused, ask, field
from research.rollouts.engines.weights import ServerError

START = "default"  # what vLLM calls the weights that a server began with
SHORT = 30.0  # seconds for what takes none
_NEITHER = "none"  # while some of the weights are the new ones


def stamp(server: str) -> str:
    """What a server calls the weights that it has.

    Raises:
      ServerError: it doesn't answer.
      InputError: it wasn't started to be told of weights.
    """
    try:
        return str(field(server, "/weight_info", "weight_version", seconds=SHORT))
    except Refused as error:
        if error.status != 404:
            raise
        raise InputError(
            f"{error}. It wasn't started to take weights (VLLM_SERVER_DEV_MODE=1): launch/servers.py --dry_run prints "
            "how it is to be."
        ) from error


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
        ask(server, "/resume", {}, seconds=SHORT)  # a run that ended here may have left it paused
        return
    try:
        ask(server, "/pause?mode=wait", {}, seconds=seconds)
        ask(server, "/update_weight_version", {"new_version": _NEITHER}, seconds=SHORT)
        try:
            ask(server, "/start_weight_update", {}, seconds=SHORT)
        except ServerError as error:
            if "already active" not in str(error):  # begun by a run that ended here
                raise
        read()
        ask(server, "/reset_prefix_cache", {}, seconds=SHORT)
        ask(server, "/finish_weight_update", {"weight_version": new}, seconds=SHORT)
    except ServerError:
        with contextlib.suppress(ServerError):
            ask(server, "/resume", {}, seconds=SHORT)
        raise
    ask(server, "/resume", {}, seconds=SHORT)
