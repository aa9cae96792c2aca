"""Diagnosis of refused connections: whatever the peer does, no socket of it stays open."""

import contextlib
import gc
import socket
import struct
import threading
import warnings
from collections.abc import Callable

import pytest

from qflare_client import Tls
from qflare_client.rpc.diagnosis import refusal

RESET = struct.pack("ii", 1, 0)  # linger for no time: closing sends a reset


def reset(connection: socket.socket) -> None:
    """Reset a connection that was just accepted."""
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET)
    connection.close()


def reset_later(connection: socket.socket) -> None:
    """Reset a connection after the first bytes of the handshake."""
    with contextlib.suppress(OSError):
        connection.recv(64)
    reset(connection)


def close(connection: socket.socket) -> None:
    """Close a connection at once."""
    connection.close()


def answer_with_garbage(connection: socket.socket) -> None:
    """Answer a handshake with bytes that are no TLS record."""
    with connection, contextlib.suppress(OSError):
        connection.recv(64)
        connection.sendall(b"HTTP/1.1 400 Bad Request\\r\\n\\r\\n")


@pytest.mark.parametrize("tls", [None, Tls(None)], ids=["plaintext", "tls"])
@pytest.mark.parametrize("behavior", [reset, reset_later, close, answer_with_garbage])
def test_no_connection_stays_open(
    behavior: Callable[[socket.socket], None], tls: Tls | None
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port: int = listener.getsockname()[1]

        def serve() -> None:
            with contextlib.suppress(OSError):
                while True:
                    behavior(listener.accept()[0])

        server = threading.Thread(target=serve)
        server.start()
        try:
            with warnings.catch_warnings(record=True) as seen:
                warnings.simplefilter("always", ResourceWarning)
                for _ in range(120 if behavior is reset else 10):
                    refusal("127.0.0.1", port, tls, lambda _: False)
                gc.collect()
        finally:
            listener.shutdown(socket.SHUT_RDWR)
            server.join()
    assert [str(warning.message) for warning in seen] == []


@pytest.mark.parametrize(("host", "port"), [("127.0.0.1", 70_000), ("a" * 64 + ".invalid", 443)])
def test_an_address_that_cannot_be_used_has_no_diagnosis(host: str, port: int) -> None:
    assert refusal(host, port, Tls(None), lambda _: False) is None
