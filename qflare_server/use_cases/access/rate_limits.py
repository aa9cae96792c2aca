"""Per-caller rate limits: in-memory token buckets (Turner 1986), dropped once they are full again.

Callers without a credential are identified by their network.
"""

import ipaddress
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Final

from qflare_server.errors import TooManyRequestsError

BURST_S: Final = 10.0
MAX_CALLERS: Final = 100_000


@dataclass(slots=True)
class TokenBucket:
    """Token bucket, initially full. Not thread-safe.

    Attributes:
        per_second: Refill rate in tokens per second, above 0.
        burst: Capacity in tokens.
        filled_at: Time of the last event, in seconds of any clock.
    """

    per_second: float
    burst: float
    filled_at: float
    _tokens: float = field(init=False)

    def __post_init__(self) -> None:
        self._tokens = self.burst

    def take(self, now: float) -> float:
        """Take a token and return 0; if none is left, return the seconds until the next."""
        self._tokens, self.filled_at = self._earned(now), now
        if self._tokens < 1:
            return (1 - self._tokens) / self.per_second
        self._tokens -= 1
        return 0.0

    def is_full(self, now: float) -> bool:
        """Return whether the bucket is full."""
        return self._earned(now) >= self.burst

    def _earned(self, now: float) -> float:
        elapsed = max(0.0, now - self.filled_at)  # a clock that was set back costs nothing
        return min(self.burst, self._tokens + elapsed * self.per_second)


class RateLimiter:
    """Limits the call rate of each caller; thread-safe.

    Args:
        calls_per_second: Average rate of a caller. 0 means no limit.
        monotonic: Monotonic clock, in seconds.
        burst: Maximum burst in calls; None means ten seconds' worth.
        what: Name of the counted calls, for the error.
    """

    def __init__(
        self,
        calls_per_second: float,
        monotonic: Callable[[], float],
        *,
        burst: float | None = None,
        what: str = "calls",
    ) -> None:
        self._rate = calls_per_second
        self._burst = calls_per_second * BURST_S if burst is None else burst
        self._what = what
        self._monotonic = monotonic
        self._lock = threading.Lock()
        self._buckets: dict[str, TokenBucket] = {}

    def take(self, caller: str) -> None:
        """Count a call.

        Raises:
            TooManyRequestsError: The caller has exceeded its rate; carries the delay before a retry.
        """
        if not self._rate:
            return
        now = self._monotonic()
        with self._lock:
            wait_s = self._bucket(caller, now).take(now)
        if wait_s:
            raise TooManyRequestsError(
                f"too many {self._what}", retry_after_s=wait_s, subject=caller
            )

    def _bucket(self, caller: str, now: float) -> TokenBucket:
        if caller not in self._buckets:
            if len(self._buckets) >= MAX_CALLERS:
                self._forget(now)
            self._buckets[caller] = TokenBucket(self._rate, self._burst, now)
        return self._buckets[caller]

    def _forget(self, now: float) -> None:
        """Drop the full buckets; drop all if that is not enough."""
        kept = {name: bucket for name, bucket in self._buckets.items() if not bucket.is_full(now)}
        self._buckets = kept if len(kept) < MAX_CALLERS else {}


def hourly_budget(per_hour: int, what: str) -> RateLimiter:
    """Return a limiter of the permanent records a device may create, with a burst of one hour's worth."""
    return RateLimiter(per_hour / 3600, time.monotonic, burst=per_hour, what=what)


def network_of(host: str) -> str:
    """Return the rate-limit key of an address: IPv4 address or IPv6 /64 network; empty for a host name."""
    try:
        address = ipaddress.ip_address(host.partition("%")[0])
    except ValueError:
        return ""
    if isinstance(address, ipaddress.IPv6Address):
        mapped = address.ipv4_mapped
        return str(mapped or ipaddress.ip_network((address, 64), strict=False))
    return str(address)
