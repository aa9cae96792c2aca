"""The gRPC server of a helper: its address, TLS, limits and health."""

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import grpc

from qflare.addresses import is_loopback
from qflare_client.keystore.store import KeyStore
from qflare_helper.errors import StoreError
from qflare_helper.identity import HelperIdentity
from qflare_helper.ledger import Ledger
from qflare_helper.policy import read_policy
from qflare_helper.service import HelperServicer, handlers
from qflare_helper.unmasking import Unmasking

MAX_MESSAGE_BYTES: Final = 4 * 2**20
THREADS: Final = 8
OPTIONS: Final = (
    ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
    ("grpc.max_concurrent_streams", 16),
    ("grpc.so_reuseport", 0),
    ("grpc.http2.min_recv_ping_interval_without_data_ms", 30_000),
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
        max_calls: Most requests in progress.

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
    ) -> None:
        self.identity = HelperIdentity.load(store)
        self.ledger = Ledger(store.home)
        read_policy(store.home)
        unmasking = Unmasking(self.identity, self.ledger, store.home, max_vector_bytes)
        servicer = HelperServicer(self.identity, self.ledger, unmasking, max_calls)
        self._threads = ThreadPoolExecutor(THREADS, "calls")
        self._server = grpc.server(self._threads, options=_options(OPTIONS))
        self._server.add_generic_rpc_handlers((handlers(servicer),))
        self.port = self._bind(listen, tls)

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

    def start(self) -> None:
        """Serve."""
        self._server.start()

    def stop(self, grace_s: float = 10.0) -> None:
        """Refuse new calls, wait for the running ones, and end."""
        self._server.stop(grace_s).wait()
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


def _options(options: Sequence[tuple[str, int]]) -> list[tuple[str, int]]:
    return list(options)
