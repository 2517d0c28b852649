"""A scripted server on 127.0.0.1 that answers what a test tells it, well or badly.

def handler(request: Request) -> Reply:
    return Reply({"asked": request.body}) if request.number else Reply(status=503)

with FakeServer(handler) as server:
    ...  # server.base, server.requests, server.stop(), server.start()
"""

import contextlib
import dataclasses
import http.server
import json
import os
import socket
import ssl
import struct
import threading
from collections.abc import Callable, Mapping
from typing import Any


@dataclasses.dataclass(frozen=True)
class Request:
    """What was asked."""

    number: int  # from 0, in the order of arrival, also over restarts
    method: str
    path: str
    headers: Mapping[str, str]  # of any case
    raw: bytes  # its body
    connection: int  # the other side's port

    @property
    def body(self) -> Any:
        """Parsed JSON; None if there is none."""
        return json.loads(self.raw) if self.raw else None


@dataclasses.dataclass(frozen=True)
class Reply:
    """What is answered, and what goes wrong on the way."""

    body: Any = b""  # bytes as they are; all else as JSON
    status: int = 200
    headers: Mapping[str, str] = dataclasses.field(default_factory=dict)
    early: bytes = b""  # before all else
    chunked: bool = False  # one chunk for every 16 bytes
    length: int | None = None  # Content-Length, if not the true one
    delay_s: float = 0.0  # before the first byte
    drip_headers_s: float = 0.0  # between two bytes
    drip_body_s: float = 0.0
    silent: bool = False  # the connection is closed without an answer
    cut: int | None = None  # it is closed after so many bytes of the body
    reset: bool = False  # and that with a reset, not in good order

    def payload(self) -> bytes:
        return self.body if isinstance(self.body, bytes) else json.dumps(self.body).encode()

    def head(self) -> bytes:
        length = len(self.payload()) if self.length is None else self.length
        framing = {"Transfer-Encoding": "chunked"} if self.chunked else {"Content-Length": length}
        fields = {"Content-Type": "application/json"} | framing | dict(self.headers)
        lines = [f"HTTP/1.1 {self.status} Said", *(f"{k}: {v}" for k, v in fields.items())]
        return self.early + "\r\n".join([*lines, "", ""]).encode()

    def sent_body(self) -> bytes:
        body = self.payload()
        if self.chunked:
            pieces = [body[i : i + 16] for i in range(0, len(body), 16)]
            body = b"".join(b"%x\r\n%b\r\n" % (len(p), p) for p in pieces) + b"0\r\n\r\n"
        return body[: self.cut]


def script(*replies: Reply) -> Callable[[Request], Reply]:
    """A handler that gives these replies in order, and the last one again and again."""
    return lambda request: replies[min(request.number, len(replies) - 1)]


class FakeServer:
    """Answers each request with `handler(request)`; a context manager that leaves nothing behind.

    What a handler raises is answered with status 500, and raised when the context ends.
    """

    def __init__(self, handler: Callable[[Request], Reply], *, tls: ssl.SSLContext | None = None):
        self.handler = handler  # may be replaced at any time
        self.requests: list[Request] = []  # all so far
        self._tls, self._lock = tls, threading.Lock()
        self._errors: list[Exception] = []
        self._port = 0  # a free one, and from then on the same
        self._http: _Server | None = None

    @property
    def base(self) -> str:
        return f"{'http' if self._tls is None else 'https'}://127.0.0.1:{self._port}"

    def start(self) -> None:
        self._http = _Server(("127.0.0.1", self._port), self)
        self._port = self._http.server_address[1]
        if self._tls is not None:
            self._http.socket = self._tls.wrap_socket(self._http.socket, server_side=True)
        self._thread = threading.Thread(target=self._http.serve_forever, args=(0.01,))
        self._thread.start()

    def stop(self) -> None:
        """Cuts all connections; new ones are refused until `start`."""
        if self._http is not None:
            self._http.shutdown()
            self._thread.join()
            self._http.cut_connections()
            self._http.server_close()  # joins the connections' threads
            self._http = None

    def __enter__(self) -> "FakeServer":
        self.start()
        return self

    def __exit__(self, error_type, error, traceback) -> None:
        self.stop()
        if self._errors and error is None:
            raise self._errors[0]

    def reply_to(self, **fields) -> Reply:
        with self._lock:
            request = Request(len(self.requests), **fields)
            self.requests = [*self.requests, request]
        try:
            return self.handler(request)
        except Exception as error:
            self._errors.append(error)
            return Reply({"error": {"message": repr(error)}}, status=500)


class _Server(http.server.ThreadingHTTPServer):
    daemon_threads = False  # they are joined
    request_queue_size = 128

    def __init__(self, address: tuple[str, int], fake: FakeServer):
        self.fake, self.stopping = fake, threading.Event()
        self._connections: set[socket.socket] = set()
        super().__init__(address, _Handler)

    def process_request(self, request, client_address):
        self._connections.add(request)
        super().process_request(request, client_address)

    def shutdown_request(self, request):
        super().shutdown_request(request)
        self._connections.discard(request)

    def cut_connections(self) -> None:
        self.stopping.set()
        for connection in list(self._connections):
            with contextlib.suppress(OSError):  # the other side was faster
                connection.shutdown(socket.SHUT_RDWR)

    def handle_error(self, request, client_address):
        """Silent: the other side went away, as clients do that do not wait any longer."""


class _Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True

    def do_GET(self):
        size = int(self.headers["Content-Length"] or 0)
        received = self.rfile.read(size)
        if len(received) < size:  # whoever asked is gone
            self.close_connection = True
            return
        reply = self.server.fake.reply_to(
            method=self.command,
            path=self.path,
            headers=self.headers,
            raw=received,
            connection=self.client_address[1],
        )
        if self.server.stopping.wait(reply.delay_s):
            return
        self.close_connection = reply.silent or reply.cut is not None or self.close_connection
        if not reply.silent:
            self._write(reply.head(), reply.drip_headers_s)
            self._write(reply.sent_body(), reply.drip_body_s)
        if reply.reset:  # to close with nothing left to linger for sends one
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            os.close(self.connection.detach())

    do_POST = do_PUT = do_DELETE = do_GET

    def log_message(self, format, *args):
        pass

    def _write(self, data: bytes, drip_s: float) -> None:
        for part in [data[i : i + 1] for i in range(len(data))] if drip_s else [data]:
            if drip_s and self.server.stopping.wait(drip_s):
                return
            self.wfile.write(part)
