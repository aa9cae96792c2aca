"""Statements on late updates: those that were refused because their round had closed."""

from datetime import datetime

from sqlalchemy import delete, insert, select, tuple_, update
from sqlalchemy.orm import Session

from qflare_server.storage import tables

LATE = tables.LateUpdate.__table__
ROUNDS = tables.Round.__table__


def record_late(
    session: Session, training_session_id: str, round_number: int, device_id: str, at: datetime
) -> None:
    """Count a device whose update came late for a round, once; the caller holds the lock on the round."""
    named = {"training_session_id": training_session_id, "round_number": round_number}
    known = select(LATE.c.device_id).where(
        LATE.c.training_session_id == training_session_id,
        LATE.c.round_number == round_number,
        LATE.c.device_id == device_id,
    )
    if session.execute(known).first() is not None:
        return
    session.execute(insert(LATE).values(device_id=device_id, refused_at=at, **named))
    session.execute(
        update(ROUNDS)
        .where(ROUNDS.c.training_session_id == training_session_id, ROUNDS.c.number == round_number)
        .values(late_count=ROUNDS.c.late_count + 1)
    )


def delete_old(session: Session, before: datetime, limit: int) -> int:
    """Delete what was recorded before a time, at most so many rows; return how many. The counts of rounds stay."""
    keys = tuple_(LATE.c.training_session_id, LATE.c.round_number, LATE.c.device_id)
    old = select(*keys.clauses).where(LATE.c.refused_at < before).limit(limit)
    found = [tuple(row) for row in session.execute(old)]
    if found:
        session.execute(delete(LATE).where(keys.in_(found)))
    return len(found)
