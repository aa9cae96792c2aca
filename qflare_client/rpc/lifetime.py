"""Cancellation and deadlines of calls: closing a client ends all its calls, stopping a loop ends the loop's calls.

One `Lifetime` belongs to one transport. Its state is per thread, so stopping a loop does not affect the calls of other
threads. A nested call (such as a login during a download) shares the patience of the outer call instead of adding its
own.
"""

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final

from qflare_client.rpc.retry import Patience, RetryPolicy

TICK_S: Final = 0.25
"""Longest time, in seconds, until a waiting thread notices a stop."""

STOP_GRACE_S: Final = 5.0
"""Grace period of a call in flight after its loop was stopped, in seconds."""


class Bounds:
    """Limits of one loop's calls.

    Args:
        stop: Set to stop the loop; None for a loop that ends only with its client.
        patience_s: Maximum time without progress before a call fails, in seconds; overrides a longer retry policy.
    """

    def __init__(self, stop: threading.Event | None, patience_s: float) -> None:
        self.stop = stop
        self._patience_s = patience_s
        self._seen_at = time.monotonic()
        self._cancel_at: float | None = None
        self.was_seen = False

    def seen(self) -> None:
        """Reset the patience: the coordinator has responded or transferred data, or was not needed until now."""
        self._seen_at = time.monotonic()
        self.was_seen = True

    @property
    def left_s(self) -> float:
        """Remaining patience in seconds, 0 or more."""
        return max(0.0, self._patience_s - (time.monotonic() - self._seen_at))

    @property
    def is_stopping(self) -> bool:
        """Whether the loop was stopped, so that no new work may start."""
        return self.stop is not None and self.stop.is_set()

    @property
    def is_over(self) -> bool:
        """Whether calls in flight must be canceled: the grace period has passed since the stop was first noticed."""
        if not self.is_stopping:
            return False
        if self._cancel_at is None:
            self._cancel_at = time.monotonic() + STOP_GRACE_S
        return time.monotonic() >= self._cancel_at


class _ThreadState(threading.local):
    bounds: Bounds | None = None
    patience: Patience | None = None


class Lifetime:
    """Cancellation and deadlines of one client's calls. Thread-safe."""

    def __init__(self) -> None:
        self._closed = threading.Event()
        self._thread = _ThreadState()

    @property
    def is_closed(self) -> bool:
        """Whether the client is closed."""
        return self._closed.is_set()

    def is_ending(self) -> bool:
        """Whether no new work may start: the client is closed, or this thread's loop was stopped."""
        bounds = self._thread.bounds
        return self._closed.is_set() or (bounds is not None and bounds.is_stopping)

    @property
    def bounds(self) -> Bounds | None:
        """Limits of this thread's calls; None outside of a loop."""
        return self._thread.bounds

    def close(self) -> None:
        """End all waits of all threads."""
        self._closed.set()

    @contextmanager
    def bounded(self, stop: threading.Event | None, patience_s: float) -> Iterator[Bounds]:
        """Apply `Bounds` to the calls that this thread makes within the block."""
        outer, self._thread.bounds = self._thread.bounds, Bounds(stop, patience_s)
        try:
            yield self._thread.bounds
        finally:
            self._thread.bounds = outer

    def wait(self, delay_s: float) -> bool:
        """Wait, but return early when no new work may start; return whether that is the case."""
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
        """Return the patience of a call: that of the enclosing call, or a new one."""
        if self._thread.patience is not None:
            return self._thread.patience
        bounds = self._thread.bounds
        if bounds is None:
            return Patience(policy, self)
        return Patience(policy.at_most(bounds.left_s), self, on_progress=bounds.seen)

    @contextmanager
    def sharing(self, patience: Patience) -> Iterator[None]:
        """Share a patience among the calls that this thread makes within the block."""
        outer, self._thread.patience = self._thread.patience, patience
        try:
            yield
        finally:
            self._thread.patience = outer
