"""When a failed call is made again, and how long is waited before it.

Only errors that carry a `retry_after_s` are repeated: UNAVAILABLE, ABORTED, RESOURCE_EXHAUSTED with a RetryInfo, and
a stream that stalled or passed its deadline. Delays grow exponentially with full jitter, never fall below what the
coordinator asked for, and end when the total time would be exceeded. The total time starts again whenever an attempt
has moved data, so that a long transfer over a bad line ends only when it stands still. It is counted once: calls that
are made on the way of another one share its patience (`qflare_client.rpc.lifetime`).

What it does not do: know any method or message. Every attempt builds its own request iterator.

Source: full jitter is from M. Brooker, "Exponential Backoff And Jitter", AWS Architecture Blog, 2015.
"""

import random
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Protocol

from qflare_client.errors import UnavailableError


@dataclass(frozen=True)
class RetryPolicy:
    """How patient a call is."""

    total_time_s: float = 60.0
    """Seconds from the first attempt, or the last progress, to the start of the last attempt.
    0 means one attempt."""

    initial_delay_s: float = 0.1
    """Upper bound of the first delay, in seconds; it doubles with every failure."""

    max_delay_s: float = 5.0
    """Upper bound of any delay that the coordinator did not ask for, in seconds."""

    def at_most(self, total_time_s: float) -> "RetryPolicy":
        """Return this policy with a total time of at most so many seconds."""
        return replace(self, total_time_s=min(self.total_time_s, total_time_s))

    def delay_s(self, failure_count: int, at_least_s: float) -> float:
        """Return a random delay before the next attempt, in seconds.

        Args:
            failure_count: Attempts that have failed in a row, 1 or more.
            at_least_s: What the coordinator asked for, 0 or more.
        """
        ceiling_s = min(self.max_delay_s, self.initial_delay_s * 2.0 ** min(failure_count - 1, 30))
        return at_least_s + random.uniform(0.0, ceiling_s)  # noqa: S311  # no secret


class Waiting(Protocol):
    """Waits; an event that ends the wait does."""

    def wait(self, timeout: float, /) -> bool:
        """Wait so many seconds; return True at once when nobody waits for the call any more."""


class Patience:
    """What is left of the patience of one call.

    Args:
        policy: How patient.
        waiting: Waits, until nobody waits for the call any more.
        clock: Monotonic seconds.
        on_progress: Called whenever data has moved.
    """

    def __init__(
        self,
        policy: RetryPolicy,
        waiting: Waiting,
        clock: Callable[[], float] = time.monotonic,
        on_progress: Callable[[], None] = lambda: None,
    ) -> None:
        self._policy = policy
        self._waiting = waiting
        self._clock = clock
        self._on_progress = on_progress
        self._begin()

    def progressed(self) -> None:
        """Start again: data has moved."""
        self._on_progress()
        self._begin()

    def _begin(self) -> None:
        self._failure_count = 0
        self._give_up_at = self._clock() + self._policy.total_time_s

    def wait(self, error: UnavailableError) -> None:
        """Wait before the next attempt, after one that raised `error`.

        Raises:
            UnavailableError: `error`, when there is to be no further attempt.
        """
        if error.retry_after_s is None:
            raise error
        self._failure_count += 1
        delay_s = self._policy.delay_s(self._failure_count, error.retry_after_s)
        if self._clock() + delay_s > self._give_up_at or self._waiting.wait(delay_s):
            raise error
