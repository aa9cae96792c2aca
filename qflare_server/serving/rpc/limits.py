"""Bounds on streams: how many at once, and how long without progress."""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import grpc

from qflare_server import errors
from qflare_server.config import ServerConfig


class StreamLimits:
    """Bounds on streams under way, for each caller and for watchers; safe to share between threads.

    How many large payloads move at once is bounded where they move: a small one needs no place.
    """

    def __init__(self, config: ServerConfig) -> None:
        self._lock = threading.Lock()
        self._max_watchers = config.max_watchers
        self._per_caller = config.max_streams_per_device
        self._counts: Counter[str] = Counter()

    @contextmanager
    def taken(self, direction: str, caller: str) -> Iterator[None]:
        """Hold a place for a stream.

        Raises:
            TooManyRequestsError: No place is free.
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
        try:
            yield
        finally:
            with self._lock:
                self._counts[direction] -= 1
                self._counts[caller] -= 1
                if not self._counts[caller]:
                    del self._counts[caller]


class Watchdog:
    """Cancels calls whose thread waits for the caller in vain; one thread looks after all of them."""

    def __init__(self, timeout_s: float) -> None:
        self._timeout_s = timeout_s
        self._lock = threading.Lock()
        self._streams: dict[int, tuple[grpc.ServicerContext, float]] = {}
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._run, name="stream-watchdog", daemon=True)
        self._thread.start()

    @contextmanager
    def watching(self, context: grpc.ServicerContext) -> Iterator[Callable[[], None]]:
        """Watch a call for as long as the block lasts; yields what to call on progress."""
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
        """End the thread."""
        self._stopped.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._stopped.wait(min(1.0, self._timeout_s / 4)):
            horizon = time.monotonic() - self._timeout_s
            with self._lock:
                stalled = [entry for entry in self._streams.values() if entry[1] < horizon]
            for context, _ in stalled:
                context.cancel()
