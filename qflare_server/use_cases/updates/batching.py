"""Group commit: delay a commit briefly so that concurrent updates share it."""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager


class BatchWindow:
    """Counts the updates in flight, to decide whether waiting for them pays; thread-safe.

    While one comes at a time nobody waits. The more there are, the more come together, and the less of a commit each
    of them costs (PostgreSQL's ``commit_delay`` with ``commit_siblings`` is the same thought).

    Args:
        longest_s: Seconds that `wait` lasts at most.
    """

    def __init__(self, longest_s: float) -> None:
        self._longest_s = longest_s
        self._lock = threading.Lock()
        self._coming_count = 0
        self._none_coming = threading.Event()
        self._none_coming.set()

    @contextmanager
    def announced(self) -> Iterator[Callable[[], None]]:
        """Be on the way for as long as the block lasts, or until what it yields is called."""
        coming = [1]

        def over() -> None:
            with self._lock:
                self._coming_count -= coming.pop() if coming else 0
                if not self._coming_count:
                    self._none_coming.set()

        with self._lock:
            self._coming_count += 1
            self._none_coming.clear()
        try:
            yield over
        finally:
            if coming:
                over()

    def wait(self) -> None:
        """Wait until nobody is on the way any more, but not for long."""
        self._none_coming.wait(self._longest_s)
