"""Until when calls go on: a closed client ends all of them, and a loop that is told to stop ends its own.

One `Lifetime` belongs to one transport. What it holds of a loop or of a call under way is kept for each thread, so that
a loop that stops leaves the calls of other threads alone, and a call made on the way of another (a login on the way of
a download) shares the patience of the outer one instead of adding its own.
"""

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final

from qflare_client.rpc.retry import Patience, RetryPolicy

TICK_S: Final = 0.25
"""Longest time, in seconds, after which a thread that waits notices that it has to end."""

STOP_GRACE_S: Final = 5.0
"""How long a call in flight may go on once its loop has been told to stop, in seconds."""


class Bounds:
    """When the calls of one loop end.

    Args:
        stop: Set when the loop has to end; None for a loop that only its client's end ends.
        patience_s: Most seconds without progress before a call gives up, whatever its retry policy says.
    """

    def __init__(self, stop: threading.Event | None, patience_s: float) -> None:
        self.stop = stop
        self._patience_s = patience_s
        self._seen_at = time.monotonic()
        self._cancel_at: float | None = None
        self.was_seen = False

    def seen(self) -> None:
        """Start the patience again: the coordinator has answered or moved data, or was not needed until now."""
        self._seen_at = time.monotonic()
        self.was_seen = True

    @property
    def left_s(self) -> float:
        """Seconds of patience that are left, 0 or more."""
        return max(0.0, self._patience_s - (time.monotonic() - self._seen_at))

    @property
    def is_stopping(self) -> bool:
        """Whether nothing more is to be begun."""
        return self.stop is not None and self.stop.is_set()

    @property
    def is_over(self) -> bool:
        """Whether a call in flight has to be cancelled: the grace has passed since the stop was first noticed."""
        if not self.is_stopping:
            return False
        if self._cancel_at is None:
            self._cancel_at = time.monotonic() + STOP_GRACE_S
        return time.monotonic() >= self._cancel_at


class _ThreadState(threading.local):
    bounds: Bounds | None = None
    patience: Patience | None = None


class Lifetime:
    """Until when the calls of one client go on. Thread-safe."""

    def __init__(self) -> None:
        self._closed = threading.Event()
        self._thread = _ThreadState()

    @property
    def is_closed(self) -> bool:
        """Whether the client is closed."""
        return self._closed.is_set()

    def is_ending(self) -> bool:
        """Whether nothing more is to be begun: the client is closed, or this thread's loop has to stop."""
        bounds = self._thread.bounds
        return self._closed.is_set() or (bounds is not None and bounds.is_stopping)

    @property
    def bounds(self) -> Bounds | None:
        """When the calls of this thread end; None outside of a loop."""
        return self._thread.bounds

    def close(self) -> None:
        """End all waits of all threads."""
        self._closed.set()

    @contextmanager
    def bounded(self, stop: threading.Event | None, patience_s: float) -> Iterator[Bounds]:
        """Let the calls that this thread makes within the block end as `Bounds` says."""
        outer, self._thread.bounds = self._thread.bounds, Bounds(stop, patience_s)
        try:
            yield self._thread.bounds
        finally:
            self._thread.bounds = outer

    def wait(self, delay_s: float) -> bool:
        """Wait, and return at once when nothing more is to be begun; return whether that is so."""
        stop = None if self._thread.bounds is None else self._thread.bounds.stop
        if stop is None:
            return self._closed.wait(delay_s)
        until = time.monotonic() + delay_s
        while not self.is_ending():
            left_s = until - time.monotonic()
            if left_s <= 0:
                return False
            stop.wait(min(left_s, TICK_S))
        return True

    def patience(self, policy: RetryPolicy) -> Patience:
        """Return the patience of a call: that of the call on whose way it is made, or a fresh one."""
        if self._thread.patience is not None:
            return self._thread.patience
        bounds = self._thread.bounds
        if bounds is None:
            return Patience(policy, self)
        return Patience(policy.at_most(bounds.left_s), self, on_progress=bounds.seen)

    @contextmanager
    def sharing(self, patience: Patience) -> Iterator[None]:
        """Let the calls that this thread makes within the block share a patience."""
        outer, self._thread.patience = self._thread.patience, patience
        try:
            yield
        finally:
            self._thread.patience = outer
