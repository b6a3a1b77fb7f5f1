"""How the policy's weights come to the servers of an engine, in two phases, so that none serves a half-written version.

First a version is staged: written where all servers read it, and then prepared by each of them, which goes on with what
it serves. Then it is committed, server by server. A server that fails in either phase keeps its old version, and is
left out until it has gone through both.
"""

import concurrent.futures
from collections.abc import Callable, Sequence
from typing import Any, Protocol


class ServerError(Exception):
    """A server doesn't answer, or refuses what it was asked. The message says which server, and why."""


class Weights(Protocol):
    """A way for weights to servers. All but `stage` is called in process 0 alone."""

    def stage(self, params: Any, version: int) -> None:
        """Writes a version where all servers read it. Every process of the run calls it.

        Args:
          params: of the policy, frozen and trained ones joined; the layers may lie in pieces.
          version: larger than those before, but after a restart of the run, which may stage one of them again.

        Raises:
          InputError: a server has no room for such parameters: a soft prompt or a prefix.
        """

    def prepare(self, server: str, version: int) -> None:
        """Has a server read and check a version that is staged, while it serves what it did.

        Args:
          server: its URL, such as "http://127.0.0.1:8000".
          version: that was staged last.

        Raises:
          ServerError: the server can't.
        """

    def commit(self, server: str, version: int) -> None:
        """Has a server answer with a version that it has prepared, and forget what it had cached of prompts.

        Answers that are under way are finished first, with the version that they were begun with.

        Raises:
          ServerError: the server can't. What it serves then is what `served` says.
        """

    def served(self, server: str) -> int | None:
        """The version that a server answers with; None where it has none of this run, as after its start.

        Raises:
          ServerError: it doesn't answer.
        """

    def model(self, version: int) -> str:
        """What a request names as `model` to be answered with a version."""

    def stamp(self, version: int) -> str:
        """What a server says of the tokens that it drew with a version, in its answers (`weight_versions` of
        /inference/v1/generate). Tokens of which it says anything else are of another version."""


def sync(weights: Weights, servers: Sequence[str], version: int) -> dict[str, ServerError]:
    """Prepares a staged version on all servers at once, then commits it on those that could.

    Returns:
      server -> why it doesn't serve the version, of those that don't.
    """
    failed = _on_each(weights.prepare, servers, version)
    return failed | _on_each(weights.commit, [server for server in servers if server not in failed], version)


def _on_each(call: Callable[[str, int], None], servers: Sequence[str], version: int) -> dict[str, ServerError]:
    failed: dict[str, ServerError] = {}
    if not servers:
        return failed
    with concurrent.futures.ThreadPoolExecutor(len(servers)) as pool:
        for server, future in {server: pool.submit(call, server, version) for server in servers}.items():
            try:
                future.result()
            except ServerError as error:
                failed[server] = error
    return failed
