"""Connection to the coordinator: channel, single attempts, and conversion of gRPC errors.

Invariants: no gRPC exception leaves this module; plaintext is used only on loopback, unless the caller permits it;
every attempt has a deadline (a deadline in the service config is broken in Python, grpc/grpc#40633, so it is set per
call); gRPC's own retries are off, because a streaming call must be retried with a new iterator (see
`qflare_client.rpc.retry`).

It does not retry, authenticate or verify.
"""

import os
import re
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any, Final, TypeAlias, TypeVar

import grpc
from google.protobuf import any_pb2
from google.protobuf.message import DecodeError
from google.rpc import error_details_pb2, status_pb2

from qflare.addresses import is_loopback
from qflare.v1.coordinator_service_pb2_grpc import CoordinatorServiceStub
from qflare_client import arguments
from qflare_client.errors import (
    ForkedError,
    ProxyRefusedError,
    QflareClientError,
    TlsError,
    UnavailableError,
    error_from_answer,
)
from qflare_client.rpc.diagnosis import endpoint, refusal
from qflare_client.rpc.lifetime import TICK_S, Bounds, Lifetime
from qflare_client.rpc.tls import Tls
from qflare_client.rpc.tracing import trace_metadata
from qflare_client.times import delay_s

Metadata: TypeAlias = tuple[tuple[str, str | bytes], ...]
Q = TypeVar("Q")
R = TypeVar("R")

MAX_MESSAGE_BYTES = 16 * 2**20
"""Largest accepted message: a header with the chunk digests of 256 GiB, or about a thousand statements."""

_DETAILS_KEY = "grpc-status-details-bin"

_TLS_FAULTS: Final = {
    "CERTIFICATE_VERIFY_FAILED": "the coordinator's certificate is not from a trusted authority, or has expired",
    "Hostname Verification Check failed": "the coordinator's certificate is for another name",
    "WRONG_VERSION_NUMBER": "the coordinator does not speak TLS at this address",
    "Failed to create security handshaker": "the certificates or the key of this device cannot be used",
}
"""gRPC's error texts for TLS handshakes that fail permanently, and their meanings."""

_CLOSED: Final = re.compile(
    r"Socket closed|Connection reset|Broken pipe|failed to connect to all addresses"
)
"""gRPC's error texts for a connection that the other side may have closed instead of a TLS handshake."""

_HTTP_REFUSAL: Final = re.compile(r"http2 header with status: (4\d\d)")
"""gRPC's error text for a response that is not gRPC, such as a proxy's."""

_TOO_LARGE: Final = "413"

_CHANNEL_OPTIONS: tuple[tuple[str, int], ...] = (
    ("grpc.enable_retries", 0),
    ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
    ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
    # One ping per minute detects a dead connection during a stream. Pings without a call would only wake radios, and
    # servers with default settings would close the connection because of them.
    ("grpc.keepalive_time_ms", 60_000),
    ("grpc.keepalive_timeout_ms", 20_000),
    ("grpc.keepalive_permit_without_calls", 0),
    # Reconnects to a restarted coordinator within a second; the default backoff grows to two minutes.
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.min_reconnect_backoff_ms", 1_000),
    ("grpc.max_reconnect_backoff_ms", 2_000),
    # Clients in one process would otherwise share one connection and its flow control.
    ("grpc.use_local_subchannel_pool", 1),
)


class Transport:
    """One channel to the coordinator. Thread-safe. Connects at the first call.

    Attributes:
        lifetime: Deadline and cancellation of the calls.

    Args:
        address: host:port, unix:path, or ipv4:IP:PORT,IP:PORT for several coordinators on one database, of which the
            first that responds is used until its connection breaks.
        tls: TLS settings. None means TLS with the system's certificates, or plaintext if the address is on this
            machine.
        insecure: Use plaintext with any address, on a network that protects the connection itself.
        timeout_s: Deadline of one attempt of a unary call, in seconds, above 0.
        transfer_timeout_s: Deadline of one attempt of a stream, in seconds, above 0.

    Raises:
        InvalidArgumentError: An argument cannot be used.
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
        self.address = arguments.address(address)
        self.timeout_s = arguments.positive("timeout_s", timeout_s)
        self.transfer_timeout_s = arguments.positive("transfer_timeout_s", transfer_timeout_s)
        self.lifetime = Lifetime()
        self._process_id = os.getpid()
        self._tls = None if insecure or (tls is None and is_loopback(address)) else tls or Tls()
        self._channel = _open_channel(address, self._tls)
        self.stub = CoordinatorServiceStub(self._channel)

    @property
    def channel(self) -> grpc.Channel:
        """Channel for stubs of other services."""
        return self._channel

    def close(self) -> None:
        """Close the channel; calls in progress end with `UnavailableError`."""
        self.lifetime.close()
        if os.getpid() == self._process_id:
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
            QflareClientError: The call failed.
        """
        options = {"timeout": _deadline_s(timeout_s, self.timeout_s), "metadata": _traced(metadata)}
        with self._translated():
            answer: R = self._answer(method, request, options)
        return answer

    def send(
        self,
        method: "grpc.StreamUnaryMultiCallable[Q, R]",
        requests: Iterator[Q],
        *,
        metadata: Metadata = (),
        timeout_s: float | None = None,
    ) -> R:
        """Make one attempt of a client stream; it consumes the iterator.

        Raises:
            QflareClientError: The call failed.
        """
        deadline_s = _deadline_s(timeout_s, self.transfer_timeout_s)
        options = {"timeout": deadline_s, "metadata": _traced(metadata)}
        with self._translated(resumable=True):
            answer: R = self._answer(method, requests, options)
        return answer

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
            QflareClientError: While iterating: the call failed.
        """
        deadline_s = _deadline_s(timeout_s, self.transfer_timeout_s)
        with self._translated(resumable=True):
            call = method(request, timeout=deadline_s, metadata=_traced(metadata))
            try:
                with _cancelled_in_time(call, self.lifetime.bounds):
                    yield from call
            finally:
                call.cancel()

    def _answer(self, method: Any, requests: Any, options: dict[str, Any]) -> Any:
        """Wait for the response of a call; a call made in a loop can be canceled."""
        bounds = self.lifetime.bounds
        if bounds is None or bounds.stop is None:
            return method(requests, **options)
        call = method.future(requests, **options)
        try:
            while not bounds.is_over:
                try:
                    return call.result(timeout=TICK_S)
                except grpc.FutureTimeoutError:
                    continue
        finally:
            call.cancel()  # no effect on a finished call
        raise UnavailableError("the loop was told to stop", reason="STOPPED")

    @contextmanager
    def _translated(self, *, resumable: bool = False) -> Iterator[None]:
        """Convert gRPC exceptions into errors of this SDK.

        Args:
            resumable: Whether a retry of the call resumes where it stopped.
        """
        if os.getpid() != self._process_id:
            raise ForkedError
        self._require_open()
        try:
            yield
        except grpc.RpcError as error:
            self._require_admission(error)
            raise _translate(error, resumable=resumable) from None
        except ValueError:
            self._require_open()  # gRPC raises this if the channel was closed meanwhile
            raise

    def _require_admission(self, error: Any) -> None:
        """Refuse to go on if the coordinator closes connections because of their certificate, or for want of TLS."""
        text = error.details() or ""
        where = endpoint(self.address)
        is_closed = error.code() is grpc.StatusCode.UNAVAILABLE and _CLOSED.search(text)
        wait = self.lifetime.wait
        reason = refusal(*where, self._tls, wait) if is_closed and where else None
        if reason:
            raise TlsError(f"TLS: {reason} ({text})") from None

    def _require_open(self) -> None:
        if self.lifetime.is_closed:
            raise UnavailableError("the client is closed", reason="CLOSED") from None


@contextmanager
def _cancelled_in_time(call: Any, bounds: Bounds | None) -> Iterator[None]:
    """Cancel a stream from another thread when the loop that reads it is stopped."""
    if bounds is None or bounds.stop is None:
        yield
        return
    done = threading.Event()

    def watch() -> None:
        while not done.wait(TICK_S):
            if bounds.is_over:
                call.cancel()
                return

    thread = threading.Thread(target=watch, name="qflare-stop", daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()


def _deadline_s(timeout_s: float | None, default_s: float) -> float:
    return default_s if timeout_s is None else arguments.positive("timeout_s", timeout_s)


def _traced(metadata: Metadata) -> Metadata:
    return (*metadata, *trace_metadata())


def _translate(error: Any, *, resumable: bool) -> QflareClientError:
    text = error.details() or "no details"
    refused = _refused_on_the_way(text)
    if refused is not None:
        return refused
    info, retry, request = _unpacked(error.trailing_metadata() or ())
    return error_from_answer(
        code=error.code().name,
        message=text,
        reason=info.reason,
        metadata=dict(info.metadata),
        retry_after_s=None if retry is None else delay_s(retry.retry_delay),
        request_id=request.request_id,
        resumable=resumable,
    )


def _refused_on_the_way(text: str) -> QflareClientError | None:
    """Return the error of a call that never reached the coordinator, and never will."""
    for sign, meaning in _TLS_FAULTS.items():
        if sign in text:
            return TlsError(f"TLS: {meaning} ({text})")
    refusal = _HTTP_REFUSAL.search(text)
    if refusal is None:
        return None
    status = refusal[1]
    hint = ": raise its limit on request bodies" if status == _TOO_LARGE else ""
    return ProxyRefusedError(
        f"a proxy in front of the coordinator answers HTTP status {status}{hint}",
        reason=f"HTTP_{status}",
    )


def _unpacked(
    metadata: Iterable[tuple[str, str | bytes]],
) -> tuple[
    error_details_pb2.ErrorInfo, error_details_pb2.RetryInfo | None, error_details_pb2.RequestInfo
]:
    """Return the details of a status; malformed details count as absent."""
    info, request = error_details_pb2.ErrorInfo(), error_details_pb2.RequestInfo()
    retry: error_details_pb2.RetryInfo | None = None
    found = error_details_pb2.RetryInfo()
    try:
        for detail in _details(metadata):
            if detail.Unpack(found):
                retry = found
            elif not detail.Unpack(info):
                detail.Unpack(request)
    except DecodeError:
        pass
    return info, retry, request


def _details(metadata: Iterable[tuple[str, str | bytes]]) -> Iterable[any_pb2.Any]:
    for key, value in metadata:
        if key == _DETAILS_KEY and isinstance(value, bytes):
            yield from status_pb2.Status.FromString(value).details


def _open_channel(address: str, tls: Tls | None) -> grpc.Channel:
    options: list[tuple[str, str | int]] = [*_CHANNEL_OPTIONS, *proxy_options(address)]
    if tls is None:
        return grpc.insecure_channel(address, options=options)
    credentials = grpc.ssl_channel_credentials(
        tls.certificate_authorities, tls.private_key, tls.certificate_chain
    )
    if tls.server_name:
        options.append(("grpc.ssl_target_name_override", tls.server_name))
    return grpc.secure_channel(address, credentials, options=options)


def proxy_options(address: str) -> list[tuple[str, int]]:
    """Return channel options that bypass the environment's proxy for addresses on this machine."""
    return [("grpc.enable_http_proxy", 0)] if is_loopback(address) else []
