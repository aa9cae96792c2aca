"""Thread pools that serve callers round robin."""

from __future__ import annotations

import logging
import queue
import threading
from collections import Counter, deque
from collections.abc import Callable
from typing import Final

from qflare_server.serving.rpc.incoming import IncomingCall

logger = logging.getLogger(__name__)

JOIN_S: Final = 5.0


class FairPool:
    """Runs calls in threads of its own; waiting calls are taken from one caller after the other (round robin).

    Args:
        name: Of its threads.
        thread_count: Most threads; they start when they are needed.
        max_waiting: Most calls that wait for a thread, in all.
        max_waiting_per_caller: And of one caller.
        displaced: Hears of a call that waited and lost its place.
    """

    def __init__(
        self,
        name: str,
        thread_count: int,
        *,
        max_waiting: int,
        max_waiting_per_caller: int,
        displaced: Callable[[IncomingCall], None],
    ) -> None:
        self.thread_count = thread_count
        self._name = name
        self._max_waiting = max_waiting
        self._max_waiting_per_caller = max_waiting_per_caller
        self._displaced = displaced
        self._lock = threading.Lock()
        self._waiting: dict[str, deque[IncomingCall]] = {}
        self._waiting_count = 0
        self._running: Counter[str] = Counter()
        self._turns: queue.SimpleQueue[bool] = queue.SimpleQueue()
        self._threads: list[threading.Thread] = []
        self._idle_count = 0

    def put(self, call: IncomingCall) -> bool:
        """Let a call wait for a thread; False if too many wait already."""
        with self._lock:
            mine = self._waiting.get(call.caller)
            if mine is not None and len(mine) >= self._max_waiting_per_caller:
                return False
            if self._waiting_count >= self._max_waiting and not self._make_room(call):
                return False
            self._waiting.setdefault(call.caller, deque()).append(call)
            self._waiting_count += 1
            self._start_thread()
        self._turns.put(True)
        return True

    def close(self) -> None:
        """End the threads once nothing waits; those that are busy are not waited for long."""
        with self._lock:
            threads = list(self._threads)
        for _ in threads:
            self._turns.put(False)
        for thread in threads:
            thread.join(JOIN_S)

    def _start_thread(self) -> None:
        """Start a thread for what waits, unless one is free or all are there."""
        if self._idle_count >= self._waiting_count or len(self._threads) >= self.thread_count:
            return
        name = f"{self._name}-{len(self._threads)}"
        thread = threading.Thread(target=self._work, name=name, daemon=True)
        self._threads.append(thread)
        self._idle_count += 1
        thread.start()

    def _work(self) -> None:
        while self._turns.get():
            with self._lock:
                call = self._take()
                if call is None:
                    continue
                self._idle_count -= 1
                self._running[call.caller] += 1
            try:
                self._run(call)
            except Exception:
                logger.exception("a call broke its thread's loop: method=%s", call.route.method)
            with self._lock:
                self._idle_count += 1
                self._running[call.caller] -= 1
                if not self._running[call.caller]:
                    del self._running[call.caller]

    def _run(self, call: IncomingCall) -> None:
        call.task()

    def _take(self) -> IncomingCall | None:
        """Take the call that is next: of the caller whose turn it is."""
        if not self._waiting:
            return None  # it was displaced
        return self._remove(self._next_caller())

    def _next_caller(self) -> str:
        return next(iter(self._waiting))

    def _remove(self, caller: str, *, newest: bool = False) -> IncomingCall:
        mine = self._waiting.pop(caller)
        call = mine.pop() if newest else mine.popleft()
        if mine:
            self._waiting[caller] = mine  # at the end of the line
        self._waiting_count -= 1
        return call

    def _make_room(self, call: IncomingCall) -> bool:
        """Displace a call that waits, in favor of one whose caller has fewer; False if there is none."""
        greediest = max(self._waiting, key=lambda caller: len(self._waiting[caller]))
        if len(self._waiting[greediest]) <= len(self._waiting.get(call.caller, ())) + 1:
            return False
        self._displaced(self._remove(greediest, newest=True))
        return True
