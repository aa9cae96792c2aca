"""Tracks when devices were last seen, flushes it periodically, and derives the poll interval.

An idle poll writes nothing. A crash loses a few seconds of last-seen times.
"""

import threading
from datetime import datetime
from functools import partial
from itertools import islice

from qflare_server.config import ServerConfig
from qflare_server.storage.database import Database
from qflare_server.storage.repository import devices

WINDOW_S = 30.0
BATCH = 128  # devices per transaction; bounds how long calls wait for the writer


class Presence:
    """Time of the last call by device id; thread-safe."""

    def __init__(self, config: ServerConfig, database: Database) -> None:
        self._config = config
        self._database = database
        self._lock = threading.Lock()
        self._unwritten: dict[str, datetime] = {}
        self._recent: dict[str, datetime] = {}

    def note(self, device_id: str, at: datetime) -> None:
        """Remember a call."""
        with self._lock:
            self._unwritten[device_id] = at
            self._recent[device_id] = at

    def poll_delay_s(self) -> float:
        """Return the poll interval that keeps the fleet within the configured polls per second."""
        delay = len(self._recent) / max(self._config.polls_per_second, 1e-3)
        return min(max(delay, self._config.min_poll_s), self._config.max_poll_s)

    def flush(self, now: datetime) -> None:
        """Write pending last-seen times and drop devices that have stopped polling."""
        horizon = WINDOW_S + 3 * self.poll_delay_s()
        with self._lock:
            unwritten, self._unwritten = self._unwritten, {}
            self._recent = {
                device_id: at
                for device_id, at in self._recent.items()
                if (now - at).total_seconds() < horizon
            }
        rest = iter(sorted(unwritten.items()))
        while batch := dict(islice(rest, BATCH)):
            self._database.write(partial(devices.record_seen, seen=batch))
