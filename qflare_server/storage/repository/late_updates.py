"""Statements on late updates: those that were refused because their round had closed."""

from datetime import datetime

from sqlalchemy import insert, select, update
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
