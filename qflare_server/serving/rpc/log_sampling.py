"""Sampling of log lines that callers can trigger at will: a line per refused call could fill a disk in a day."""

import threading
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import Final

LINES: Final = 10
"""Lines of one kind that are logged per period."""

PERIOD_S: Final = 60.0

MAX_KINDS: Final = 1024
"""Maximum number of distinct kinds; all further kinds count as one."""

_OTHERS: Final = "others"


@dataclass
class _Window:
    ends_at: float
    logged: int = 0
    left_out: int = 0


class LogSampler:
    """Passes the first lines of each kind in every period and counts the others; thread-safe.

    Args:
        monotonic: Returns monotonic time in seconds.
    """

    def __init__(self, monotonic: Callable[[], float]) -> None:
        self._monotonic = monotonic
        self._lock = threading.Lock()
        self._windows: dict[Hashable, _Window] = {}

    def take(self, kind: Hashable) -> int | None:
        """Return the number of lines of this kind suppressed before this one; None if this line is to be suppressed."""
        now = self._monotonic()
        with self._lock:
            window = self._window(kind, now)
            if now >= window.ends_at:
                window.ends_at, window.logged = now + PERIOD_S, 0
            if window.logged >= LINES:
                window.left_out += 1
                return None
            window.logged += 1
            left_out, window.left_out = window.left_out, 0
            return left_out

    def _window(self, kind: Hashable, now: float) -> _Window:
        known = self._windows.get(kind)
        if known is not None:
            return known
        if len(self._windows) >= MAX_KINDS:
            self._forget_quiet(now)
        if len(self._windows) >= MAX_KINDS:
            kind = _OTHERS
        return self._windows.setdefault(kind, _Window(now + PERIOD_S))

    def _forget_quiet(self, now: float) -> None:
        quiet = [
            kind
            for kind, window in self._windows.items()
            if now >= window.ends_at and not window.left_out
        ]
        for kind in quiet:
            del self._windows[kind]
