"""Transfer slots for large payloads: shared fairly, with a minimum throughput.

A transfer is measured by what it moves in the time that it waits for its caller, so a slow disk on this side is not
held against it. As long as a place is free a transfer may take as long as it likes. Where others wait, one that is
slower than the minimum makes room, and so does one of a caller that has several places while another has none. An
upload that made room goes on later from what has been stored.
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
"""How long a transfer is watched before it is judged."""
WAITING_SHARE: Final = 0.5
"""A transfer that waits for its caller less than this is held up by the coordinator."""
SLOW_FOR_S: Final = 60.0
"""How long a caller that made room stands behind others."""
MAX_SLOW_CALLERS: Final = 10_000


@dataclass
class _Progress:
    """Samples of a transfer: monotonic time, bytes moved and seconds waited until then."""

    samples: deque[tuple[float, int, float]] = field(default_factory=deque)

    def add(self, now: float, moved_bytes: int, waited_s: float) -> None:
        """Keep a sample, and of the earlier ones those within the window and one before it."""
        self.samples.append((now, moved_bytes, waited_s))
        while self.samples[0][0] < now - WINDOW_S and self.samples[1][0] <= now - WINDOW_S:
            self.samples.popleft()

    def bytes_per_s(self) -> float | None:
        """Return what the caller's line carries; None if that cannot be said yet or the caller is not waited for."""
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
        """Whether it has been watched for a window."""
        return self.samples[-1][0] - self.samples[0][0] >= WINDOW_S


class TransferPool(FairPool):
    """Threads for payloads that move in one direction: each holds one place.

    Args:
        name: Of its threads.
        place_count: Transfers at once.
        min_bytes_per_s: What a transfer has to move each second while others wait.
        max_waiting_per_caller: Transfers of one caller that wait for a place.
        displaced: Hears of a call that waited and lost its place in the line.
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
        """Look at the transfers under way, and end one for each that waits in vain; to be called every second or so.

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
        """Return at most so many transfers below the minimum, the slowest first."""
        rates = [
            (rate, number, call)
            for number, (call, progress) in enumerate(self._under_way.items())
            if (rate := progress.bytes_per_s()) is not None and rate < self._min_bytes_per_s
        ]
        return [call for _, _, call in sorted(rates)[:count]]

    def _beyond_share(self) -> list[IncomingCall]:
        """Return a transfer of the caller that has most places, if it has several and a caller that waits has none."""
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
        """Return the caller with the fewest places, those that made room lately last."""
        return min(self._waiting, key=lambda caller: (self._is_slow(caller), self._running[caller]))

    def _make_room(self, call: IncomingCall) -> bool:
        """Displace a call of a caller that made room lately in favor of one that did not."""
        slow = [caller for caller in self._waiting if self._is_slow(caller)]
        if not slow or self._is_slow(call.caller):
            return super()._make_room(call)
        self._displaced(self._remove(slow[-1], newest=True))
        return True
