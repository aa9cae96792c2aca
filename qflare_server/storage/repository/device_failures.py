"""Statements on the failures that devices report, and on the devices that a round waits for."""

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from sqlalchemy import Select, delete, exists, func, insert, select, tuple_, update
from sqlalchemy.orm import Session

from qflare_server.storage import tables
from qflare_server.storage.repository.membership import is_open_to
from qflare_server.storage.tables import DeviceState, RoundState

FAILURES = tables.DeviceFailure.__table__
DEVICES = tables.Device.__table__
SELECTED = tables.RoundDevice.__table__
UPDATES = tables.ModelUpdate.__table__
ROUNDS = tables.Round.__table__


@dataclass(frozen=True)
class MissingDevice:
    """A device without an update in a round; `kind` and `text` describe its failure, None without one."""

    device_id: str
    name: str
    last_seen_at: datetime | None
    kind: str | None
    text: str | None


def record_failure(
    session: Session,
    training_session_id: str,
    round_number: int,
    device_id: str,
    *,
    kind: str,
    text: str,
    at: datetime,
) -> bool:
    """Record the latest failure of a device in a round, in one row; return whether it is the first.

    The first counts the device in its round. The caller holds the lock on the training session.
    """
    named = {
        "training_session_id": training_session_id,
        "round_number": round_number,
        "device_id": device_id,
    }
    mine = [FAILURES.c[name] == value for name, value in named.items()]
    changed = session.execute(
        update(FAILURES)
        .where(*mine)
        .values(kind=kind, text=text, reported_at=at, report_count=FAILURES.c.report_count + 1)
        .returning(FAILURES.c.report_count)
    ).first()
    if changed is not None:
        return False
    values = {"kind": kind, "text": text, "reported_at": at, "report_count": 1}
    session.execute(insert(FAILURES).values(**named, **values))
    session.execute(
        update(ROUNDS)
        .where(ROUNDS.c.training_session_id == training_session_id, ROUNDS.c.number == round_number)
        .values(failed_count=ROUNDS.c.failed_count + 1)
    )
    return True


def delete_old(session: Session, before: datetime, limit: int) -> int:
    """Delete failures in rounds that are over, reported before a time; at most so many rows; return how many.

    The counts of rounds stay.
    """
    keys = tuple_(FAILURES.c.training_session_id, FAILURES.c.round_number, FAILURES.c.device_id)
    old = (
        select(*keys.clauses)
        .join(
            ROUNDS,
            (ROUNDS.c.training_session_id == FAILURES.c.training_session_id)
            & (ROUNDS.c.number == FAILURES.c.round_number),
        )
        .where(FAILURES.c.reported_at < before, ROUNDS.c.state != RoundState.OPEN.value)
        .limit(limit)
    )
    found = [tuple(row) for row in session.execute(old)]
    if found:
        session.execute(delete(FAILURES).where(keys.in_(found)))
    return len(found)


def list_missing(
    session: Session, training_session_id: str, round_number: int, *, is_drawn: bool, limit: int
) -> Sequence[MissingDevice]:
    """Return active devices without an update in a round: failed ones first, then the longest unseen.

    Args:
        session: The transaction.
        training_session_id: Whose round it is.
        round_number: Of the round.
        is_drawn: Whether the round has drawn its devices; otherwise all that the training session is open to count.
        limit: How many.
    """
    sent = select(UPDATES.c.device_id).where(
        UPDATES.c.training_session_id == training_session_id,
        UPDATES.c.round_number == round_number,
    )
    query = (
        _participants(
            select(
                DEVICES.c.id,
                DEVICES.c.name,
                DEVICES.c.last_seen_at,
                FAILURES.c.kind,
                FAILURES.c.text,
            ),
            training_session_id,
            round_number,
            is_drawn=is_drawn,
        )
        .outerjoin(
            FAILURES,
            (FAILURES.c.device_id == DEVICES.c.id)
            & (FAILURES.c.training_session_id == training_session_id)
            & (FAILURES.c.round_number == round_number),
        )
        .where(DEVICES.c.id.not_in(sent))
        .order_by(FAILURES.c.kind.is_(None), DEVICES.c.last_seen_at, DEVICES.c.id)
        .limit(limit)
    )
    return [MissingDevice(*row) for row in session.execute(query)]


def count_participants(
    session: Session, training_session_id: str, round_number: int, *, is_drawn: bool
) -> int:
    """Return the number of active devices that may contribute to a round."""
    query = _participants(
        select(func.count()), training_session_id, round_number, is_drawn=is_drawn
    )
    return int(session.execute(query).scalar_one())


def count_failed(
    session: Session, training_session_id: str, round_number: int, *, is_drawn: bool, limit: int
) -> int:
    """Return the number of devices of a round that failed and have no update in it, counted up to a limit."""
    of_round = (
        FAILURES.c.training_session_id == training_session_id,
        FAILURES.c.round_number == round_number,
    )
    sent = exists().where(
        UPDATES.c.training_session_id == training_session_id,
        UPDATES.c.round_number == round_number,
        UPDATES.c.device_id == DEVICES.c.id,
    )
    failed = select(FAILURES.c.device_id).where(*of_round)
    query = _participants(
        select(DEVICES.c.id), training_session_id, round_number, is_drawn=is_drawn
    )
    query = query.where(DEVICES.c.id.in_(failed), ~sent).limit(limit)
    return int(session.execute(select(func.count()).select_from(query.subquery())).scalar_one())


def _participants(
    query: Select[Any], training_session_id: str, round_number: int, *, is_drawn: bool
) -> Select[Any]:
    query = query.select_from(DEVICES).where(DEVICES.c.state == DeviceState.ACTIVE.value)
    if not is_drawn:
        return query.where(is_open_to(training_session_id, DEVICES.c.id))
    drawn = select(SELECTED.c.device_id).where(
        SELECTED.c.training_session_id == training_session_id,
        SELECTED.c.round_number == round_number,
    )
    return query.where(DEVICES.c.id.in_(drawn))
