"""Transfer slots for large payloads: shared fairly, with a minimum throughput.

The throughput of a transfer is measured only while it waits for its caller, so a slow disk on this side does not count.
While a slot is free, a transfer may be arbitrarily slow. If other transfers wait, a transfer below the minimum is
canceled, and so is one of several transfers of a caller while another caller has none. A canceled upload resumes later
from the stored chunks.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Final

from qflare_server.errors import TooManyRequestsError
from qflare_server.serving.rpc.incoming import IncomingCall
from qflare_server.serving.rpc.thread_pools import FairPool

WINDOW_S: Final = 5.0
"""Measurement window before a transfer is judged."""
WAITING_SHARE: Final = 0.5
"""A transfer that waits for its caller for less than this is limited by the coordinator."""
SLOW_FOR_S: Final = 60.0
"""How long a caller whose transfer was canceled has lower priority."""
MAX_SLOW_CALLERS: Final = 10_000


@dataclass
class _Progress:
    """Samples of a transfer: monotonic time, bytes transferred so far, and seconds waited so far."""

    samples: deque[tuple[float, int, float]] = field(default_factory=deque)

    def add(self, now: float, moved_bytes: int, waited_s: float) -> None:
        """Add a sample; keep the earlier samples within the window, and one before it."""
        self.samples.append((now, moved_bytes, waited_s))
        while self.samples[0][0] < now - WINDOW_S and self.samples[1][0] <= now - WINDOW_S:
            self.samples.popleft()

    def bytes_per_s(self) -> float | None:
        """Return the caller's throughput; None if it is unknown yet, or the transfer does not wait for the caller."""
        (began, bytes_then, waited_then), (now, bytes_now, waited_now) = (
            self.samples[0],
            self.samples[-1],
        )
        waited_s = waited_now - waited_then
        if now - began < WINDOW_S or waited_s < WAITING_SHARE * (now - began):
            return None
        return (bytes_now - bytes_then) / waited_s

    @property
    def is_watched_long_enough(self) -> bool:
        """Whether the measurement covers a full window."""
        return self.samples[-1][0] - self.samples[0][0] >= WINDOW_S


class TransferPool(FairPool):
    """Threads for transfers in one direction; each thread is one transfer slot.

    Args:
        name: Name of its threads.
        place_count: Maximum number of concurrent transfers.
        min_bytes_per_s: Minimum throughput of a transfer while others wait.
        max_waiting_per_caller: Maximum number of waiting transfers per caller.
        displaced: Called with a waiting call that was displaced.
    """

    def __init__(
        self,
        name: str,
        place_count: int,
        *,
        min_bytes_per_s: float,
        max_waiting_per_caller: int,
        displaced: Callable[[IncomingCall], None],
    ) -> None:
        super().__init__(
            name,
            place_count,
            max_waiting=2 * place_count,
            max_waiting_per_caller=max_waiting_per_caller,
            displaced=displaced,
        )
        self._min_bytes_per_s = min_bytes_per_s
        self._under_way: dict[IncomingCall, _Progress] = {}
        self._slow_until: dict[str, float] = {}

    def review(self, now: float) -> None:
        """Check the running transfers, and cancel one for each waiting transfer; call this about once a second.

        Args:
            now: Monotonic time, in seconds.
        """
        with self._lock:
            for call, progress in self._under_way.items():
                progress.add(now, call.moved_bytes, call.waited_s)
            wanted = self._waiting_count - self._idle_count
            victims = self._slowest(wanted) or self._beyond_share() if wanted > 0 else []
            for call in victims:
                del self._under_way[call]
                self._note_slow(call.caller, now)
        for call in victims:
            call.interrupt(
                TooManyRequestsError(
                    "the transfer made room for others: too slow, or one of several of its caller",
                    retry_after_s=WINDOW_S,
                    subject=call.caller,
                )
            )

    def _run(self, call: IncomingCall) -> None:
        with self._lock:
            self._under_way[call] = progress = _Progress()
            progress.add(time.monotonic(), call.moved_bytes, call.waited_s)
        try:
            super()._run(call)
        finally:
            with self._lock:
                self._under_way.pop(call, None)

    def _slowest(self, count: int) -> list[IncomingCall]:
        """Return up to `count` transfers below the minimum, slowest first."""
        rates = [
            (rate, number, call)
            for number, (call, progress) in enumerate(self._under_way.items())
            if (rate := progress.bytes_per_s()) is not None and rate < self._min_bytes_per_s
        ]
        return [call for _, _, call in sorted(rates)[:count]]

    def _beyond_share(self) -> list[IncomingCall]:
        """Return a transfer of the caller with the most slots, if it has several and a waiting caller has none."""
        if not self._running or all(self._running[caller] for caller in self._waiting):
            return []
        greediest, count = self._running.most_common(1)[0]
        mine = [
            call
            for call, progress in self._under_way.items()
            if call.caller == greediest and progress.is_watched_long_enough
        ]
        return mine[-1:] if count > 1 else []

    def _note_slow(self, caller: str, now: float) -> None:
        if len(self._slow_until) >= MAX_SLOW_CALLERS:
            self._slow_until.clear()
        self._slow_until[caller] = now + SLOW_FOR_S

    def _is_slow(self, caller: str) -> bool:
        return self._slow_until.get(caller, 0.0) > time.monotonic()

    def _next_caller(self) -> str:
        """Return the waiting caller with the fewest slots; callers whose transfers were recently canceled come last."""
        return min(self._waiting, key=lambda caller: (self._is_slow(caller), self._running[caller]))

    def _make_room(self, call: IncomingCall) -> bool:
        """Displace a call of a caller whose transfer was recently canceled in favor of another caller."""
        slow = [caller for caller in self._waiting if self._is_slow(caller)]
        if not slow or self._is_slow(call.caller):
            return super()._make_room(call)
        self._displaced(self._remove(slow[-1], newest=True))
        return True
