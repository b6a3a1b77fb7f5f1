"""Requests spread over servers: what happens to them when servers are slow, lost, found again, or answer nonsense."""

import collections
import re
import threading
import time

import pytest

from research.errors import InputError, Unavailable
from research.rollouts.engines.client import Refused
from research.rollouts.engines.pool import Dropped, Limits, Pool
from research.rollouts.engines.weights import ServerError

SOON = Limits(in_flight=4, outage_seconds=5.0, pauses=(0.01, 0.02))


class Servers:
    """Servers that are functions; `down` are lost."""

    def __init__(self, *urls, limits=SOON, **options):
        self.down, self.seconds, self.lines = set(), collections.Counter(), []
        self.asked, self.now, self.most = collections.Counter(), collections.Counter(), collections.Counter()
        self.admitted, self.lock = collections.Counter(), threading.Lock()
        self.pool = Pool(urls, self.admit, limits, self.lines.append, **options)

    def admit(self, url):
        if url in self.down:
            raise ServerError(f"{url}: is down")
        self.admitted[url] += 1

    def ask(self, url, job):
        with self.lock:
            self.asked[url] += 1
            self.now[url] += 1
            self.most[url] = max(self.most[url], self.now[url])
        time.sleep(self.seconds[url])
        with self.lock:
            self.now[url] -= 1
        if url in self.down:
            raise ServerError(f"{url}: is down")
        return 2 * job


def test_answers_come_in_order_and_no_server_has_more_than_it_may():
    servers = Servers("a", "b")
    servers.seconds.update(a=0.002, b=0.002)
    assert servers.pool.run(range(40), servers.ask) == [2 * i for i in range(40)]
    assert max(servers.most.values()) <= 4
    assert min(servers.asked[url] for url in "ab") > 0
    assert servers.lines == []
    assert servers.pool.read_counts() == {}


def test_work_goes_to_who_is_free():
    servers = Servers("slow", "fast")
    servers.seconds.update(slow=0.2, fast=0.002)
    servers.pool.run(range(40), servers.ask)
    assert servers.asked["slow"] <= 8 < servers.asked["fast"]


def test_requests_of_a_lost_server_go_to_the_others_and_it_is_used_again_once_it_is_back():
    servers = Servers("a", "b")
    servers.seconds.update(a=0.005, b=0.005)

    def ask(url, job):
        if job == 6:
            servers.down.add("a")
        if job == 60:
            servers.down.clear()
        return servers.ask(url, job)

    assert servers.pool.run(range(120), ask) == [2 * i for i in range(120)]
    counts = servers.pool.read_counts()
    assert counts["lost"] == 1
    assert 1 <= counts["retried"] <= 4
    assert servers.admitted == {"a": 2, "b": 1}
    lost, back = servers.lines
    assert lost.startswith("a: is down. It is looked for again and again")
    assert re.fullmatch(r"a: is back after \d\.\d s", back)


def test_an_outage_is_waited_for():
    servers = Servers("a", "b")
    servers.down.update("ab")
    threading.Timer(0.15, servers.down.clear).start()
    assert servers.pool.run(range(3), servers.ask) == [0, 2, 4]
    assert any(re.match(r"no server can be used for 0 s; waiting for up to 5 s", line) for line in servers.lines)


def test_an_outage_that_lasts_ends_in_an_error():
    servers = Servers("a", "b", limits=Limits(outage_seconds=0.1, pauses=(0.01, 0.02)))
    servers.down.update("ab")
    began = time.monotonic()
    with pytest.raises(Unavailable, match=r"none can be used for 0 s .*: a: is down; b: is down\. Start them"):
        servers.pool.run(range(3), servers.ask)
    assert time.monotonic() - began < 3
    servers.down.clear()
    assert servers.pool.run([1], servers.ask) == [2]


@pytest.mark.parametrize(
    ("error", "kind"),
    [(Refused("a: answered 400: too long", 400), "refused"), (Dropped("malformed", "x"), "malformed")],
)
def test_what_is_refused_is_asked_again_but_not_forever(error, kind):
    servers, tries = Servers("a"), collections.Counter()

    def sometimes(url, job):
        tries[job] += 1
        if job == 1 and tries[1] < 4:
            raise error
        return job

    assert servers.pool.run(range(3), sometimes) == [0, 1, 2]
    assert servers.pool.read_counts() == {f"dropped/{kind}": 3}

    def never(url, job):
        raise error

    with pytest.raises(InputError, match=r"^rollout\.servers: .* \(5 times, for one request\)"):
        servers.pool.run(range(3), never)


def test_a_server_with_a_wrong_version_is_admitted_anew_and_asked_again():
    servers, wrong = Servers("a"), iter([True, False, True])

    def ask(url, job):
        if job == 2 and next(wrong, False):
            raise Dropped("version", "a: wrote an answer with the weights 3, and not with 4")
        return job

    assert servers.pool.run(range(4), ask) == [0, 1, 2, 3]
    assert servers.admitted["a"] == 2
    assert servers.pool.read_counts() == {"dropped/version": 1, "lost": 1}


@pytest.mark.parametrize(
    "error", [Dropped("version", "a: wrote an answer with the weights 3, and not with 4"), ServerError("a: died of it")]
)
def test_a_server_that_is_well_until_it_is_asked_is_not_asked_for_ever(error):
    servers = Servers("a", limits=Limits(in_flight=2, outage_seconds=0.2, pauses=(0.01, 0.02)))

    def ask(url, job):
        raise error

    with pytest.raises(Unavailable, match=rf"^rollout\.servers: none can be used for 0 s .*: {error}\. Start"):
        servers.pool.run(range(3), ask)
    assert servers.admitted["a"] >= 5


def test_a_server_that_fails_now_and_then_is_used_for_as_long_as_it_answers():
    servers = Servers("a", limits=Limits(in_flight=1, outage_seconds=0.05, pauses=(0.001, 0.001)))
    odd = collections.Counter()

    def ask(url, job):
        odd[job] += 1
        if odd[job] < 4:
            raise ServerError("a: died of it")
        return job

    assert servers.pool.run(range(12), ask) == list(range(12))
    assert servers.pool.read_counts()["lost"] == 36


def test_who_is_to_stop_does_not_wait_for_servers():
    stop = threading.Event()
    servers = Servers("a", limits=Limits(outage_seconds=60.0, pauses=(0.01, 0.02)), stopped=stop.is_set)
    servers.down.add("a")
    threading.Timer(0.1, stop.set).start()
    began = time.monotonic()
    with pytest.raises(Unavailable, match="asked to stop while servers were waited for"):
        servers.pool.run(range(3), servers.ask)
    assert time.monotonic() - began < 3
    assert servers.pool.run([], servers.ask) == []


def test_a_wrong_server_or_a_bug_ends_the_round():
    def admit(url):
        raise InputError(f"{url}: has another model")

    pool = Pool(["a"], admit, SOON, print)
    with pytest.raises(InputError, match="a: has another model"):
        pool.run([1], lambda url, job: job)
    servers = Servers("a")
    with pytest.raises(ZeroDivisionError):
        servers.pool.run([0], lambda url, job: 1 / job)
