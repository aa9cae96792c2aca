"""A caller that sends a message to a method and lets the coordinator send no byte of an answer."""

import socket
from typing import Final

import h2.config
import h2.connection
import h2.settings

TIMEOUT_S: Final = 10.0


def silent_reader(address: str, path: str, message: bytes) -> socket.socket:
    """Call a method without TLS, with a flow control window of nothing, and return the open connection.

    Args:
        address: Host and port of the coordinator.
        path: Path of the method.
        message: The request; its stream stays open.
    """
    host, _, port = address.rpartition(":")
    http = h2.connection.H2Connection(h2.config.H2Configuration(client_side=True))
    http.local_settings = h2.settings.Settings(
        client=True, initial_values={h2.settings.SettingCodes.INITIAL_WINDOW_SIZE: 0}
    )
    http.initiate_connection()
    headers = [
        (":method", "POST"),
        (":scheme", "http"),
        (":path", path),
        (":authority", "coordinator"),
        ("content-type", "application/grpc"),
        ("te", "trailers"),
    ]
    http.send_headers(1, headers)
    http.send_data(1, b"\0" + len(message).to_bytes(4, "big") + message)
    connection = socket.create_connection((host, int(port)), timeout=TIMEOUT_S)
    connection.sendall(http.data_to_send())
    return connection
