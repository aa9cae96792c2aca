"""Group commit: delay a commit briefly so that concurrent updates share it."""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager


class BatchWindow:
    """Counts the updates in flight, to decide whether waiting for them pays; thread-safe.

    A single update does not wait. The more updates are in flight, the more share a commit (like PostgreSQL's
    ``commit_delay`` with ``commit_siblings``).

    Args:
        longest_s: Maximum duration of `wait`, in seconds.
    """

    def __init__(self, longest_s: float) -> None:
        self._longest_s = longest_s
        self._lock = threading.Lock()
        self._coming_count = 0
        self._none_coming = threading.Event()
        self._none_coming.set()

    @contextmanager
    def announced(self) -> Iterator[Callable[[], None]]:
        """Count as in flight until the block ends or the yielded function is called."""
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
        """Wait until no update is in flight, at most `longest_s`."""
        self._none_coming.wait(self._longest_s)
