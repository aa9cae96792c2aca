"""Delivery of webhooks: each receiver gets the events of the audit log in their order, at least once.

The audit log is the outbox: an entry is committed with the change that it records, and the sequencer gives it its leaf
index afterwards. Each receiver has a cursor, one row. The cursor moves after the receiver has accepted a message, so a
crash in between repeats the message with the same id. An unreachable receiver costs nothing more than its row.
Coordinators on one database take turns by a lease, which outlives every attempt.
"""

import hashlib
import logging
from dataclasses import dataclass
from datetime import datetime, timedelta
from functools import partial
from typing import Final

from sqlalchemy.orm import Session

from qflare_server.context import Context
from qflare_server.storage.records import AuditLog
from qflare_server.storage.repository import leases, webhooks
from qflare_server.storage.repository.webhooks import Cursor
from qflare_server.use_cases.webhooks.messages import Message, event_types, message_of
from qflare_server.use_cases.webhooks.sender import DeliveryError, Sender, place_of

logger = logging.getLogger(__name__)

POLL_S: Final = 1.0
FIRST_DELAY_S: Final = 2.0
MAX_DELAY_S: Final = 600.0
MAX_DOUBLINGS: Final = 20
LEASE_SLACK_S: Final = 15.0
DELIVERED, FAILED, DROPPED = "delivered", "failed", "dropped"


@dataclass(frozen=True)
class Due:
    """The next message of a receiver."""

    cursor: Cursor
    entry: AuditLog
    message: Message


class Delivery:
    """Messages to one receiver; used by one thread.

    Args:
        context: The coordinator's components.
        url: The receiver.
        holder: Name of this process among the coordinators.

    Raises:
        ConfigError: As `Sender`.
        KeyStoreError: As `Sender`.
    """

    def __init__(self, context: Context, url: str, holder: str) -> None:
        self._context = context
        self._holder = holder
        self._endpoint = hashlib.sha256(url.encode()).hexdigest()
        self.place = place_of(url)
        self.sender = Sender(context.config, url)
        self._types = event_types(context.config.webhook_event_types)
        self._scanned = 0

    def prepare(self) -> None:
        """Give a new receiver its place in the log; what is recorded from here on is sent to it."""
        now = self._context.clock()
        self._context.database.write(
            lambda session: webhooks.ensure_cursor(session, self._endpoint, now)
        )

    def run_once(self) -> float:
        """Attempt the next message; return how long to wait then, in seconds, 0 if there may be more.

        Raises:
            StoreUnavailableError: The database cannot be reached.
        """
        now = self._context.clock()
        due = self._find()
        if not isinstance(due, Due):
            return due
        wait_s = (due.cursor.due_at - now).total_seconds()
        if 0 < wait_s <= MAX_DELAY_S:  # a longer wait was written before the clock was set back
            return min(wait_s, POLL_S)
        if not self._context.database.write(partial(self._claim, current=due.cursor, now=now)):
            return POLL_S
        return self._attempt(due, now)

    def _find(self) -> Due | float:
        """Return the next message, or how long to wait where there is none."""
        with self._context.database.read() as session:
            cursor = webhooks.get_cursor(session, self._endpoint)
            if cursor is None:
                return POLL_S
            start = max(cursor.next_leaf, self._scanned)
            entry, self._scanned = webhooks.find_entry(session, self._types, start)
            if entry is not None:
                return Due(cursor, entry, message_of(session, self._context.config.realm, entry))
        return self._pass_over(cursor)

    def _pass_over(self, cursor: Cursor) -> float:
        """Move the cursor past entries without a message, so that they are not searched again after a restart."""
        if self._scanned - cursor.next_leaf < webhooks.SCANNED:
            return POLL_S
        self._write(cursor, Cursor(self._scanned, 0, self._context.clock()))
        return 0.0

    def _claim(self, session: Session, current: Cursor, now: datetime) -> bool:
        """Take or renew the lease; False if another coordinator has it, or has been faster."""
        until = now + timedelta(seconds=self._context.config.webhook_timeout_s + LEASE_SLACK_S)
        name = f"webhook {self._endpoint[:32]}"
        if not leases.acquire(session, name, self._holder, now, until):
            return False
        return webhooks.get_cursor(session, self._endpoint) == current

    def _attempt(self, due: Due, now: datetime) -> float:
        try:
            self.sender.send(due.message, now)
        except DeliveryError as error:
            return POLL_S if self.sender.is_closed else self._retry_later(due, str(error))
        self._move_on(due)
        self._count(DELIVERED)
        logger.debug("webhook %s: %s %s delivered", self.place, due.message.type, due.message.id)
        return 0.0

    def _move_on(self, due: Due) -> None:
        assert due.entry.leaf_index is not None
        self._write(due.cursor, Cursor(due.entry.leaf_index + 1, 0, self._context.clock()))

    def _write(self, current: Cursor, following: Cursor) -> None:
        self._context.database.write(
            lambda session: webhooks.move_cursor(session, self._endpoint, current, following)
        )

    def _retry_later(self, due: Due, cause: str) -> float:
        """Record a failed attempt; give the message up where it has reached its bounds."""
        config, now = self._context.config, self._context.clock()
        attempts = due.cursor.attempts + 1
        said = (self.place, due.message.type, due.message.id, attempts, cause)
        age_s = (now - due.entry.created_at).total_seconds()
        if attempts >= config.webhook_max_attempts or age_s > config.webhook_max_age_s:
            self._move_on(due)
            self._count(DROPPED)
            logger.error("webhook %s: %s %s dropped after %d attempts: %s", *said)
            return 0.0
        delay_s = min(FIRST_DELAY_S * 2.0 ** min(attempts - 1, MAX_DOUBLINGS), MAX_DELAY_S)
        later = Cursor(due.cursor.next_leaf, attempts, now + timedelta(seconds=delay_s))
        self._write(due.cursor, later)
        self._count(FAILED)
        logger.warning("webhook %s: %s %s failed at attempt %d: %s", *said)
        return min(delay_s, POLL_S)

    def _count(self, outcome: str) -> None:
        self._context.telemetry.webhook_attempted(outcome)
