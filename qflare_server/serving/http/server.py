"""Serves an ASGI application over HTTP from a thread of the coordinator's process."""

import functools
import logging
import math
import socket
import ssl
import threading
from typing import Any, Final

import uvicorn

from qflare_server.config import ConfigError, ServerConfig
from qflare_server.serving.http.connections import Bounds, Connections, Listener, TimedProtocol
from qflare_server.serving.http.hosts import Application

logger = logging.getLogger(__name__)

BACKLOG: Final = 128
MAX_HEADER_BYTES: Final = 16_384
LOOK_S: Final = 2
STOP_S: Final = 3


class HttpServer:
    """An HTTP server; bound when it is made, serving between `start` and `stop`.

    Args:
        config: Names the TLS files.
        app: What it serves.
        setting: Name of the setting that holds the address, for errors.
        address: Host and port; port 0 takes a free one.
        has_tls: Serve TLS 1.3 with the certificate of the gRPC server.
        bounds: Of its connections.

    Raises:
        ConfigError: The address cannot be bound, or the TLS files cannot be read.
    """

    def __init__(
        self,
        config: ServerConfig,
        app: Application,
        *,
        setting: str,
        address: tuple[str, int],
        has_tls: bool,
        bounds: Bounds = Bounds(),  # noqa: B008  # immutable
    ) -> None:
        self._config = config
        self._context = _tls(config, setting) if has_tls else None
        self._stamp = self._look()
        connections = Connections(bounds)
        self._server = uvicorn.Server(self._settings(app, connections))
        self._socket = Listener(_bind(setting, *address), connections)
        self._thread: threading.Thread | None = None

    def _settings(self, app: Application, connections: Connections) -> uvicorn.Config:
        context = self._context
        protocol: Any = functools.partial(TimedProtocol, connections)
        return uvicorn.Config(
            app,
            loop="qflare_server.serving.http.connections:Loop",
            http=protocol,
            ws="none",
            interface="asgi3",
            lifespan="off",
            log_config=None,
            log_level="error",
            access_log=False,
            proxy_headers=False,
            server_header=False,
            backlog=BACKLOG,
            timeout_keep_alive=max(1, math.ceil(connections.bounds.keep_alive_s)),
            h11_max_incomplete_event_size=MAX_HEADER_BYTES,
            timeout_graceful_shutdown=STOP_S,
            timeout_notify=LOOK_S,
            callback_notify=self._reload,
            ssl_context_factory=None if context is None else lambda *_: context,
        )

    @property
    def port(self) -> int:
        """The port that it is bound to."""
        return int(self._socket.getsockname()[1])

    @property
    def url(self) -> str:
        """URL for browsers on this machine."""
        host, port = self._socket.getsockname()[:2]
        host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)  # noqa: S104
        scheme = "https" if self._context is not None else "http"
        return f"{scheme}://{f'[{host}]' if ':' in host else host}:{port}/"

    def start(self) -> None:
        """Serve."""
        self._thread = threading.Thread(
            target=self._server.run, args=([self._socket],), name="http", daemon=True
        )
        self._thread.start()

    def stop(self) -> None:
        """Finish running requests and stop serving."""
        self._server.should_exit = True
        if self._thread is not None:
            self._thread.join(2 * STOP_S)
        self._socket.close()

    def _look(self) -> list[int]:
        if self._context is None:
            return []
        files = (self._config.tls_certificate_file, self._config.tls_key_file)
        return [path.stat().st_mtime_ns for path in files if path is not None]

    async def _reload(self) -> None:
        """Reload the certificate if its files have changed; new connections use it."""
        if self._context is None:
            return
        try:
            stamp = self._look()
            if stamp != self._stamp:
                _load(self._context, self._config)
                self._stamp = stamp
        except OSError:
            logger.exception(
                "certificate files could not be reloaded; keeping the current certificate"
            )


def _bind(setting: str, host: str, port: int) -> socket.socket:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return socket.create_server((host, port), family=family)
    except OSError as error:
        raise ConfigError(
            f"{setting}: cannot bind {host}:{port}: {error.strerror or error}",
            remedy="stop what listens there, or choose another address of this machine",
        ) from error


def _tls(config: ServerConfig, setting: str) -> ssl.SSLContext:
    """Return a TLS 1.3 context that requires client certificates if the gRPC server does."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    context.set_alpn_protocols(["http/1.1"])
    try:
        _load(context, config)
        if config.tls_client_ca_file is not None:
            context.load_verify_locations(config.tls_client_ca_file)
            context.verify_mode = ssl.CERT_REQUIRED
    except OSError as error:
        raise ConfigError(f"{setting}: cannot read the TLS files: {error}") from error
    return context


def _load(context: ssl.SSLContext, config: ServerConfig) -> None:
    assert config.tls_certificate_file is not None
    context.load_cert_chain(config.tls_certificate_file, config.tls_key_file)
