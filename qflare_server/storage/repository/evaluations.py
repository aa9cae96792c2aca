"""Statements on evaluations. Rows without a statement are from before evaluations were signed, and are ignored."""

from collections.abc import Mapping, Sequence
from typing import Any

from sqlalchemy import delete, func, insert, select
from sqlalchemy.orm import Session

from qflare_server.storage import tables
from qflare_server.storage.records import Evaluation, Rows
from qflare_server.storage.tables import UpdateState

EVALUATIONS = tables.Evaluation.__table__
UPDATES = tables.ModelUpdate.__table__
_ROWS = Rows(Evaluation, EVALUATIONS)
_IS_SIGNED = EVALUATIONS.c.statement.is_not(None)


def insert_evaluation(session: Session, values: Mapping[str, Any]) -> None:
    """Insert a signed report on a version in place of an unsigned one; the primary key rejects a second signed one."""
    session.execute(
        delete(EVALUATIONS).where(
            EVALUATIONS.c.training_session_id == values["training_session_id"],
            EVALUATIONS.c.version == values["version"],
            EVALUATIONS.c.device_id == values["device_id"],
            ~_IS_SIGNED,
        )
    )
    session.execute(insert(EVALUATIONS).values(**values))


def find_digest(
    session: Session, training_session_id: str, version: int, device_id: str
) -> str | None:
    """Return the statement digest of a device's report on a version; None without a report."""
    query = select(EVALUATIONS.c.statement_digest).where(
        EVALUATIONS.c.training_session_id == training_session_id,
        EVALUATIONS.c.version == version,
        EVALUATIONS.c.device_id == device_id,
        _IS_SIGNED,
    )
    return session.execute(query).scalar_one_or_none()


def count(session: Session, training_session_id: str, version: int) -> int:
    """Return how many devices have reported on a version."""
    query = select(func.count()).where(
        EVALUATIONS.c.training_session_id == training_session_id,
        EVALUATIONS.c.version == version,
        _IS_SIGNED,
    )
    return int(session.execute(query).scalar_one())


def list_of_version(
    session: Session, training_session_id: str, version: int
) -> Sequence[Evaluation]:
    """Return every report on a version, by device."""
    query = _ROWS.select.where(
        EVALUATIONS.c.training_session_id == training_session_id,
        EVALUATIONS.c.version == version,
        _IS_SIGNED,
    ).order_by(EVALUATIONS.c.device_id)
    return _ROWS.all(session, query)


def signed_rows(
    session: Session, training_session_id: str, version: int, after: str, limit: int
) -> Sequence[Evaluation]:
    """Return device, statement, signature and digest of the reports on a version after a device id, by device."""
    query = (
        _ROWS.select.where(
            EVALUATIONS.c.training_session_id == training_session_id,
            EVALUATIONS.c.version == version,
            EVALUATIONS.c.device_id > after,
            _IS_SIGNED,
        )
        .order_by(EVALUATIONS.c.device_id)
        .limit(limit)
    )
    return _ROWS.all(session, query)


def largest_example_count(session: Session, training_session_id: str, device_id: str) -> int | None:
    """Return the largest example count of a device's updates to a training session; None without one.

    Rejected updates are ignored.
    """
    query = select(func.max(UPDATES.c.example_count)).where(
        UPDATES.c.training_session_id == training_session_id,
        UPDATES.c.device_id == device_id,
        UPDATES.c.state != UpdateState.REJECTED.value,
    )
    return session.execute(query).scalar_one_or_none()
