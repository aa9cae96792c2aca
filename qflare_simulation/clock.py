"""Virtual time: it stands still while devices compute, and jumps from event to event."""

from datetime import UTC, datetime, timedelta
from typing import Final

START: Final = datetime(2000, 1, 1, tzinfo=UTC)
"""When every simulation begins, so that equal runs have equal times."""


class VirtualClock:
    """A clock that is set by the simulation."""

    def __init__(self, now: datetime = START) -> None:
        self._now = now

    def __call__(self) -> datetime:
        """Return the virtual time in UTC."""
        return self._now

    def advance(self, to: datetime) -> None:
        """Move forward to a time; never back."""
        self._now = max(self._now, to)

    @property
    def elapsed_s(self) -> float:
        """Virtual seconds since the start."""
        return (self._now - START).total_seconds()


def after(at: datetime, seconds: float) -> datetime:
    """Return a time that many seconds later."""
    return at + timedelta(seconds=seconds)
