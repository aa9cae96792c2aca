"""The clock of a coordinator on SQLite: the time of the machine, without its jumps.

Deadlines, leases and the lifetimes of tokens are stored as absolute times. If the machine's clock is set by an hour
while they run, a round closes an hour early or an hour late. `SteadyClock` measures elapsed time with a clock that
nobody can set, and approaches the machine's time gradually.
"""

import logging
import threading
import time
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from typing import Final

logger = logging.getLogger(__name__)

MAX_RATE: Final = 0.1
"""Largest correction per elapsed second: an interval measured with the clock is wrong by at most this share."""
MAX_GRADUAL: Final = timedelta(days=1)
"""A larger difference means that the clock was not set before, so that the time is adopted at once."""


def machine_time() -> datetime:
    """Return the time of the machine, in UTC."""
    return datetime.now(UTC)


def elapsed_s() -> float:
    """Return seconds since an arbitrary moment; where the system counts them, also those of a suspended machine."""
    boot_time = getattr(time, "CLOCK_BOOTTIME", None)
    return time.monotonic() if boot_time is None else time.clock_gettime(boot_time)


class SteadyClock:
    """A clock that never jumps by up to a day and never runs backward; thread-safe.

    Args:
        wall: Returns the time of the machine.
        elapsed: Returns seconds that only grow.
    """

    def __init__(
        self,
        wall: Callable[[], datetime] = machine_time,
        elapsed: Callable[[], float] = elapsed_s,
    ) -> None:
        self._wall = wall
        self._elapsed = elapsed
        self._lock = threading.Lock()
        self._at = wall()
        self._read_at = elapsed()

    def __call__(self) -> datetime:
        """Return the time, in UTC."""
        with self._lock:
            read_at = self._elapsed()
            passed = timedelta(seconds=max(0.0, read_at - self._read_at))
            self._read_at = read_at
            self._at += passed
            self._correct(self._wall() - self._at, passed * MAX_RATE)
            return self._at

    def _correct(self, error: timedelta, most: timedelta) -> None:
        if abs(error) <= MAX_GRADUAL:
            self._at += max(-most, min(most, error))
            return
        logger.warning("the clock of the machine was set by %s; its time is adopted", error)
        self._at += error
