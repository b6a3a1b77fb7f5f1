"""HTTP around a Service: routes, keys, limits, streams of events, and clients that are slow, wrong or gone."""

import collections
import dataclasses
import hmac
import http
import http.server
import io
import ipaddress
import json
import socket
import socketserver
import sys
import threading
import time
import traceback
import urllib.parse
from collections.abc import Mapping
from importlib import resources
from typing import Any

from research.errors import printable
from research.serving import ids, wire
from research.serving.routes import Failed, Gone, Service
from research.serving.wire import BadRequest

_IDLE_SECONDS = 60.0  # how long a connection may say nothing between two requests
_READ_SECONDS = 30.0  # in which a request has to come, once it has begun
_SEND_SECONDS = 30.0  # how long a client may take nothing of what is sent
_DRAINED = 1 << 20  # bytes of a refused body that are read before the connection is closed, so that the reply arrives
_DRAIN_SECONDS = 1.0
_ADDRESSES = 1024  # clients whose rate is remembered
_SECURITY = (
    "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; connect-src 'self'; img-src data:; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)


@dataclasses.dataclass(frozen=True)
class Limits:
    """What clients may do.

    Attributes:
      body: bytes of a request's body.
      rate: requests of one address in a minute; 0 is no limit.
      connections: at the same time.
    """

    body: int = 1 << 20
    rate: int = 0
    connections: int = 256


class Rates:
    """Counts requests of addresses, in a bucket of tokens for each: it holds a minute's, and fills evenly."""

    def __init__(self, per_minute: int):
        self.per_minute = per_minute
        self._buckets: collections.OrderedDict[str, tuple[float, float]] = collections.OrderedDict()
        self._lock = threading.Lock()

    def take(self, address: str) -> float:
        """Takes a request's token; returns 0, or where there is none the seconds until there is one."""
        if not self.per_minute:
            return 0.0
        with self._lock:
            now = time.monotonic()
            left, then = self._buckets.pop(address, (float(self.per_minute), now))
            left = min(float(self.per_minute), left + (now - then) * self.per_minute / 60)
            self._buckets[address] = (left - 1 if left >= 1 else left, now)
            if len(self._buckets) > _ADDRESSES:
                self._buckets.popitem(last=False)
            return 0.0 if left >= 1 else (1 - left) * 60 / self.per_minute


class Server(socketserver.ThreadingMixIn, http.server.HTTPServer):
    """Serves a model.

    Args:
      address: host and port; port 0 is any that is free.
      service: answers.
      token: that requests must have; "" for none.
      limits: of requests.
    """

    daemon_threads = True
    request_queue_size = 128

    def __init__(self, address: tuple[str, int], service: Service, token: str = "", limits: Limits | None = None):
        self.service, self.token, self.limits = service, token, limits or Limits()
        self.local, self.rates = is_loopback(address[0]), Rates(self.limits.rate)
        self.page = resources.files(__package__).joinpath("page.html").read_bytes()
        self._places = threading.Semaphore(self.limits.connections)
        self.address_family = socket.AF_INET6 if ":" in address[0] else socket.AF_INET
        super().__init__(address, Handler)

    def server_bind(self) -> None:
        socketserver.TCPServer.server_bind(self)  # HTTPServer's looks the host's name up, which may take seconds
        self.server_name, self.server_port = self.server_address[:2]

    def process_request(self, request: Any, client_address: Any) -> None:
        if not self._places.acquire(blocking=False):
            self.shutdown_request(request)
            return
        super().process_request(request, client_address)

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        try:
            super().process_request_thread(request, client_address)
        finally:
            self._places.release()

    def handle_error(self, request: Any, client_address: Any) -> None:
        if not isinstance(sys.exception(), OSError):  # else the other side went away
            traceback.print_exc(file=sys.stderr)


class _Timely(io.RawIOBase):
    """What a connection sends. A request has to come within _READ_SECONDS of its first byte, however it drips."""

    def __init__(self, connection: socket.socket):
        self._connection = connection
        self.until: float | None = None

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        left = _IDLE_SECONDS if self.until is None else self.until - time.monotonic()
        if left <= 0:
            raise TimeoutError
        self._connection.settimeout(left)
        count = self._connection.recv_into(buffer)
        if self.until is None:
            self.until = time.monotonic() + _READ_SECONDS
        return count


class Handler(http.server.BaseHTTPRequestHandler):
    """One connection; a routes.Connection."""

    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # with it the second of two short writes waits 40 ms for a word from the client
    server_version, sys_version = "understudy", ""
    server: Server

    def setup(self) -> None:
        super().setup()
        self._raw = _Timely(self.connection)
        self.rfile = io.BufferedReader(self._raw)

    def handle_one_request(self) -> None:
        self._raw.until, self._streaming, self._unread = None, False, 0
        super().handle_one_request()

    def do_GET(self) -> None:
        service = self.server.service
        gets = {"/v1/models": service.models, f"/v1/models/{service.name}": service.model}
        path = urllib.parse.unquote(urllib.parse.urlsplit(self.path).path)
        if path == "/":
            self._answer(lambda: self._send(self.server.page, "text/html; charset=utf-8"), open_to_all=True)
        elif path == "/health":
            self._answer(lambda: self.reply(service.health()), open_to_all=True)
        elif path in gets:
            self._answer(lambda: self.reply(gets[path]()))
        else:
            self._answer(self._no_route)

    def do_POST(self) -> None:
        service = self.server.service
        posts = {
            "/v1/chat/completions": service.chat,
            "/v1/completions": service.complete,
            ids.ROUTE: service.generate,
        }
        answer = posts.get(urllib.parse.urlsplit(self.path).path)
        self._answer(self._no_route if answer is None else lambda: answer(wire.parse(self._body()), self))

    def _no_route(self) -> None:
        raise BadRequest(f"{self.command} {self.path[:80]}: no such route.", status=404)

    def _answer(self, work: Any, *, open_to_all: bool = False) -> None:
        """Does what a request asks for; an error is a reply, or the last event of a stream."""
        began = time.monotonic()
        self._unread = self._length()
        try:
            self._admit(open_to_all)
            said = work()
            self._log(200, began, said or "")
        except BadRequest as error:
            self._fail(error.message, error.status, error.param, error.code)
            self._log(error.status, began, error.message)
        except Failed as error:
            self._fail(error.message, error.status)
            self._log(error.status, began, error.message)
        except (Gone, ConnectionError, TimeoutError):
            self.close_connection = True
            self._log(499, began, "the client left")
        except Exception:
            traceback.print_exc(file=sys.stderr)
            self._fail("a fault of the server; its log says more.", 500)
            self._log(500, began, "")
        if self._streaming and not self.close_connection:
            self._write_chunk(b"")
        self._drain()

    def _length(self) -> int:
        """Bytes of the body; -1 where that isn't said well."""
        given = self.headers.get_all("Content-Length") or ["0"]
        if "Transfer-Encoding" in self.headers or len(given) > 1:
            return -1
        return int(given[0]) if given[0].isascii() and given[0].isdecimal() and len(given[0]) < 16 else -1

    def _admit(self, open_to_all: bool) -> None:
        """Raises BadRequest or Failed where a request isn't answered whatever it is."""
        server = self.server
        wait = server.rates.take(self.client_address[0])
        if wait:
            raise Failed(f"more than {server.limits.rate} requests in a minute. Wait for {wait:.0f} s.", 429)
        host, origin = self.headers.get("Host", ""), self.headers.get("Origin")
        # A page of another site can send requests here from the browser of who looks at it.
        if origin is not None and urllib.parse.urlsplit(origin).netloc.lower() != host.lower():
            raise BadRequest(f"the origin {origin[:80]!r} isn't this server's.", status=403)
        if server.local and not is_loopback(_name(host)):
            raise BadRequest(f"the host {host[:80]!r} isn't this machine's own name for itself.", status=403)
        given = self.headers.get("Authorization", "").removeprefix("Bearer ").strip()
        if server.token and not open_to_all and not hmac.compare_digest(given.encode(), server.token.encode()):
            raise BadRequest("the token is missing or wrong: send it as Authorization: Bearer TOKEN.", status=401)
        if self._unread < 0:
            raise BadRequest("the request must say its length, as Content-Length.", status=411)
        if self._unread > server.limits.body:
            raise BadRequest(f"the body has {self._unread} bytes, and may have {server.limits.body}.", status=413)

    def _body(self) -> bytes:
        content = self.rfile.read(self._unread)
        if len(content) < self._unread:
            raise ConnectionError
        self._unread = 0
        return content

    def gone(self) -> bool:
        """Whether the client has closed the connection."""
        self.connection.settimeout(0.0)
        try:
            return not self.connection.recv(1, socket.MSG_PEEK)
        except BlockingIOError:
            return False
        except OSError:
            return True

    def reply(self, body: Mapping[str, Any]) -> None:
        self._send(json.dumps(body).encode(), "application/json")

    def event(self, body: Mapping[str, Any] | str) -> None:
        """Sends an event of a stream (server-sent events of the HTML standard)."""
        if not self._streaming:
            self._streaming = True
            self.close_connection |= self.request_version == "HTTP/1.0"
            self._head(200, "text/event-stream", {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"})
        content = body if isinstance(body, str) else json.dumps(body)
        self._write_chunk(f"data: {content}\n\n".encode())

    def _write_chunk(self, content: bytes) -> None:
        chunked = self.request_version != "HTTP/1.0"
        self._write(b"%x\r\n%b\r\n" % (len(content), content) if chunked else content)

    def _send(self, content: bytes, kind: str, status: int = 200, headers: Mapping[str, str] | None = None) -> None:
        self._head(status, kind, {"Content-Length": str(len(content)), **(headers or {})})
        self._write(content)

    def _head(self, status: int, kind: str, headers: Mapping[str, str]) -> None:
        self.connection.settimeout(_SEND_SECONDS)
        self.send_response(status)
        if self._streaming and not self.close_connection:
            self.send_header("Transfer-Encoding", "chunked")
        fixed = {"Content-Type": kind, "X-Content-Type-Options": "nosniff", "Content-Security-Policy": _SECURITY}
        for name, value in {**fixed, **headers}.items():
            self.send_header(name, value)
        if self.close_connection:
            self.send_header("Connection", "close")
        self.end_headers()

    def _write(self, content: bytes) -> None:
        self.connection.settimeout(_SEND_SECONDS)
        self.wfile.write(content)

    def _fail(self, message: str, status: int, param: str = "", code: str = "") -> None:
        """Says what went wrong; a client that isn't there any more isn't told."""
        body = wire.error(message, status, param, code)
        try:
            if self._streaming:
                self.event(body)
                return
            self.close_connection |= self._unread != 0
            headers = {"Retry-After": "2"} if status == 429 else {}
            headers |= {"WWW-Authenticate": "Bearer"} if status == 401 else {}
            self._send(json.dumps(body).encode(), "application/json", status, headers)
        except OSError:
            self.close_connection = True

    def _drain(self) -> None:
        """Reads some of a body that nobody wanted: a connection closed over it may lose the reply."""
        left = min(self._unread if self._unread >= 0 else _DRAINED, _DRAINED)
        self._raw.until = time.monotonic() + _DRAIN_SECONDS
        try:
            if left and self.close_connection:  # the client may have sent all, or wait for an end
                self.connection.shutdown(socket.SHUT_WR)
            while left > 0 and (content := self.rfile.read1(min(left, 1 << 16))):
                left -= len(content)
        except OSError:
            pass
        self.close_connection |= left > 0

    def send_error(self, code: int, message: str | None = None, explain: str | None = None) -> None:
        """What isn't HTTP at all; http.server's own words would be a page."""
        self._streaming, self.close_connection = False, True
        self._unread = 0
        self._fail(message or http.HTTPStatus(code).phrase, code)
        self._log(code, time.monotonic(), message or "")

    def _log(self, status: int, began: float, said: str) -> None:
        now, seconds = time.strftime("%H:%M:%S"), time.monotonic() - began
        line = f"{now} {getattr(self, 'command', None) or '-'} {getattr(self, 'path', '')[:80]} {status}"
        print(printable(f"{line}  {seconds:.1f} s  {said}".rstrip()), file=sys.stderr, flush=True)

    def log_message(self, format: str, *args: Any) -> None:
        pass  # _log says it


def is_loopback(host: str) -> bool:
    """Whether a name is this machine's own for itself."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host.lower() == "localhost"


def _name(host: str) -> str:
    """The name in a Host header, without its port."""
    return host[1:].partition("]")[0] if host.startswith("[") else host.partition(":")[0]
