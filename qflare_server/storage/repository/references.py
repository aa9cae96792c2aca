"""Statements that find what a person refers to: a device or a training session by id, beginning of an id, or name."""

from collections.abc import Sequence

from sqlalchemy import ColumnElement, Table, exists, func, or_, select
from sqlalchemy.orm import Session

from qflare.references import LEAST_PREFIX, MAX_CANDIDATES, Named, choose
from qflare_server.storage import tables

DEVICES = tables.Device.__table__
SESSIONS = tables.TrainingSession.__table__


def is_meant(session: Session, table: Table, reference: str) -> ColumnElement[bool]:
    """Return the condition for the rows that a reference may mean: that id, else that name or beginning of an id."""
    if session.execute(select(exists().where(table.c.id == reference))).scalar_one():
        return table.c.id == reference
    if len(reference) < LEAST_PREFIX:
        return table.c.name == reference
    begins = func.substr(table.c.id, 1, len(reference)) == reference  # LIKE ignores case on SQLite
    return or_(table.c.name == reference, begins)


def find_device_id(session: Session, reference: str) -> str | None:
    """Return the id of the device that is meant; None if there is none.

    Raises:
        ManyMeantError: There are several.
    """
    return choose(reference, _candidates(session, DEVICES, reference))


def find_session_id(session: Session, reference: str) -> str | None:
    """Return the id of the training session that is meant; None if there is none.

    Raises:
        ManyMeantError: There are several.
    """
    return choose(reference, _candidates(session, SESSIONS, reference))


def meant_sessions(session: Session, reference: str, limit: int) -> Sequence[Named]:
    """Return the training sessions that a reference may mean, newest first, at most `limit`."""
    meant = is_meant(session, SESSIONS, reference)
    query = select(SESSIONS.c.id, SESSIONS.c.name).where(meant)
    newest = query.order_by(SESSIONS.c.created_at.desc(), SESSIONS.c.id).limit(limit)
    return [Named(*row) for row in session.execute(newest)]


def _candidates(session: Session, table: Table, reference: str) -> Sequence[Named]:
    query = select(table.c.id, table.c.name).where(is_meant(session, table, reference))
    limited = query.order_by(table.c.id).limit(MAX_CANDIDATES + 1)
    return [Named(*row) for row in session.execute(limited)]
