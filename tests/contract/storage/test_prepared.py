"""Statements that go past SQLAlchemy's way to the cursor still behave as statements of their transaction."""

from datetime import datetime, timedelta
from typing import Any

import pytest
from sqlalchemy import delete, event, func, select
from sqlalchemy.orm import Session

from qflare_server.errors import ConflictError
from qflare_server.storage.database import Database
from qflare_server.storage.prepared import EXACT_ROWS, MAX_ROWS, together
from qflare_server.storage.repository import audit, payloads
from qflare_server.storage.repository.audit import SYSTEM, Event
from qflare_server.storage.tables import AuditLog, Payload
from tests.conftest import START

NAMES = ("a", "b", "c")


def record_all(session: Session) -> None:
    for name in NAMES:
        audit.record(session, SYSTEM, Event("test", name), START)


def payload_row(payload_id: str, at: datetime = START) -> dict[str, Any]:
    return {
        "id": payload_id,
        "size_bytes": 1,
        "digest": "0" * 64,
        "chunk_digests": b"",
        "data": b"%s",
        "created_at": at,
    }


def insert_payload(session: Session, payload_id: str) -> None:
    payloads.insert_payloads(session, [payload_row(payload_id)])


def count_entries(database: Database) -> int:
    with database.read() as session:
        return session.execute(select(func.count()).select_from(AuditLog)).scalar_one()


def test_writes_of_one_block_are_one_statement_for_a_server(database: Database) -> None:
    statements: list[object] = []
    event.listen(database.engine, "before_cursor_execute", lambda *rest: statements.append(rest[2]))

    def work(session: Session) -> None:
        with together(session):
            record_all(session)

    database.write(work)

    assert len(statements) == (len(NAMES) if database.is_sqlite else 1)
    assert count_entries(database) == len(NAMES)


def test_block_that_fails_writes_nothing(database: Database) -> None:
    def work(session: Session) -> None:
        with together(session):
            record_all(session)
            raise ValueError("no")

    with pytest.raises(ValueError, match="no"):
        database.write(work)

    assert count_entries(database) == 0


def test_error_of_one_write_is_that_of_its_block(database: Database) -> None:
    def work(session: Session) -> None:
        with together(session):
            record_all(session)
            insert_payload(session, "p")

    database.write(work)
    with pytest.raises(ConflictError):
        database.write(work)

    assert count_entries(database) == len(NAMES)
    with database.read() as session:
        assert session.scalars(select(Payload.data)).one() == b"%s"


@pytest.mark.parametrize(
    "count", [1, EXACT_ROWS - 1, EXACT_ROWS, EXACT_ROWS + 1, MAX_ROWS - 1, 2 * MAX_ROWS + 7]
)
def test_rows_of_a_batch_of_any_size_keep_their_own_values(database: Database, count: int) -> None:
    """Values that rows in turn share are converted once; others are not mistaken for them."""
    times = [START + timedelta(seconds=number // 3) for number in range(count)]
    rows = [payload_row(f"{number:04}", at) for number, at in enumerate(times)]
    database.write(lambda session: payloads.insert_payloads(session, rows))

    with database.read() as session:
        found = session.execute(select(Payload.id, Payload.created_at).order_by(Payload.id)).all()
    database.write(lambda session: session.execute(delete(Payload)))

    assert [tuple(row) for row in found] == [(row["id"], row["created_at"]) for row in rows]
