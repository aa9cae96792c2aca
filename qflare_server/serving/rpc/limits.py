"""Limits of connections and streams: their number, and the time without progress."""

from __future__ import annotations

import resource
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Final

import grpc

from qflare_server import errors
from qflare_server.config import ServerConfig

MAX_PENDING: Final = 1000
"""Calls of one method that may wait inside gRPC; beyond it gRPC cancels some calls, and beyond twice the number all."""
MAX_ANSWER_BYTES: Final = 4 * 2**20
"""Longest message that a gRPC peer takes by default; no answer is longer, whatever it is about."""
MAX_METADATA_BYTES: Final = 16_384
"""Largest metadata of a call as HPACK counts it: 32 bytes for each entry beside names and values."""
MAX_PING_STRIKES: Final = 2
HANDSHAKE_S: Final = 10
RESERVED_FILES: Final = 256
"""File descriptors that the process needs besides its connections: databases, pages, logs."""
LEAST_CONNECTIONS: Final = 64
MILLISECONDS: Final = 1000


def channel_options(config: ServerConfig) -> dict[str, int]:
    """Return the gRPC server options that limit each connection and all connections together.

    Names and meanings are in grpc/impl/channel_arg_names.h of grpc.
    """
    return {
        "grpc.max_receive_message_length": config.max_message_bytes,
        "grpc.max_send_message_length": max(config.max_message_bytes, MAX_ANSWER_BYTES),
        # between the soft and the absolute limit, gRPC refuses calls at random: make them one
        "grpc.max_metadata_size": MAX_METADATA_BYTES,
        "grpc.absolute_max_metadata_size": MAX_METADATA_BYTES,
        "grpc.so_reuseport": 1 if config.workers > 1 else 0,
        "grpc.max_concurrent_streams": config.max_streams_per_connection,
        "grpc.max_allowed_incoming_connections": connection_bound(config),
        "grpc.max_connection_idle_ms": round(config.idle_connection_s * MILLISECONDS),
        "grpc.max_connection_age_ms": round(config.connection_age_s * MILLISECONDS),
        "grpc.server_handshake_timeout_ms": HANDSHAKE_S * MILLISECONDS,
        "grpc.server.max_pending_requests": MAX_PENDING,
        "grpc.server.max_pending_requests_hard_limit": 2 * MAX_PENDING,
        "grpc.http2.min_ping_interval_without_data_ms": 10_000,
        "grpc.http2.max_ping_strikes": MAX_PING_STRIKES,
        "grpc.keepalive_time_ms": 120_000,
        "grpc.keepalive_timeout_ms": 20_000,
        "grpc.keepalive_permit_without_calls": 1,
    }


def raise_file_limit() -> None:
    """Raise the open-file limit of this process to its hard limit; shells and service managers default to 1024."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != hard:
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def connection_bound(config: ServerConfig) -> int:
    """Return the connection limit that leaves enough file descriptors to handle the connections."""
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == resource.RLIM_INFINITY:
        return config.max_connections
    return min(config.max_connections, max(LEAST_CONNECTIONS, soft - RESERVED_FILES))


class StreamLimits:
    """Limits of concurrent streams per caller and of watchers; thread-safe.

    The number of concurrent large payloads is limited by the transfer slots; a small payload needs no slot.
    """

    def __init__(self, config: ServerConfig) -> None:
        self._lock = threading.Lock()
        self._max_watchers = config.max_watchers
        self._per_caller = config.max_streams_per_device
        self._counts: Counter[str] = Counter()

    def take(self, direction: str, caller: str) -> None:
        """Acquire a slot for a stream; `release` returns it.

        Raises:
            TooManyRequestsError: No slot is free.
        """
        with self._lock:
            if direction == "watch" and self._counts[direction] >= self._max_watchers:
                raise errors.TooManyRequestsError("too many watchers at once", retry_after_s=5.0)
            if self._counts[caller] >= self._per_caller:
                raise errors.TooManyRequestsError(
                    "too many streams of this caller", retry_after_s=0.5, subject=caller
                )
            self._counts[direction] += 1
            self._counts[caller] += 1

    def release(self, direction: str, caller: str) -> None:
        """Return a slot."""
        with self._lock:
            self._counts[direction] -= 1
            self._counts[caller] -= 1
            if not self._counts[caller]:
                del self._counts[caller]

    @contextmanager
    def taken(self, direction: str, caller: str) -> Iterator[None]:
        """Hold a slot for a stream during the block.

        Raises:
            TooManyRequestsError: No slot is free.
        """
        self.take(direction, caller)
        try:
            yield
        finally:
            self.release(direction, caller)


class Watchdog:
    """Cancels calls whose thread waits too long for the caller; one thread monitors all calls."""

    def __init__(self, timeout_s: float) -> None:
        self._timeout_s = timeout_s
        self._lock = threading.Lock()
        self._streams: dict[int, tuple[grpc.ServicerContext, float]] = {}
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._run, name="stream-watchdog", daemon=True)
        self._thread.start()

    @contextmanager
    def watching(self, context: grpc.ServicerContext) -> Iterator[Callable[[], None]]:
        """Monitor a call during the block; yields the function to call on progress."""
        key = id(context)

        def progress() -> None:
            self._streams[key] = (context, time.monotonic())

        progress()
        try:
            yield progress
        finally:
            with self._lock:
                self._streams.pop(key, None)

    def stop(self) -> None:
        """Stop the thread."""
        self._stopped.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._stopped.wait(min(1.0, self._timeout_s / 4)):
            horizon = time.monotonic() - self._timeout_s
            with self._lock:
                stalled = [entry for entry in self._streams.values() if entry[1] < horizon]
            for context, _ in stalled:
                context.cancel()
