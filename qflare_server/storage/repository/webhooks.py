"""Statements on the cursors of webhooks, and on the audit entries that follow them.

A cursor is a leaf index, not the id of an entry: ids are given before the commit and may become visible out of order,
leaf indexes are given afterwards, without gaps.
"""

from collections.abc import Collection
from datetime import datetime
from typing import Any, Final, NamedTuple

from sqlalchemy import insert, select, update
from sqlalchemy.orm import Session

from qflare_server.storage import tables
from qflare_server.storage.records import AuditLog, Rows
from qflare_server.storage.repository import audit_tree

AUDIT = tables.AuditLog.__table__
CURSORS = tables.WebhookCursor.__table__
_ENTRIES = Rows(AuditLog, AUDIT)
SCANNED: Final = 1000
"""Entries that one search passes over at most."""


class Cursor(NamedTuple):
    """How far an endpoint has come: the leaf index that follows, failed attempts there, and when the next is due."""

    next_leaf: int
    attempts: int
    due_at: datetime


class Found(NamedTuple):
    """The first wanted entry, or None; and the leaf index before which there is none."""

    entry: AuditLog | None
    next_leaf: int


def get_cursor(session: Session, endpoint: str) -> Cursor | None:
    """Return the cursor of an endpoint; None if it has none."""
    query = select(CURSORS.c.next_leaf, CURSORS.c.attempts, CURSORS.c.due_at)
    row = session.execute(query.where(CURSORS.c.endpoint == endpoint)).one_or_none()
    return None if row is None else Cursor(*row)


def ensure_cursor(session: Session, endpoint: str, now: datetime) -> None:
    """Give a new endpoint a cursor at the end of the log: it gets no earlier events."""
    if get_cursor(session, endpoint) is not None:
        return
    values = {"next_leaf": audit_tree.size(session), "attempts": 0, "due_at": now}
    session.execute(insert(CURSORS).values(endpoint=endpoint, **values))


def move_cursor(session: Session, endpoint: str, current: Cursor, following: Cursor) -> bool:
    """Replace a cursor; False if it is no longer the current one."""
    moved: Any = session.execute(
        update(CURSORS)
        .where(
            CURSORS.c.endpoint == endpoint,
            CURSORS.c.next_leaf == current.next_leaf,
            CURSORS.c.attempts == current.attempts,
        )
        .values(**following._asdict())
    )
    return bool(moved.rowcount)


def find_entry(session: Session, event_types: Collection[str], start: int) -> Found:
    """Return the first entry of some types from a leaf index on, among the next `SCANNED` entries."""
    end = min(audit_tree.size(session), start + SCANNED)
    query = _ENTRIES.select.where(
        AUDIT.c.leaf_index >= start,
        AUDIT.c.leaf_index < end,
        AUDIT.c.event_type.in_(sorted(event_types)),
    )
    entry = _ENTRIES.one(session, query.order_by(AUDIT.c.leaf_index).limit(1))
    if entry is None or entry.leaf_index is None:
        return Found(None, max(start, end))
    return Found(entry, entry.leaf_index)
