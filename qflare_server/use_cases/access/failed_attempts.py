"""Rate-limited audit entries for failed enrollment and login attempts.

Constructor: ``FailedAttempts(context)``. Refusals that concern an enrolled device are limited per address and device,
so that forged attempts cannot crowd them out; all others share one limit. The next entry under a limit states the
number of omitted refusals.
"""

import logging
import threading
from datetime import datetime
from typing import Final

from sqlalchemy.orm import Session

from qflare_server.context import Context
from qflare_server.errors import QflareError
from qflare_server.storage.repository import audit, devices
from qflare_server.storage.repository.audit import Caller, Event
from qflare_server.storage.tables import ACTOR_CHARACTERS, RiskLevel
from qflare_server.use_cases.access.rate_limits import TokenBucket

logger = logging.getLogger(__name__)

BURST: Final = 20
INTERVAL_S: Final = 6.0
"""Limit for refusals that concern no enrolled device: burst, and seconds per further entry."""
DEVICE_BURST: Final = 3
DEVICE_INTERVAL_S: Final = 60.0
"""Limit for refusals that concern one enrolled device, per address."""
MAX_BOUNDS: Final = 10_000
DEVICE_PREFIX: Final = "device:"


class _Bound:
    """A token bucket, with the number of refusals omitted since the last entry."""

    def __init__(self, burst: int, interval_s: float, now: datetime) -> None:
        self._bucket = TokenBucket(1 / interval_s, burst, now.timestamp())
        self.left_out = 0

    def take(self, now: datetime) -> int | None:
        """Return the number omitted since the last entry; None if this one is omitted too."""
        if self._bucket.take(now.timestamp()):
            self.left_out += 1
            return None
        left_out, self.left_out = self.left_out, 0
        return left_out


class RefusedError(Exception):
    """Reason for refusing an enrollment, a login or a refresh: for the audit log, never for the caller."""


class FailedAttempts:
    """Records refusals within a rate limit; thread-safe."""

    def __init__(self, context: Context) -> None:
        self._context = context
        self._lock = threading.Lock()
        self._shared = _Bound(BURST, INTERVAL_S, context.clock())
        self._device_bounds: dict[tuple[str, str], _Bound] = {}

    def record(
        self,
        caller: Caller,
        event_type: str,
        subject: str,
        problem: str,
        risk_level: RiskLevel = RiskLevel.HIGH,
    ) -> None:
        """Record a refusal, or count it as omitted.

        Args:
            caller: The refused caller.
            event_type: Event type, such as ``enrollment.refused``.
            subject: Subject of the audit entry.
            problem: Reason, for administrators; not sent to the caller.
            risk_level: Risk level of the entry.
        """
        subject, problem = _printable(subject)[:ACTOR_CHARACTERS], _printable(problem)
        bound = self._bound_of(caller, subject)
        with self._lock:
            left_out = bound.take(self._context.clock())
        if left_out is None:
            return
        details = {"problem": problem, "left_out_count": left_out}
        event = Event(event_type, subject, risk_level, details)
        at = self._context.clock()

        def work(session: Session) -> None:
            audit.record(session, caller, event, at)

        try:
            self._context.database.write(work)
        except QflareError as error:
            with self._lock:
                bound.left_out += left_out + 1
            logger.warning("refusal not recorded: %s", error)

    def _bound_of(self, caller: Caller, subject: str) -> _Bound:
        """Return the limit of a refusal: a separate one if it concerns an enrolled device."""
        if not self._is_enrolled(subject):
            return self._shared
        key, now = (caller.peer_address.rpartition(":")[0], subject), self._context.clock()
        with self._lock:
            if key not in self._device_bounds and len(self._device_bounds) >= MAX_BOUNDS:
                self._device_bounds.pop(next(iter(self._device_bounds)))
            return self._device_bounds.setdefault(key, _Bound(DEVICE_BURST, DEVICE_INTERVAL_S, now))

    def _is_enrolled(self, subject: str) -> bool:
        if not subject.startswith(DEVICE_PREFIX):
            return False
        try:
            with self._context.database.read() as session:
                return devices.get_device(session, subject.removeprefix(DEVICE_PREFIX)) is not None
        except QflareError:
            return False


def _printable(text: str) -> str:
    """Return a text without characters that databases or terminals cannot handle."""
    return "".join(character if character.isprintable() else "?" for character in text)
