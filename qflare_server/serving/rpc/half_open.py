"""Half-open calls, which are waiting for their messages: limited in number and time, without a thread."""

from __future__ import annotations

import threading

from qflare_server.serving.rpc.incoming import IncomingCall


class HalfOpenCalls:
    """The half-open calls of one class of callers; thread-safe.

    A full table evicts like a SYN cache: the oldest call of the caller with the most calls. A call whose message
    arrives with its headers is in the table for less than a millisecond, so it is rarely the oldest.

    Args:
        max_count: Maximum number of calls.
    """

    def __init__(self, max_count: int) -> None:
        self._max_count = max_count
        self._lock = threading.Lock()
        self._calls: dict[str, dict[IncomingCall, None]] = {}
        self._count = 0

    def add(self, call: IncomingCall) -> IncomingCall | None:
        """Add a call; return the evicted call, if any."""
        with self._lock:
            evicted = self._evict() if self._count >= self._max_count else None
            self._calls.setdefault(call.caller, {})[call] = None
            self._count += 1
        return evicted

    def remove(self, call: IncomingCall) -> bool:
        """Remove a call; return False if it is no longer in the table."""
        with self._lock:
            return self._discard(call)

    def discard(self, call: IncomingCall) -> None:
        """Remove a call, if it is in the table."""
        self.remove(call)

    def take_overdue(self, now: float) -> list[IncomingCall]:
        """Remove and return the expired calls.

        Args:
            now: Monotonic time, in seconds.
        """
        with self._lock:
            overdue = [
                call for mine in self._calls.values() for call in mine if call.deadline_at <= now
            ]
            for call in overdue:
                self._discard(call)
        return overdue

    def _evict(self) -> IncomingCall:
        greediest = max(self._calls.values(), key=len)
        oldest = next(iter(greediest))
        self._discard(oldest)
        return oldest

    def _discard(self, call: IncomingCall) -> bool:
        mine = self._calls.get(call.caller, {})
        if call not in mine:
            return False
        del mine[call]
        if not mine:
            del self._calls[call.caller]
        self._count -= 1
        return True
