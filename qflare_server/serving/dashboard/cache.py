"""Cache of expensive counts, shared by all visitors."""

import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Final, Generic, TypeVar

from qflare_server.storage.records import TrainingSession
from qflare_server.use_cases import UseCases
from qflare_server.use_cases.status import Report
from qflare_server.use_cases.training_sessions.explanation import Notice

LEAST_LIFE_S: Final = 2.0
LIFE_OF_COST: Final = 20.0
AUDIT_SPAN: Final = timedelta(hours=24)
Value = TypeVar("Value")


@dataclass
class CachedValue(Generic[Value]):
    """A cached value, read again when it is stale; thread-safe.

    Args:
        read: Reads the value.
        monotonic: Returns monotonic time in seconds.
    """

    read: Callable[[], Value]
    monotonic: Callable[[], float] = time.monotonic
    _lock: threading.Lock = field(default_factory=threading.Lock)
    _known: tuple[float, Value] | None = None

    def get(self) -> Value:
        """Return the value, at most two seconds or twenty read times old; concurrent callers share one read."""
        with self._lock:
            started = self.monotonic()
            if self._known is not None and started < self._known[0]:
                return self._known[1]
            value = self.read()
            now = self.monotonic()
            life_s = max(LEAST_LIFE_S, LIFE_OF_COST * (now - started))
            self._known = (now + life_s, value)
            return value


class DashboardCache:
    """Counts shared by the pages.

    Args:
        do: Use cases that provide the counts.
    """

    def __init__(self, use_cases: UseCases) -> None:
        self._report = CachedValue(use_cases.overview.report)
        self._running = CachedValue(use_cases.explanations.list_running)
        self._devices = CachedValue(use_cases.devices.counts)
        self._audit = CachedValue(
            lambda: use_cases.audit.count_by_risk(use_cases.overview.now() - AUDIT_SPAN)
        )

    def running(self) -> Sequence[tuple[TrainingSession, Sequence[Notice]]]:
        """Return the running training sessions with what they wait for."""
        return self._running.get()

    def report(self) -> Report:
        """Return the coordinator's status."""
        return self._report.get()

    def device_counts(self) -> tuple[Mapping[str, int], Mapping[str, int]]:
        """Return the number of devices by state and by type."""
        return self._devices.get()

    def audit_counts(self) -> Mapping[str, int]:
        """Return the number of audit events of the last 24 hours by risk; call it only for authorized visitors."""
        return self._audit.get()
