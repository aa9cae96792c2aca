"""The connection to the coordinator: channel, single attempts, and errors without gRPC in them.

Invariants: no type of gRPC leaves this module in an exception; plaintext is spoken to the own machine
only, unless the caller insists; every attempt has a deadline (a deadline in the service config is
broken in Python, grpc/grpc#40633, so it is set per call); gRPC's own retries are off, since a streaming
call must be repeated with a fresh iterator (see `qflare_client.rpc.retry`).

What it does not do: repeat, authenticate or verify.
"""

import ipaddress
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Self, TypeAlias, TypeVar

import grpc
from google.protobuf import any_pb2
from google.protobuf.message import DecodeError
from google.rpc import error_details_pb2, status_pb2

from qflare.v1.coordinator_service_pb2_grpc import CoordinatorServiceStub
from qflare_client.errors import QflareClientError, UnavailableError, error_from_answer
from qflare_client.rpc.tracing import trace_metadata

Metadata: TypeAlias = tuple[tuple[str, str | bytes], ...]
Q = TypeVar("Q")
R = TypeVar("R")

MAX_MESSAGE_BYTES = 16 * 2**20
"""Largest message taken: a header with the chunk digests of 256 GiB, or some thousand statements."""

_DETAILS_KEY = "grpc-status-details-bin"

_CHANNEL_OPTIONS: tuple[tuple[str, int], ...] = (
    ("grpc.enable_retries", 0),
    ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
    ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
    # One ping a minute finds a dead connection in the middle of a stream. Pings without a call would only
    # wake radios, and servers with default settings would close the connection over them.
    ("grpc.keepalive_time_ms", 60_000),
    ("grpc.keepalive_timeout_ms", 20_000),
    ("grpc.keepalive_permit_without_calls", 0),
    # A restarted coordinator is found again in a second; the default backoff grows to two minutes.
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.min_reconnect_backoff_ms", 1_000),
    ("grpc.max_reconnect_backoff_ms", 2_000),
    # Clients in one process would otherwise share one connection, and its flow control.
    ("grpc.use_local_subchannel_pool", 1),
)


@dataclass(frozen=True)
class Tls:
    """How the coordinator proves its name, and this device its own where mutual TLS is asked for."""

    certificate_authorities: bytes | None = None
    """PEM certificates that vouch for the coordinator; None means those of the system."""

    certificate_chain: bytes | None = None
    """PEM certificate of this device with its issuers; None means no client certificate."""

    private_key: bytes | None = None
    """PEM key of that certificate."""

    server_name: str = ""
    """Name in the coordinator's certificate where it is not the address's; empty means the address's."""

    @classmethod
    def from_files(
        cls,
        ca_file: Path | None = None,
        certificate_file: Path | None = None,
        key_file: Path | None = None,
        server_name: str = "",
    ) -> Self:
        """Read the PEM files.

        Raises:
            OSError: A file cannot be read.
        """
        ca, chain, key = (
            path.read_bytes() if path else None for path in (ca_file, certificate_file, key_file)
        )
        return cls(ca, chain, key, server_name)


class Transport:
    """One channel to the coordinator. Thread-safe. Connects at the first call.

    Args:
        address: host:port, unix:path, or ipv4:IP:PORT,IP:PORT for several coordinators on one database, of which
            the first that answers is used until it goes.
        tls: How to speak TLS. None means TLS with the system's certificates, or plaintext when the
            address is on this machine.
        insecure: Speak plaintext to any address: for a network that protects the connection itself.
        timeout_s: Deadline of one attempt of a unary call, in seconds, above 0.
        transfer_timeout_s: Deadline of one attempt of a stream, in seconds, above 0.
    """

    def __init__(
        self,
        address: str,
        *,
        tls: Tls | None = None,
        insecure: bool = False,
        timeout_s: float = 30.0,
        transfer_timeout_s: float = 3600.0,
    ) -> None:
        self.address = address
        self.timeout_s = timeout_s
        self.transfer_timeout_s = transfer_timeout_s
        self._closed = False
        self._channel = _open_channel(address, tls, insecure=insecure)
        self.stub = CoordinatorServiceStub(self._channel)

    @property
    def channel(self) -> grpc.Channel:
        """The channel, for stubs of other services."""
        return self._channel

    def close(self) -> None:
        """Close the channel; calls in progress end with `UnavailableError`."""
        self._closed = True
        self._channel.close()

    def unary(
        self,
        method: "grpc.UnaryUnaryMultiCallable[Q, R]",
        request: Q,
        *,
        metadata: Metadata = (),
        timeout_s: float | None = None,
    ) -> R:
        """Make one attempt of a unary call.

        Raises:
            QflareClientError: What the coordinator answered, or that it did not.
        """
        with _Translated(self):
            return method(request, timeout=timeout_s or self.timeout_s, metadata=_traced(metadata))

    def send(
        self,
        method: "grpc.StreamUnaryMultiCallable[Q, R]",
        requests: Iterator[Q],
        *,
        metadata: Metadata = (),
        timeout_s: float | None = None,
    ) -> R:
        """Make one attempt of a client stream; the iterator is spent by it.

        Raises:
            QflareClientError: What the coordinator answered, or that it did not.
        """
        with _Translated(self):
            return method(
                requests, timeout=timeout_s or self.transfer_timeout_s, metadata=_traced(metadata)
            )

    def receive(
        self,
        method: "grpc.UnaryStreamMultiCallable[Q, R]",
        request: Q,
        *,
        metadata: Metadata = (),
        timeout_s: float | None = None,
    ) -> Iterator[R]:
        """Make one attempt of a server stream; closing the iterator cancels the call.

        Raises:
            QflareClientError: While iterating: what the coordinator answered, or that it did not.
        """
        with _Translated(self):
            call = method(
                request, timeout=timeout_s or self.transfer_timeout_s, metadata=_traced(metadata)
            )
            try:
                yield from call
            finally:
                call.cancel()


class _Translated:
    """Turns what gRPC raises into this SDK's errors."""

    def __init__(self, transport: Transport) -> None:
        self._transport = transport

    def __enter__(self) -> None:
        if self._transport._closed:  # noqa: SLF001  # its other half
            raise UnavailableError("the client is closed", reason="CLOSED")

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if isinstance(error, grpc.RpcError):
            raise _translate(error) from None
        if isinstance(error, ValueError) and self._transport._closed:  # noqa: SLF001
            raise UnavailableError("the client is closed", reason="CLOSED") from None


def _traced(metadata: Metadata) -> Metadata:
    return (*metadata, *trace_metadata())


def _translate(error: grpc.RpcError) -> QflareClientError:
    details = _details(error.trailing_metadata() or ())  # type: ignore[arg-type]
    info = error_details_pb2.ErrorInfo()
    retry = error_details_pb2.RetryInfo()
    request = error_details_pb2.RequestInfo()
    retry_after_s = None
    for detail in details:
        if detail.Unpack(retry):
            retry_after_s = retry.retry_delay.ToTimedelta().total_seconds()
        elif not detail.Unpack(info):
            detail.Unpack(request)
    return error_from_answer(
        code=error.code().name,
        message=error.details() or "no details",
        reason=info.reason,
        metadata=dict(info.metadata),
        retry_after_s=retry_after_s,
        request_id=request.request_id,
    )


def _details(metadata: Iterable[tuple[str, str | bytes]]) -> Iterable[any_pb2.Any]:
    for key, value in metadata:
        if key == _DETAILS_KEY and isinstance(value, bytes):
            try:
                yield from status_pb2.Status.FromString(value).details
            except DecodeError:
                return


def _open_channel(address: str, tls: Tls | None, *, insecure: bool) -> grpc.Channel:
    if insecure or (tls is None and is_loopback(address)):
        return grpc.insecure_channel(address, options=_CHANNEL_OPTIONS)
    tls = tls or Tls()
    credentials = grpc.ssl_channel_credentials(
        tls.certificate_authorities, tls.private_key, tls.certificate_chain
    )
    options: list[tuple[str, str | int]] = list(_CHANNEL_OPTIONS)
    if tls.server_name:
        options.append(("grpc.ssl_target_name_override", tls.server_name))
    return grpc.secure_channel(address, credentials, options=options)


def is_loopback(address: str) -> bool:
    """Return whether an address cannot leave this machine: host:port, unix:path, or several as ipv4:IP:PORT,IP:PORT."""
    if address.startswith(("unix:", "unix-abstract:")):
        return True
    if address.startswith(("ipv4:", "ipv6:")):
        return all(is_loopback(one) for one in address[5:].split(","))
    host = address.rpartition(":")[0].strip("[]")
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
