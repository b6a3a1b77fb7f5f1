"""How a vLLM server changes its weights, and what it calls them."""

import contextlib
from collections.abc import Callable

from research.rollouts.engines.client import ask
from research.rollouts.engines.weights import ServerError

START = "default"  # what vLLM calls the weights that a server began with
SHORT = 30.0  # seconds for what takes none
_NEITHER = "none"  # while some of the weights are the new ones


def stamp(server: str) -> str:
    """What a server calls the weights that it has.

    Raises:
      ServerError: it doesn't answer.
    """
    return ask(server, "/weight_info", seconds=SHORT)["weight_version"]


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
