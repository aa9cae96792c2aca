"""Connections of the HTTP servers that send nothing, a byte at a time, or never read: bounded in number and time."""

import contextlib
import resource
import select
import socket
import ssl
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from http import HTTPStatus
from pathlib import Path
from typing import Any, Final

import pytest

from qflare_server.cli.main import main
from qflare_server.config import ServerConfig
from qflare_server.serving.http.connections import Bounds
from qflare_server.serving.http.hosts import Receive, Scope, Send, answer
from qflare_server.serving.http.server import HttpServer

Serve = Callable[..., HttpServer]
ANSWER_S: Final = 2.0
"""The slowest answer; this process is visitor and server at once."""
WAIT_S: Final = 20.0
REQUEST: Final = b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n"
LARGE: Final = 8 * 2**20
PAUSE: Final = threading.Event()


async def application(scope: Scope, receive: Receive, send: Send) -> None:
    """Answer with as many bytes as the path says, once the body of the request is there."""
    more = True
    while more:
        message = await receive()
        more = message.get("more_body", False)
    await answer(send, HTTPStatus.OK, b"x" * int(scope["path"].strip("/") or "2"))


@pytest.fixture
def serve() -> Iterator[Serve]:
    """Return a function that starts a server with bounds."""
    running: list[HttpServer] = []

    def start(tls: Path | None = None, **bounds: Any) -> HttpServer:
        files: dict[str, Any] = {}
        if tls is not None:
            files = {
                "tls_certificate_file": tls / "server.pem",
                "tls_key_file": tls / "server.key",
            }
        server = HttpServer(
            ServerConfig(**files),
            application,
            setting="QFLARE_DASHBOARD",
            address=("127.0.0.1", 0),
            has_tls=tls is not None,
            bounds=Bounds(**bounds),
        )
        server.start()
        running.append(server)
        return server

    yield start
    for server in running:
        server.stop()


@contextmanager
def connected(port: int, count: int, source: str = "127.0.0.1") -> Iterator[list[socket.socket]]:
    """Give open connections."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(max(soft, 4096), hard), hard))
    with ExitStack() as stack:
        stack.callback(resource.setrlimit, resource.RLIMIT_NOFILE, (soft, hard))
        yield [
            stack.enter_context(
                socket.create_connection(("127.0.0.1", port), WAIT_S, source_address=(source, 0))
            )
            for _ in range(count)
        ]


def is_ended(connection: socket.socket) -> bool:
    """Wait until a connection was ended by its peer; False if it was not in time."""
    connection.settimeout(WAIT_S)
    try:
        while connection.recv(65_536):
            pass
    except TimeoutError:
        return False
    except OSError:
        return True
    return True


def receive_all(connection: socket.socket) -> int:
    """Return the count of bytes that come before the end."""
    received = 0
    with contextlib.suppress(ConnectionResetError):
        while data := connection.recv(65_536):
            received += len(data)
    return received


def is_open(connection: socket.socket) -> bool:
    """Return whether a connection is open and nothing has come."""
    return not select.select([connection], [], [], 0)[0]


def answer_s(url: str, context: ssl.SSLContext | None = None) -> float:
    """Return the seconds that a new visitor waits for an answer."""
    began = time.monotonic()
    with urllib.request.urlopen(url, timeout=WAIT_S, context=context) as response:
        assert response.status == HTTPStatus.OK
    return time.monotonic() - began


@pytest.mark.alone
@pytest.mark.parametrize("count", [120, 1000])
def test_idle_connections_hold_nobody_up_and_are_ended(serve: Serve, count: int) -> None:
    server = serve(header_s=1.0)
    thread_count = threading.active_count()
    with connected(server.port, count) as connections:
        assert max(answer_s(server.url) for _ in range(20)) < ANSWER_S
        assert threading.active_count() <= thread_count  # threads of earlier tests may end
        assert all(is_ended(connection) for connection in connections)
    assert answer_s(server.url) < ANSWER_S


@pytest.mark.alone
def test_idle_handshakes_hold_nobody_up_and_are_ended(serve: Serve, tmp_path: Path) -> None:
    assert main(["certificates", "make", "--output", str(tmp_path)]) == 0
    server = serve(tmp_path)
    trusted = ssl.create_default_context(cafile=str(tmp_path / "ca.pem"))
    url = server.url.replace("127.0.0.1", "localhost")
    with connected(server.port, 200) as connections:
        assert max(answer_s(url, trusted) for _ in range(5)) < ANSWER_S
        assert all(is_ended(connection) for connection in connections)


def drip(connection: socket.socket, data: bytes, every_s: float) -> bool:
    """Send a byte at a time; False once the peer has ended the connection."""
    for index in range(len(data)):
        try:
            connection.sendall(data[index : index + 1])
        except OSError:
            return False
        if select.select([connection], [], [], every_s)[0]:
            return False
    return True


def test_a_header_that_drips_is_ended(serve: Serve) -> None:
    server = serve(header_s=0.5)
    with connected(server.port, 1) as (connection,):
        assert not drip(connection, b"GET / HTTP/1.1\r\nX: " + b"y" * 1000, 0.05)


def test_a_second_header_that_drips_is_ended(serve: Serve) -> None:
    server = serve(header_s=0.5, keep_alive_s=10.0)
    with connected(server.port, 1) as (connection,):
        connection.sendall(REQUEST)
        while not connection.recv(65_536).endswith(b"xx"):
            pass
        assert not drip(connection, b"GET / HTTP/1.1\r\nX: " + b"y" * 1000, 0.05)


def test_a_connection_without_a_next_request_is_ended(serve: Serve) -> None:
    server = serve(keep_alive_s=0.3)
    with connected(server.port, 1) as (connection,):
        connection.sendall(REQUEST)
        assert is_ended(connection)


def test_a_connection_serves_one_request_after_the_other(serve: Serve) -> None:
    server = serve()
    with connected(server.port, 1) as (connection,):
        connection.sendall(3 * REQUEST)
        received = b""
        while received.count(b"200 OK") < 3:
            received += connection.recv(65_536)


def test_a_body_that_drips_is_ended(serve: Serve) -> None:
    server = serve(exchange_s=0.5)
    with connected(server.port, 1) as (connection,):
        connection.sendall(b"POST / HTTP/1.1\r\nHost: localhost\r\nContent-Length: 1000\r\n\r\n")
        assert not drip(connection, b"x" * 1000, 0.05)


def test_an_answer_that_is_not_read_is_ended(serve: Serve) -> None:
    server = serve(keep_alive_s=0.2, exchange_s=0.6)
    with connected(server.port, 1) as (connection,):
        connection.sendall(REQUEST.replace(b"GET /", b"GET /%d" % LARGE))
        PAUSE.wait(1.0)
        assert receive_all(connection) < LARGE


def test_an_answer_may_be_read_for_longer_than_a_connection_idles(serve: Serve) -> None:
    server = serve(keep_alive_s=0.1)
    with connected(server.port, 1) as (connection,):
        connection.sendall(REQUEST.replace(b"GET /", b"GET /%d" % LARGE))
        PAUSE.wait(0.5)
        assert receive_all(connection) > LARGE


def test_too_many_connections_end_the_oldest_of_whoever_has_most(serve: Serve) -> None:
    server = serve(max_count=20, max_of_peer=16, header_s=WAIT_S)
    with connected(server.port, 3, "127.0.0.2") as few, connected(server.port, 40) as many:
        assert all(is_ended(connection) for connection in many[:20])
        assert [is_open(connection) for connection in few] == [True] * 3
        assert answer_s(server.url) < ANSWER_S


def test_a_request_under_way_outlives_idle_connections(serve: Serve) -> None:
    server = serve(max_of_peer=4, header_s=WAIT_S)
    with connected(server.port, 1) as (connection,):
        connection.sendall(b"POST / HTTP/1.1\r\nHost: localhost\r\nContent-Length: 2\r\n\r\nx")
        assert answer_s(server.url) < ANSWER_S
        with connected(server.port, 20) as idle:
            assert is_ended(idle[0])
            connection.sendall(b"y")
            assert connection.recv(65_536).startswith(b"HTTP/1.1 200")
