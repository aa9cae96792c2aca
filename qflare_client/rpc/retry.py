"""Retry policy: exponential backoff with full jitter.

Only errors with a `retry_after_s` are retried: UNAVAILABLE, ABORTED, RESOURCE_EXHAUSTED with a RetryInfo, and a stream
that stalled or passed its deadline. Delays grow exponentially with full jitter and are never shorter than the
coordinator asked for. Retries end when the total time would be exceeded. The total time restarts whenever an attempt
has transferred data, so a long transfer over a bad connection fails only when it makes no progress. Nested calls share
the patience of the outer call (`qflare_client.rpc.lifetime`).

It is independent of methods and messages. Every attempt builds its own request iterator.

Source: full jitter is from M. Brooker, "Exponential Backoff And Jitter", AWS Architecture Blog, 2015.
"""

import math
import random
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Protocol

from qflare_client import arguments
from qflare_client.errors import UnavailableError


@dataclass(frozen=True)
class RetryPolicy:
    """Retry policy of a call."""

    total_time_s: float = 60.0
    """Seconds from the first attempt, or the last progress, to the start of the last attempt.
    0 means one attempt."""

    initial_delay_s: float = 0.1
    """Upper bound of the first delay, in seconds; it doubles with every failure."""

    max_delay_s: float = 5.0
    """Upper bound of any delay, except those that the coordinator asks for, in seconds."""

    def __post_init__(self) -> None:
        """Refuse what is no time.

        Raises:
            InvalidArgumentError: A field is below 0, or no number; a delay is infinite.
        """
        arguments.not_negative("total_time_s", self.total_time_s, math.inf)
        arguments.not_negative("initial_delay_s", self.initial_delay_s)
        arguments.not_negative("max_delay_s", self.max_delay_s)

    def at_most(self, total_time_s: float) -> "RetryPolicy":
        """Return this policy with its total time capped, in seconds."""
        return replace(self, total_time_s=min(self.total_time_s, total_time_s))

    def delay_s(self, failure_count: int, at_least_s: float) -> float:
        """Return a random delay before the next attempt, in seconds.

        Args:
            failure_count: Attempts that have failed in a row, 1 or more.
            at_least_s: Delay that the coordinator asked for, 0 or more.
        """
        ceiling_s = min(self.max_delay_s, self.initial_delay_s * 2.0 ** min(failure_count - 1, 30))
        return at_least_s + random.uniform(0.0, ceiling_s)  # noqa: S311  # no secret


class Waiter(Protocol):
    """Interruptible wait, implemented by events and lifetimes."""

    def wait(self, timeout: float, /) -> bool:
        """Wait for a number of seconds; return True immediately if the call was canceled."""


class Patience:
    """Remaining patience of one call.

    Args:
        policy: Retry policy.
        waiting: Interruptible wait.
        clock: Monotonic time in seconds.
        on_progress: Called whenever data was transferred.
    """

    def __init__(
        self,
        policy: RetryPolicy,
        waiting: Waiter,
        clock: Callable[[], float] = time.monotonic,
        on_progress: Callable[[], None] = lambda: None,
    ) -> None:
        self._policy = policy
        self._waiting = waiting
        self._clock = clock
        self._on_progress = on_progress
        self._begin()

    def progressed(self) -> None:
        """Reset the patience: data was transferred."""
        self._on_progress()
        self._begin()

    def _begin(self) -> None:
        self._failure_count = 0
        self._give_up_at = self._clock() + self._policy.total_time_s

    def wait(self, error: UnavailableError) -> None:
        """Wait before the next attempt, after one that raised `error`.

        Raises:
            UnavailableError: `error`, if there is no further attempt.
        """
        if error.retry_after_s is None:
            raise error
        self._failure_count += 1
        delay_s = self._policy.delay_s(self._failure_count, error.retry_after_s)
        if self._clock() + delay_s > self._give_up_at or self._waiting.wait(delay_s):
            raise error
