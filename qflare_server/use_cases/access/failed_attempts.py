"""Rate-limited audit entries for failed enrollment and login attempts.

Constructor: ``FailedAttempts(context)``. Each process records at most `BURST` refusals at once and one more every
`INTERVAL_S` seconds; the next entry says how many were left out.
"""

import logging
import threading
from typing import Final

from sqlalchemy.orm import Session

from qflare_server.context import Context
from qflare_server.errors import QflareError
from qflare_server.storage.repository import audit
from qflare_server.storage.repository.audit import Caller, Event
from qflare_server.storage.tables import RiskLevel

logger = logging.getLogger(__name__)

BURST: Final = 20
INTERVAL_S: Final = 6.0


class RefusedError(Exception):
    """Reason for refusing an enrollment, a login or a refresh: for the audit log, never for the caller."""


class FailedAttempts:
    """Records refusals within a rate limit; thread-safe."""

    def __init__(self, context: Context) -> None:
        self._context = context
        self._lock = threading.Lock()
        self._allowance = float(BURST)
        self._filled_at = context.clock()
        self._left_out = 0

    def record(
        self,
        caller: Caller,
        event_type: str,
        subject: str,
        problem: str,
        risk_level: RiskLevel = RiskLevel.HIGH,
    ) -> None:
        """Record one, or count it as left out.

        Args:
            caller: Who was refused.
            event_type: Such as ``enrollment.refused``.
            subject: Whom or what it was about.
            problem: Why, for administrators; the caller is not told.
            risk_level: How much it matters.
        """
        left_out = self._take()
        if left_out is None:
            return
        details = {"problem": problem, "left_out_count": left_out}
        event = Event(event_type, subject[:255], risk_level, details)
        at = self._context.clock()

        def work(session: Session) -> None:
            audit.record(session, caller, event, at)

        try:
            self._context.database.write(work)
        except QflareError as error:
            logger.warning("refusal not recorded: %s", error)

    def _take(self) -> int | None:
        """Return how many were left out since the last entry; None if this one is left out too."""
        with self._lock:
            now = self._context.clock()
            earned = (now - self._filled_at).total_seconds() / INTERVAL_S
            self._allowance = min(float(BURST), self._allowance + earned)
            self._filled_at = now
            if self._allowance < 1:
                self._left_out += 1
                return None
            self._allowance -= 1
            left_out, self._left_out = self._left_out, 0
            return left_out
