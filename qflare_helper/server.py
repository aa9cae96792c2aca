"""The gRPC server of a helper: its address, TLS, limits and health."""

import ssl
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import grpc

from qflare.addresses import MAX_PORT, is_loopback
from qflare_client.keystore.store import KeyStore
from qflare_helper.errors import StoreError
from qflare_helper.identity import HelperIdentity
from qflare_helper.ledger import Ledger
from qflare_helper.limits import MAX_STRANGERS, StallGuard
from qflare_helper.monitoring import HelperMetrics, MetricsServer, health_handler
from qflare_helper.policy import read_policy
from qflare_helper.service import HelperServicer, handlers
from qflare_helper.unmasking import Unmasking

MAX_MESSAGE_BYTES: Final = 4 * 2**20
SHORT_CALLS: Final = 8
"""Threads beyond those of `Unmask`: for health, `GetHelper` and refusals."""

MAX_CONNECTIONS: Final = 256
OPTIONS: Final = (
    ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
    ("grpc.max_metadata_size", 8_192),
    ("grpc.absolute_max_metadata_size", 8_192),
    ("grpc.max_concurrent_streams", 16),
    ("grpc.max_allowed_incoming_connections", MAX_CONNECTIONS),
    ("grpc.max_connection_idle_ms", 300_000),
    ("grpc.server_handshake_timeout_ms", 20_000),
    ("grpc.so_reuseport", 0),
    ("grpc.http2.min_recv_ping_interval_without_data_ms", 30_000),
    ("grpc.keepalive_time_ms", 120_000),
    ("grpc.keepalive_timeout_ms", 20_000),
)


@dataclass(frozen=True)
class ServerTls:
    """PEM certificate chain and key of a helper.

    Attributes:
        certificate_chain: The chain.
        private_key: Its key.
        client_authorities: Authorities of client certificates; None accepts clients without one.
    """

    certificate_chain: bytes
    private_key: bytes
    client_authorities: bytes | None = None

    def credentials(self) -> grpc.ServerCredentials:
        """Return the credentials of the server."""
        return grpc.ssl_server_credentials(
            [(self.private_key, self.certificate_chain)],
            self.client_authorities,
            self.client_authorities is not None,
        )


class HelperServer:
    """A helper that serves; `start` and `stop` once each.

    Args:
        store: Open key store of the helper.
        listen: Address, host:port; port 0 takes a free one.
        tls: Certificate and key; without, only loopback addresses are served.
        max_vector_bytes: Largest masked update.
        max_calls: Most verified requests in progress.
        metrics_listen: Address for Prometheus, host:port; None for no metrics.
        metrics_tls: Certificate and key of the metrics; None serves them without TLS.
        health_listen: Address of the health service without TLS; None for no separate one.

    Raises:
        StoreError: The keys or the ledger cannot be read, or the address cannot be served.
        PolicyError: The policy cannot be read.
    """

    def __init__(
        self,
        store: KeyStore,
        listen: str,
        tls: ServerTls | None = None,
        *,
        max_vector_bytes: int = 8 * 2**30,
        max_calls: int = 4,
        metrics_listen: str | None = None,
        metrics_tls: ssl.SSLContext | None = None,
        health_listen: str | None = None,
    ) -> None:
        self.identity = HelperIdentity.load(store)
        self.ledger = Ledger(store.home)
        read_policy(store.home)
        unmasking = Unmasking(self.identity, self.ledger, store.home, max_vector_bytes)
        self.metrics, self._guard = HelperMetrics(self.ledger), StallGuard()
        servicer = HelperServicer(
            self.identity, self.ledger, unmasking, self.metrics, self._guard, max_calls
        )
        count = max_calls + MAX_STRANGERS + SHORT_CALLS
        self._threads = ThreadPoolExecutor(count, "calls")
        self._server = grpc.server(
            self._threads, options=_options(OPTIONS), maximum_concurrent_rpcs=count
        )
        health = health_handler(self.ledger)
        self._server.add_generic_rpc_handlers((handlers(servicer), health))
        self.port = self._bind(listen, tls)
        self._probes = None if health_listen is None else _Probes(health_listen, health)
        self.health_port = 0 if self._probes is None else self._probes.port
        self._scraped = (
            None if metrics_listen is None else self._metrics_server(metrics_listen, metrics_tls)
        )
        self.metrics_port = 0 if self._scraped is None else self._scraped.port

    def _bind(self, listen: str, tls: ServerTls | None) -> int:
        if tls is None and not is_loopback(listen):
            raise StoreError(
                f"{listen} can be reached from outside: give a TLS certificate and key"
            )
        try:
            if tls is None:
                return int(self._server.add_insecure_port(listen))
            return int(self._server.add_secure_port(listen, tls.credentials()))
        except RuntimeError as error:
            raise StoreError(f"cannot serve on {listen}") from error

    def _metrics_server(self, listen: str, tls: ssl.SSLContext | None) -> MetricsServer:
        host, _, port = listen.rpartition(":")
        if not port.isdecimal() or int(port) > MAX_PORT:
            raise StoreError(f"metrics: got {listen[:200]}, want host:port")
        return MetricsServer(self.metrics, (host.strip("[]"), int(port)), tls)

    def start(self) -> None:
        """Serve."""
        self._guard.start()
        self._server.start()
        for part in (self._probes, self._scraped):
            if part is not None:
                part.start()

    def stop(self, grace_s: float = 10.0) -> None:
        """Refuse new calls, wait for the running ones, and end."""
        self._server.stop(grace_s).wait()
        self._threads.shutdown()
        self._guard.stop()
        for part in (self._probes, self._scraped):
            if part is not None:
                part.stop()


class _Probes:
    """The health service on a port of its own, without TLS, for probes that have no certificate."""

    def __init__(self, listen: str, health: grpc.GenericRpcHandler) -> None:
        self._threads = ThreadPoolExecutor(SHORT_CALLS, "probes")
        self._server = grpc.server(
            self._threads,
            [health],
            options=_options(OPTIONS),
            maximum_concurrent_rpcs=SHORT_CALLS,
        )
        try:
            self.port = int(self._server.add_insecure_port(listen))
        except RuntimeError as error:
            raise StoreError(f"cannot serve health on {listen}") from error

    def start(self) -> None:
        """Serve."""
        self._server.start()

    def stop(self) -> None:
        """End."""
        self._server.stop(None).wait()
        self._threads.shutdown()


def read_tls(
    certificate_file: Path | None, key_file: Path | None, client_ca_file: Path | None
) -> ServerTls | None:
    """Read the PEM files of a server; None without any.

    Raises:
        StoreError: One is missing or cannot be read.
    """
    if certificate_file is None and key_file is None and client_ca_file is None:
        return None
    if certificate_file is None or key_file is None:
        raise StoreError("TLS needs a certificate and a key")
    try:
        authorities = None if client_ca_file is None else client_ca_file.read_bytes()
        return ServerTls(certificate_file.read_bytes(), key_file.read_bytes(), authorities)
    except OSError as error:
        raise StoreError(f"cannot read {error.filename}: {error.strerror}") from error


def read_metrics_tls(
    certificate_file: Path | None, key_file: Path | None, client_ca_file: Path | None
) -> ssl.SSLContext:
    """Return TLS of the metrics from the PEM files of the server; clients need a certificate if it has authorities.

    Raises:
        StoreError: There are none, or one cannot be read.
    """
    if certificate_file is None or key_file is None:
        raise StoreError(
            "metrics over TLS need a certificate and a key: --tls-certificate, --tls-key"
        )
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    try:
        context.load_cert_chain(certificate_file, key_file, _no_passphrase)
        if client_ca_file is not None:
            context.load_verify_locations(client_ca_file)
            context.verify_mode = ssl.CERT_REQUIRED
    except (OSError, ValueError) as error:
        raise StoreError(f"cannot read the TLS files for metrics: {error}") from error
    return context


def _no_passphrase() -> str:
    """Give an encrypted key no passphrase, instead of letting the library ask on the terminal."""
    return ""


def _options(options: Sequence[tuple[str, int]]) -> list[tuple[str, int]]:
    return list(options)
