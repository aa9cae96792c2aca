"""An HTTP proxy in front of an object store, which fails as a test says."""

import socket
import struct
import threading
from collections.abc import Mapping
from contextlib import closing, suppress
from dataclasses import dataclass
from http.client import HTTPConnection
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Final, Self
from urllib.parse import urlsplit

TIMEOUT_S: Final = 60
_PER_CONNECTION: Final = frozenset({"connection", "transfer-encoding", "date", "server"})
_NO_LINGER: Final = struct.pack("ii", 1, 0)


@dataclass
class Fault:
    """What happens to requests.

    Attributes:
        kind: `answer` with status and code; `reset` the connection; `hang` until the client gives up; `lose` the
            response of a request that was carried out; `cut` the response in the middle.
        status: HTTP status of the answer.
        code: Error code in the answer.
        count: Requests that it happens to; -1 for all.
        methods: HTTP methods of those requests.
        after: Requests of those methods that are carried out before.
    """

    kind: str
    status: int = 0
    code: str = ""
    count: int = -1
    methods: tuple[str, ...] = ("GET", "PUT", "POST", "HEAD", "DELETE")
    after: int = 0


class FaultProxy:
    """Relays requests to a server; a context manager.

    Attributes:
        url: Where it listens.
        fault: What happens to requests; None carries them out.
        accepted_key_id: Access key that the server accepts; empty for any.
        struck: Set when a fault happens to a request.
        carried_out: Methods and paths of the requests that the server was given, in order.

    Args:
        target: URL of the server.
    """

    def __init__(self, target: str) -> None:
        self.fault: Fault | None = None
        self.accepted_key_id = ""
        self.struck = threading.Event()
        self.carried_out: list[tuple[str, str]] = []
        self._lock = threading.Lock()
        self._server = _Server(self, target)
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.05,))
        self._thread.start()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._thread.join()
        self._server.hang_up()
        self._server.server_close()

    def next_fault(self, method: str) -> Fault | None:
        """Return what happens to a request."""
        with self._lock:
            fault = self.fault
            if fault is None or method not in fault.methods or fault.count == 0:
                return None
            if fault.after > 0:
                fault.after -= 1
                return None
            fault.count -= 1
            self.struck.set()
            return fault


class _Server(ThreadingHTTPServer):
    """The listening side."""

    daemon_threads = False  # closing it waits for them

    def __init__(self, proxy: FaultProxy, target: str) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.proxy = proxy
        self.target = urlsplit(target)
        self.connections: list[socket.socket] = []

    def process_request(self, request: Any, client_address: Any) -> None:
        self.connections.append(request)
        super().process_request(request, client_address)

    def hang_up(self) -> None:
        """End the connections that clients keep open."""
        for connection in self.connections:
            with suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    timeout = TIMEOUT_S
    server: _Server

    def _handle(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        accepted = f"Credential={self.server.proxy.accepted_key_id}"
        if accepted not in self.headers.get("Authorization", ""):
            self._answer(Fault("answer", 400, "ExpiredToken"))
            return
        fault = self.server.proxy.next_fault(self.command)
        if fault is None:
            self._respond(*self._forward(body))
        else:
            self._fail(fault, body)

    def __getattr__(self, name: str) -> Any:
        """Return the method for any HTTP method."""
        if name.startswith("do_"):
            return self._handle
        raise AttributeError(name)

    def _fail(self, fault: Fault, body: bytes) -> None:
        if fault.kind == "answer":
            self._answer(fault)
            return
        self.close_connection = True
        if fault.kind == "reset":
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _NO_LINGER)
        elif fault.kind == "hang":
            self.connection.recv(1)  # returns when the client gives up
        else:
            status, headers, data = self._forward(body)
            if fault.kind == "cut":
                self._respond(status, headers, data[: len(data) // 2])

    def _answer(self, fault: Fault) -> None:
        data = f"<Error><Code>{fault.code}</Code><Message>said</Message></Error>".encode()
        headers = {"Content-Type": "application/xml", "Content-Length": str(len(data))}
        self._respond(fault.status, headers, data)

    def _respond(self, status: int, headers: Mapping[str, str], data: bytes) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(data)

    def _forward(self, body: bytes) -> tuple[int, dict[str, str], bytes]:
        target = self.server.target
        self.server.proxy.carried_out.append((self.command, self.path))
        with closing(HTTPConnection(target.hostname or "", target.port, timeout=TIMEOUT_S)) as near:
            near.request(self.command, self.path, body, dict(self.headers.items()))
            response = near.getresponse()
            data = response.read()
        headers = {k: v for k, v in response.getheaders() if k.lower() not in _PER_CONNECTION}
        headers.setdefault("Content-Length", str(len(data)))
        return response.status, headers, data

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002 - name of the class
        """Say nothing."""
