"""A proxy that refuses every request with an HTTP status, as nginx does with bodies that it finds too large."""

import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress

import h2.config
import h2.connection
import h2.events


@contextmanager
def refusing_proxy(status: int) -> Iterator[str]:
    """Yield the address of a proxy that answers every request with a status and a page."""
    listener = socket.create_server(("127.0.0.1", 0))

    def serve() -> None:
        while True:
            try:
                connection, _ = listener.accept()
            except OSError:
                return
            threading.Thread(target=_refuse, args=(connection, status), daemon=True).start()

    thread = threading.Thread(target=serve, daemon=True)
    thread.start()
    yield f"127.0.0.1:{listener.getsockname()[1]}"
    listener.shutdown(socket.SHUT_RDWR)
    listener.close()
    thread.join()


def _refuse(connection: socket.socket, status: int) -> None:
    http = h2.connection.H2Connection(h2.config.H2Configuration(client_side=False))
    http.initiate_connection()
    with connection, suppress(OSError):
        connection.sendall(http.data_to_send())
        while data := connection.recv(65_536):
            for event in http.receive_data(data):
                if isinstance(event, h2.events.RequestReceived):
                    headers = [(":status", str(status)), ("content-type", "text/html")]
                    http.send_headers(event.stream_id, headers)
                    http.send_data(event.stream_id, b"<html>refused</html>", end_stream=True)
            connection.sendall(http.data_to_send())
