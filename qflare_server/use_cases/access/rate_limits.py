"""Per-caller rate limits: in-memory token buckets (Turner 1986), dropped once they are full again."""

import threading
from collections.abc import Callable
from typing import Final

from qflare_server.errors import TooManyRequestsError

BURST_S: Final = 10.0
MAX_CALLERS: Final = 100_000


class RateLimiter:
    """Limits the call rate of each caller; thread-safe.

    Args:
        calls_per_second: What a caller may do on average; ten seconds of it at once. 0 means no bound.
        monotonic: Monotonic clock, in seconds.
    """

    def __init__(self, calls_per_second: float, monotonic: Callable[[], float]) -> None:
        self._rate = calls_per_second
        self._monotonic = monotonic
        self._lock = threading.Lock()
        self._buckets: dict[str, tuple[float, float]] = {}

    def take(self, caller: str) -> None:
        """Count a call.

        Raises:
            TooManyRequestsError: The caller has no call left; says when it has one again.
        """
        if not self._rate:
            return
        now, size = self._monotonic(), self._rate * BURST_S
        with self._lock:
            left, since = self._buckets.get(caller, (size, now))
            left = min(size, left + (now - since) * self._rate)
            if left < 1:
                self._buckets[caller] = (left, now)
                wait_s = (1 - left) / self._rate
                raise TooManyRequestsError("too many calls", retry_after_s=wait_s, subject=caller)
            if caller not in self._buckets and len(self._buckets) >= MAX_CALLERS:
                self._forget(now, size)
            self._buckets[caller] = (left - 1, now)

    def _forget(self, now: float, size: float) -> None:
        """Drop the buckets that are full again; all of them if that is not enough."""
        kept = {
            caller: (left, since)
            for caller, (left, since) in self._buckets.items()
            if left + (now - since) * self._rate < size
        }
        self._buckets = kept if len(kept) < MAX_CALLERS else {}
