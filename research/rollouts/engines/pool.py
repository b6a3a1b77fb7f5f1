"""Requests spread over servers: whoever is free takes the next, and a server that is lost costs none of them."""

import collections
import dataclasses
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from research.errors import InputError, Unavailable
from research.rollouts.engines.client import Refused
from research.rollouts.engines.weights import ServerError

_MOST_TRIES = 5  # of a request that servers refuse, or answer with what is no answer
_MOST_BARREN = 5  # losses of a server in a row, without an answer between them, until it no longer counts as there
NOTICE_SECONDS = 30.0  # between two lines that say that no server answers

Say = Callable[[str], None]


class Dropped(Exception):
    """An answer that can't be used, and why. The request is made again.

    Attributes:
      kind: what it is counted as.
    """

    def __init__(self, kind: str, why: str):
        super().__init__(why)
        self.kind = kind


@dataclasses.dataclass(frozen=True)
class Limits:
    """How servers are asked.

    Attributes:
      in_flight: the most requests that one server has at a time.
      answer_seconds: how long it may take for one.
      outage_seconds: how long no server may be there.
      brief_seconds: how long it may take for what needs no model, such as /health.
      pauses: seconds between two looks for a server that is lost: the first, and what they double up to.
      field, option: what the servers and outage_seconds are called in errors.
    """

    in_flight: int = 64
    answer_seconds: float = 300.0
    outage_seconds: float = 600.0
    brief_seconds: float = 10.0
    pauses: tuple[float, float] = (0.5, 15.0)
    field: str = "rollout.servers"
    option: str = "rollout.outage_seconds"

    def unavailable(self, seconds: float, whys: Iterable[object]) -> Unavailable:
        """The error where no server was there for so long, for these reasons."""
        option = f" ({self.option})" if self.option else ""
        reasons = "; ".join(dict.fromkeys(map(str, whys)))
        return Unavailable(
            f"{self.field}: none can be used for {seconds:.0f} s{option}: {reasons}. Start them, and the same command "
            "goes on from here."
        )


@dataclasses.dataclass
class Server:
    """A server as the pool knows it.

    Attributes:
      url: of it.
      up: whether it may be asked.
      known: whether it ever was.
      losses: how often it was lost.
      barren: how often since it gave an answer that could be used.
      since: when it was lost, in seconds of time.monotonic; None where it isn't.
      why: it can't be asked.
      last: why it couldn't the last time.
      admission: is held while it is admitted; by a round that has ended, maybe.
    """

    url: str
    up: bool = False
    known: bool = False
    losses: int = 0
    barren: int = 0
    since: float | None = None
    why: str = ""
    last: str = ""
    admission: threading.Lock = dataclasses.field(default_factory=threading.Lock)

    @property
    def failing(self) -> bool:
        """Whether nothing can be expected of it: it can't be asked, or is found well again and again and then fails."""
        return (not self.up and bool(self.why)) or self.barren >= _MOST_BARREN


class Pool:
    """Servers, and which of them are there.

    Args:
      urls: of the servers.
      admit: (url) -> None, before a server is asked for the first time and after it was lost; raises ServerError where
        it can't be used now, and InputError where it is the wrong one.
      limits: see Limits.
      say: prints a line.
      stopped: whether what is under way is to end now.

    Attributes:
      counts: what has been counted since it was read last: "retried", "lost", "dropped/KIND".
    """

    def __init__(
        self,
        urls: Sequence[str],
        admit: Callable[[str], None],
        limits: Limits,
        say: Say,
        stopped: Callable[[], bool] = lambda: False,
    ):
        self.servers = [Server(url) for url in urls]
        self.admit, self.limits, self.say, self.stopped = admit, limits, say, stopped
        self.counts: collections.Counter[str] = collections.Counter()

    def readmit(self) -> None:
        """Has every server admitted anew before it is asked again."""
        for server in self.servers:
            server.up = False

    def run(self, jobs: Sequence[Any], ask: Callable[[str, Any], Any]) -> list[Any]:
        """What `ask(url, job)` gives for each job, in their order.

        Args:
          jobs: they may be done more than once.
          ask: raises ServerError where the server is lost, Refused where it won't, and Dropped where its answer can't
            be used.

        Raises:
          Unavailable: no server was there for limits.outage_seconds, or gave an answer that can be used; or `stopped`
            said so.
          InputError: a request was refused again and again, or a server is the wrong one.
        """
        return _Round(self, jobs, ask).run()

    def read_counts(self) -> dict[str, int]:
        """The counts since this was called last."""
        counts, self.counts = dict(self.counts), collections.Counter()
        return counts


class _Round:
    """One call of Pool.run. All that several threads write is written under `changed`, and nothing once it is over:
    threads may wait for servers for longer."""

    def __init__(self, pool: Pool, jobs: Sequence[Any], ask: Callable[[str, Any], Any]):
        self.pool, self.jobs, self.ask = pool, jobs, ask
        self.changed = threading.Condition()
        self.waiting = collections.deque(range(len(jobs)))
        self.results: dict[int, Any] = {}
        self.tries: collections.Counter[int] = collections.Counter()
        self.error: Exception | None = None

    @property
    def over(self) -> bool:
        return self.error is not None or len(self.results) == len(self.jobs)

    def run(self) -> list[Any]:
        for server in self.pool.servers:
            self._start(self._keep, server)
            for _ in range(min(self.pool.limits.in_flight, len(self.jobs))):
                self._start(self._work, server)
        try:
            self._watch()
        except BaseException as error:  # an interrupt: the threads end, too
            self.error = Unavailable(str(error))
            raise
        finally:
            with self.changed:
                self.changed.notify_all()
        if self.error is not None:
            raise self.error
        return [self.results[number] for number in range(len(self.jobs))]

    def _start(self, work: Callable[[Server], None], server: Server) -> None:
        threading.Thread(target=self._guard, args=(work, server), daemon=True, name=f"ask {server.url}").start()

    def _guard(self, work: Callable[[Server], None], server: Server) -> None:
        """Does the work of a thread; what goes wrong in it is raised where the round was called."""
        try:
            work(server)
        except Exception as error:
            with self.changed:
                self.error = self.error or error
                self.changed.notify_all()

    def _watch(self) -> None:
        """Waits until the round is over, and ends it where no server is there for too long, or it is to stop."""
        limit, alive, told = self.pool.limits.outage_seconds, time.monotonic(), None
        with self.changed:
            while not self.over:
                now = time.monotonic()
                if self.pool.stopped():
                    self.error = Unavailable(f"{self.pool.limits.field}: asked to stop while servers were waited for")
                elif not all(server.failing for server in self.pool.servers):
                    alive, told = now, None
                elif now - alive >= limit:
                    whys = [each.why or each.last for each in self.pool.servers]
                    self.error = self.pool.limits.unavailable(now - alive, whys)
                elif told is None or now - told >= NOTICE_SECONDS:
                    self.pool.say(f"no server can be used for {now - alive:.0f} s; waiting for up to {limit:g} s")
                    told = now
                self.changed.wait(min(1.0, max(0.01, alive + limit - now)))

    def _keep(self, server: Server) -> None:
        """Admits a server, and again each time it was lost."""
        first, longest = self.pool.limits.pauses
        pause = first
        while True:
            with self.changed:
                while server.up and not self.over:
                    self.changed.wait()
                if server.barren > 1:  # it was found well, and failed at once
                    self.changed.wait_for(lambda: self.over, min(first * 2.0 ** (server.barren - 2), longest))
                if self.over:
                    return
            try:
                with server.admission:
                    if self.over:
                        return
                    self.pool.admit(server.url)
            except (ServerError, InputError) as error:
                if isinstance(error, InputError) and not server.known:
                    raise
                with self.changed:
                    if self.over:
                        return
                    self._note(server, str(error))
                    self.changed.wait_for(lambda: self.over, pause)
                pause = min(2 * pause, longest)
                continue
            pause = first
            with self.changed:
                if self.over:
                    return
                if server.since is not None:
                    self.pool.say(f"{server.url}: is back after {time.monotonic() - server.since:.1f} s")
                server.up, server.known, server.since, server.why = True, True, None, ""
                self.changed.notify_all()

    def _note(self, server: Server, why: str) -> None:
        """Notes why a server can't be used, and says it where that is new."""
        if why != server.why:
            self.pool.say(f"{why.removesuffix('.')}. It is looked for again and again, and others are asked.")
        server.up, server.why, server.last = False, why, why
        server.since = time.monotonic() if server.since is None else server.since

    def _work(self, server: Server) -> None:
        """Does one job after the other with a server, while it is there."""
        while True:
            with self.changed:
                while not self.over and not (server.up and self.waiting):
                    self.changed.wait()
                if self.over:
                    return
                number, losses = self.waiting.popleft(), server.losses
            try:
                result = self.ask(server.url, self.jobs[number])
            except (Refused, Dropped) as error:
                self._again(server, number, losses, error)
            except ServerError as error:
                self._lost(server, number, losses, error)
            else:
                with self.changed:
                    server.barren = 0
                    self.results.setdefault(number, result)
                    if self.over:
                        self.changed.notify_all()

    def _again(self, server: Server, number: int, losses: int, error: Refused | Dropped) -> None:
        """Puts a job back of which the answer can't be used. Of a wrong version, its server is admitted anew."""
        kind = error.kind if isinstance(error, Dropped) else "refused"
        with self.changed:
            if self.over:
                return
            self.tries[number] += 1
            self.pool.counts[f"dropped/{kind}"] += 1
            if kind == "version":
                self.tries[number] = 0
                self._down(server, losses, str(error))
            elif self.tries[number] >= _MOST_TRIES:
                raise InputError(f"{self.pool.limits.field}: {error} ({_MOST_TRIES} times, for one request)")
            self.waiting.append(number)
            self.changed.notify_all()

    def _lost(self, server: Server, number: int, losses: int, error: ServerError) -> None:
        """Puts a job back whose server is lost."""
        with self.changed:
            if self.over:
                return
            self.pool.counts["retried"] += 1
            self._down(server, losses, str(error))
            self.waiting.appendleft(number)
            self.changed.notify_all()

    def _down(self, server: Server, losses: int, why: str) -> None:
        """Notes that a server is lost, unless it has been since: of its requests each one fails."""
        if server.losses == losses and server.up:
            server.losses += 1
            server.barren += 1
            self.pool.counts["lost"] += 1
            self._note(server, why)
