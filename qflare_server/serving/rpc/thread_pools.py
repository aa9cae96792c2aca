"""Thread pools with round-robin scheduling among callers."""

from __future__ import annotations

import logging
import queue
import threading
from collections import Counter, deque
from collections.abc import Callable, Sequence
from typing import Final

from qflare_server.serving.rpc.incoming import IncomingCall

logger = logging.getLogger(__name__)

JOIN_S: Final = 5.0


class FairPool:
    """Runs calls in its own threads; waiting calls are scheduled round robin among callers.

    Args:
        name: Name of its threads.
        thread_count: Maximum number of threads, started on demand.
        max_waiting: Maximum number of waiting calls.
        max_waiting_per_caller: Maximum number of waiting calls per caller.
        displaced: Called with a waiting call that was displaced.
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
        """Queue a call for a thread; return False if the queue is full, or no thread can be started."""
        with self._lock:
            mine = self._waiting.get(call.caller)
            if mine is not None and len(mine) >= self._max_waiting_per_caller:
                return False
            if self._waiting_count >= self._max_waiting and not self._make_room(call):
                return False
            if not self._ensure_thread():
                return False
            self._waiting.setdefault(call.caller, deque()).append(call)
            self._waiting_count += 1
        self._turns.put(True)
        return True

    def close(self) -> None:
        """Stop the threads when the queue is empty; busy threads are awaited only briefly."""
        with self._lock:
            threads = list(self._threads)
        for _ in threads:
            self._turns.put(False)
        for thread in threads:
            thread.join(JOIN_S)

    def _ensure_thread(self) -> bool:
        """Start a thread for one more call, unless one is idle or the maximum is reached; return False without any."""
        enough = self._idle_count > self._waiting_count or len(self._threads) >= self.thread_count
        if not enough:
            self._start_thread()
        return bool(self._threads)

    def _start_thread(self) -> None:
        name = f"{self._name}-{len(self._threads)}"
        thread = threading.Thread(target=self._work, name=name, daemon=True)
        try:
            thread.start()
        except RuntimeError as error:  # the limit of the process or of the machine
            logger.warning("no more threads can be started: pool=%s: %s", self._name, error)
            return
        self._threads.append(thread)
        self._idle_count += 1

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
                logger.exception(
                    "unexpected error in the thread of a call: method=%s", call.route.method
                )
            with self._lock:
                self._idle_count += 1
                self._running[call.caller] -= 1
                if not self._running[call.caller]:
                    del self._running[call.caller]
            del call  # an idle thread keeps no call alive

    def _run(self, call: IncomingCall) -> None:
        call.task()

    def _take(self) -> IncomingCall | None:
        """Take the next call, from the caller whose turn it is."""
        if not self._waiting:
            return None  # displaced
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
        """Displace a waiting call in favor of a caller with fewer calls; return False if there is none."""
        greediest = max(self._waiting, key=lambda caller: len(self._waiting[caller]))
        if len(self._waiting[greediest]) <= len(self._waiting.get(call.caller, ())) + 1:
            return False
        self._displaced(self._remove(greediest, newest=True))
        return True


class BatchPool(FairPool):
    """Threads of which each takes the calls that wait, up to a limit, and handles them together.

    Args:
        name: Name of its threads.
        thread_count: Maximum number of threads.
        limit: Maximum number of calls that a thread takes at once.
        handle: Handles the calls that a thread has taken.
        max_waiting: Maximum number of waiting calls.
        max_waiting_per_caller: Maximum number of waiting calls per caller.
        displaced: Called with a waiting call that was displaced.
    """

    def __init__(
        self,
        name: str,
        thread_count: int,
        limit: int,
        handle: Callable[[Sequence[IncomingCall]], None],
        *,
        max_waiting: int,
        max_waiting_per_caller: int,
        displaced: Callable[[IncomingCall], None],
    ) -> None:
        super().__init__(
            name,
            thread_count,
            max_waiting=max_waiting,
            max_waiting_per_caller=max_waiting_per_caller,
            displaced=displaced,
        )
        self._limit = limit
        self._handle = handle

    def _run(self, call: IncomingCall) -> None:
        calls = [call]
        with self._lock:
            while len(calls) < self._limit and (further := self._take()) is not None:
                calls.append(further)
        self._handle(calls)
