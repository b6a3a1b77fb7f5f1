"""Who gets a row, and when: requests wait in line, and enter free rows between the steps of decoding.

One thread has the device to itself; threads of requests hand it tickets, and read what comes for them. Rows that end
are given to the next at once (the iteration-level scheduling of Orca, OSDI 2022).
"""

import collections
import dataclasses
import queue
import sys
import threading
import traceback
from collections.abc import Sequence
from typing import NamedTuple

from research.serving.rows import Ask, Rows, Token


class News(NamedTuple):
    """What has come for a request.

    Attributes:
      choice: which of its answers this is of.
      tokens: new ones.
      end: how the answer ended: "stop", "length", or "error"; "" where it goes on.
    """

    choice: int
    tokens: Sequence[Token]
    end: str = ""


class Full(Exception):
    """So many requests wait already that no more are taken."""


class Closed(Exception):
    """The server ends, and takes no more."""


@dataclasses.dataclass(eq=False)
class Ticket:
    """A place in line for one answer.

    Attributes:
      ask: what is asked for.
      choice: see News.
      news: where what comes is put; the answers of one request share it.
      cancelled: nobody wants it any more.
    """

    ask: Ask
    choice: int
    news: "queue.SimpleQueue[News]"
    cancelled: bool = False


class Scheduler:
    """See above. `rows` is used by its thread alone; at most `most_waiting` answers are in line."""

    def __init__(self, rows: Rows, most_waiting: int):
        self.most_waiting = most_waiting
        self.rows = rows
        self._waiting: collections.deque[Ticket] = collections.deque()
        self._running: dict[int, Ticket] = {}
        self._changed = threading.Condition()
        self._closed = False
        self._thread = threading.Thread(target=self._run, name="decoding", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def submit(self, asks: Sequence[Ask]) -> list[Ticket]:
        """Puts the answers of one request in line, all of them or none.

        Raises:
          Full: there is no room in line.
          Closed: the server ends.
        """
        news: queue.SimpleQueue[News] = queue.SimpleQueue()
        tickets = [Ticket(ask, choice, news) for choice, ask in enumerate(asks)]
        with self._changed:
            if self._closed:
                raise Closed
            self._waiting = collections.deque(ticket for ticket in self._waiting if not ticket.cancelled)
            # What is free now will be taken from the line before long.
            if len(self._waiting) + len(tickets) > self.most_waiting + self.rows.count - len(self._running):
                raise Full
            self._waiting.extend(tickets)
            self._changed.notify()
        return tickets

    def counts(self) -> tuple[int, int]:
        """How many answers are being written, and how many wait."""
        with self._changed:
            return len(self._running), sum(not ticket.cancelled for ticket in self._waiting)

    def close(self) -> None:
        """Ends all answers, and the thread."""
        with self._changed:
            self._closed = True
            self._changed.notify()
        self._thread.join()

    def _run(self) -> None:
        while self._wait():
            try:
                self._turn()
            except Exception:  # such as no memory on the device: these requests fail, and the next ones may not
                traceback.print_exc(file=sys.stderr)
                self._fail()
        self._fail()

    def _wait(self) -> bool:
        """Waits for something to do; whether to go on."""
        with self._changed:
            while not (self._waiting or self._running or self._closed):
                self._changed.wait()
            return not self._closed

    def _turn(self) -> None:
        """Gives free rows to who waits, and every row some tokens."""
        while self.rows.free and (ticket := self._next()):
            self._running[self._admit(ticket)] = ticket
        for row in [row for row, ticket in self._running.items() if ticket.cancelled]:
            self.rows.cancel(row)
            del self._running[row]
        if not self.rows.used:
            return
        for row, (tokens, end) in self.rows.step().items():
            ticket = self._running[row]
            if end:
                del self._running[row]
            ticket.news.put(News(ticket.choice, tokens, end))

    def _admit(self, ticket: Ticket) -> int:
        try:
            return self.rows.admit(ticket.ask)
        except Exception:
            ticket.news.put(News(ticket.choice, (), "error"))
            raise

    def _next(self) -> Ticket | None:
        """Who is next in line."""
        with self._changed:
            while self._waiting:
                ticket = self._waiting.popleft()
                if not ticket.cancelled:
                    return ticket
        return None

    def _fail(self) -> None:
        """Ends every answer, those in line too where the server ends."""
        with self._changed:
            tickets = [*self._running.values(), *(self._waiting if self._closed else ())]
            self._running.clear()
            if self._closed:
                self._waiting.clear()
        self.rows.clear()
        for ticket in tickets:
            ticket.news.put(News(ticket.choice, (), "error"))
