"""Cache of expensive counts, shared by all visitors."""

import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Final, Generic, TypeVar

from qflare_server.use_cases import UseCases
from qflare_server.use_cases.status import Report

LEAST_LIFE_S: Final = 2.0
LIFE_OF_COST: Final = 20.0
AUDIT_SPAN: Final = timedelta(hours=24)
Value = TypeVar("Value")


@dataclass
class CachedValue(Generic[Value]):
    """A value that is read anew when it is too old; thread-safe.

    Args:
        read: Gives the value.
        monotonic: Gives seconds that never go back.
    """

    read: Callable[[], Value]
    monotonic: Callable[[], float] = time.monotonic
    _lock: threading.Lock = field(default_factory=threading.Lock)
    _known: tuple[float, Value] | None = None

    def get(self) -> Value:
        """Return the value, at most two seconds or twenty times its cost old; several callers wait for one reading."""
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
    """The counts that pages share.

    Args:
        do: What they are read through.
    """

    def __init__(self, use_cases: UseCases) -> None:
        self._report = CachedValue(use_cases.overview.report)
        self._devices = CachedValue(use_cases.devices.counts)
        self._audit = CachedValue(
            lambda: use_cases.audit.count_by_risk(use_cases.overview.now() - AUDIT_SPAN)
        )

    def report(self) -> Report:
        """Return the coordinator's status."""
        return self._report.get()

    def device_counts(self) -> tuple[Mapping[str, int], Mapping[str, int]]:
        """Return how many devices there are by state and by type."""
        return self._devices.get()

    def audit_counts(self) -> Mapping[str, int]:
        """Return how many audit events of each risk the last 24 hours had; ask for visitors who may know only."""
        return self._audit.get()
