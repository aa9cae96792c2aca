"""Peers that speak HTTP/2 and are no coordinator: one refuses every request, as nginx does, one ends the connection."""

import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

import h2.config
import h2.connection
import h2.events
import h2.exceptions


@contextmanager
def refusing_proxy(status: int) -> Iterator[str]:
    """Yield the address of a proxy that answers every request with a status and a page."""

    def refuse(http: h2.connection.H2Connection, stream_id: int) -> None:
        headers = [(":status", str(status)), ("content-type", "text/html")]
        http.send_headers(stream_id, headers)
        http.send_data(stream_id, b"<html>refused</html>", end_stream=True)

    with _serving(refuse) as address:
        yield address


@contextmanager
def ending_peer(farewell: bytes) -> Iterator[str]:
    """Yield the address of a peer that ends the connection at every request, and says so with its own words."""

    def end(http: h2.connection.H2Connection, _stream_id: int) -> None:
        http.close_connection(error_code=2, additional_data=farewell)

    with _serving(end) as address:
        yield address


@contextmanager
def _serving(answer: Callable[[h2.connection.H2Connection, int], None]) -> Iterator[str]:
    listener = socket.create_server(("127.0.0.1", 0))

    def serve() -> None:
        while True:
            try:
                connection, _ = listener.accept()
            except OSError:
                return
            threading.Thread(target=_speak, args=(connection, answer), daemon=True).start()

    thread = threading.Thread(target=serve, daemon=True)
    thread.start()
    yield f"127.0.0.1:{listener.getsockname()[1]}"
    listener.shutdown(socket.SHUT_RDWR)
    listener.close()
    thread.join()


def _speak(
    connection: socket.socket, answer: Callable[[h2.connection.H2Connection, int], None]
) -> None:
    http = h2.connection.H2Connection(h2.config.H2Configuration(client_side=False))
    http.initiate_connection()
    with connection, suppress(OSError, h2.exceptions.ProtocolError):
        connection.sendall(http.data_to_send())
        while data := connection.recv(65_536):
            for event in http.receive_data(data):
                if isinstance(event, h2.events.RequestReceived):
                    answer(http, event.stream_id)
            connection.sendall(http.data_to_send())
