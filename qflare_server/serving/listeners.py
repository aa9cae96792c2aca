"""Listening addresses of the gRPC servers, and the plaintext port of the health service.

A port that cannot be bound is a configuration error that names the setting and the reason. `HealthListener` serves only
`grpc.health.v1`, for probes without TLS or without a client certificate.
"""

import os
import socket
from pathlib import Path
from typing import Final
from urllib.parse import unquote

import grpc
from grpc_health.v1 import health_pb2_grpc

from qflare_server.config import UNIX_SOCKETS, ConfigError, ServerConfig
from qflare_server.serving.rpc.dispatcher import Dispatcher
from qflare_server.serving.rpc.health import HealthService
from qflare_server.serving.rpc.limits import channel_options
from qflare_server.serving.rpc.validation import RequestValidation

_MAX_REQUEST_BYTES: Final = 4096
MAX_SOCKET_PATH_BYTES: Final = 107
"""Longest path of a Unix socket on Linux, without the final NUL byte."""


def bind(
    server: grpc.Server,
    setting: str,
    address: str,
    credentials: grpc.ServerCredentials | None = None,
) -> int:
    """Bind a server to an address, with TLS if there are credentials; return the port.

    Raises:
        ConfigError: The address cannot be bound; states the setting and the reason.
    """
    if address.startswith("unix:"):
        _require_free_socket(setting, address)
    try:
        if credentials is None:
            port = server.add_insecure_port(address)
        else:
            port = server.add_secure_port(address, credentials)
    except RuntimeError as error:
        raise _cannot_bind(setting, address, _reason(address)) from error
    if not port:
        raise _cannot_bind(setting, address, _reason(address))
    return int(port)


def _cannot_bind(setting: str, address: str, reason: str) -> ConfigError:
    return ConfigError(
        f"{setting}: cannot bind {address}: {reason}",
        remedy="stop what listens there, or choose another address of this machine",
    )


def _socket_path(address: str) -> Path:
    """Return the path of a `unix:` address, as gRPC reads it: percent-decoded, with or without `//`."""
    name = address.removeprefix("unix:")
    return Path(unquote(name.removeprefix("//") if name.startswith("///") else name))


def _require_free_socket(setting: str, address: str) -> None:
    """Refuse a socket on which a program listens; gRPC would remove it and take its place without a word.

    Raises:
        ConfigError: Another program listens there.
    """
    with socket.socket(socket.AF_UNIX) as probe:
        try:
            probe.connect(str(_socket_path(address)))
        except (OSError, ValueError):
            return
    raise _cannot_bind(setting, address, "another program listens there")


def _reason_of_socket(path: Path) -> str:
    length = len(os.fsencode(path))
    if length > MAX_SOCKET_PATH_BYTES:
        return f"its path has {length} bytes, want at most {MAX_SOCKET_PATH_BYTES}"
    if path.exists() and not path.is_socket():
        return "a file that is no socket is in the way"
    return "its folder is missing or not writable"


def _reason(address: str) -> str:
    """Return the reason why an address cannot be bound, which gRPC does not report."""
    if address.startswith("unix:"):
        return _reason_of_socket(_socket_path(address))
    if address.startswith(UNIX_SOCKETS):
        return "the name is in use or too long"
    host, _, port = address.rpartition(":")
    try:
        found = socket.getaddrinfo(
            host.strip("[]"), int(port), type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )
        for family, kind, protocol, _, target in found:
            with socket.socket(family, kind, protocol) as held:
                held.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                held.bind(target)
    except (OSError, ValueError, OverflowError) as error:
        return str(getattr(error, "strerror", None) or error)
    return "the address is in use or not of this machine"


class HealthListener:
    """The health service on a separate plaintext port.

    Args:
        config: `health_listen` and `workers`.
        servicer: The health service of the gRPC port.
        dispatcher: Call dispatcher of the gRPC port.
        boundary: Call interceptor of the gRPC port.

    Raises:
        ConfigError: The address cannot be bound.
    """

    def __init__(
        self,
        config: ServerConfig,
        servicer: HealthService,
        dispatcher: Dispatcher,
        boundary: grpc.ServerInterceptor,
    ) -> None:
        options = {**channel_options(config), "grpc.max_receive_message_length": _MAX_REQUEST_BYTES}
        self._server = grpc.server(
            dispatcher,  # type: ignore[arg-type]  # gRPC calls its `submit`, no more
            interceptors=[boundary, RequestValidation()],
            options=list(options.items()),
        )
        health_pb2_grpc.add_HealthServicer_to_server(servicer, self._server)
        self.port = bind(self._server, "QFLARE_HEALTH_LISTEN", config.health_listen)

    def start(self) -> None:
        """Serve."""
        self._server.start()

    def stop(self) -> None:
        """Close the port and every connection."""
        self._server.stop(None).wait()
