"""Lists of the audit log: in the order of time, every entry once, and never more read than is shown."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from datetime import datetime, timedelta
from functools import partial
from typing import Any

import pytest
from sqlalchemy import event
from sqlalchemy.orm import Session

from qflare_server.storage.database import Database
from qflare_server.storage.paging import PageRequest
from qflare_server.storage.repository import audit, views
from qflare_server.storage.repository.audit import AuditFilter, Caller, Event
from qflare_server.storage.tables import RiskLevel
from tests.conftest import START

SECONDS = (5, 3, 9, 3, 3, 8, 1, 9, 2, 7)
"""When the entries say that they were written, in the order of their numbers: clocks of replicas differ."""
FILTERS = [
    AuditFilter(),
    AuditFilter(actor="admin:1"),
    AuditFilter(subject="device:0"),
    AuditFilter(event_type="kind.2"),
    AuditFilter(risk_level="high"),
    AuditFilter(actor="admin:1", event_type="kind.1"),
]


def moment(seconds: float) -> datetime:
    return START + timedelta(seconds=seconds)


@pytest.fixture
def log(database: Database) -> Database:
    """Return a database with ten entries."""
    for number, seconds in enumerate(SECONDS):
        risk = RiskLevel.HIGH if number % 3 else RiskLevel.LOW
        entry = Event(f"kind.{number % 3}", f"device:{number % 2}", risk, {"number": number})
        caller = Caller(f"admin:{number % 2}")
        database.write(partial(_record, caller=caller, entry=entry, at=moment(seconds)))
    return database


def _record(session: Session, caller: Caller, entry: Event, at: datetime) -> None:
    audit.record(session, caller, entry, at)


def numbers_of(rows: Sequence[Any]) -> list[int]:
    return [row.details["number"] for row in rows]


def all_pages(session: Session, size: int, wanted: AuditFilter) -> list[int]:
    """Return the numbers of all entries of a list, page by page."""
    found: list[int] = []
    token = ""
    while True:
        page = audit.list_entries(session, PageRequest(size, token), wanted)
        assert len(page.rows) <= size
        found += numbers_of(page.rows)
        token = page.next_token
        if not token:
            return found


def expected(wanted: AuditFilter) -> list[int]:
    """Return the numbers of the entries that a list has to show, newest first."""
    shown = [
        number
        for number, seconds in enumerate(SECONDS)
        if wanted.actor in {"", f"admin:{number % 2}"}
        and wanted.subject in {"", f"device:{number % 2}"}
        and wanted.event_type in {"", f"kind.{number % 3}"}
        and wanted.risk_level in {"", "high" if number % 3 else "low"}
        and (wanted.start is None or wanted.start <= moment(seconds))
        and (wanted.end is None or moment(seconds) < wanted.end)
    ]
    return sorted(shown, key=lambda number: (SECONDS[number], number), reverse=True)


@pytest.mark.parametrize("size", [1, 2, 3, 10])
@pytest.mark.parametrize("wanted", FILTERS)
def test_pages_hold_every_entry_once_in_the_order_of_time(
    log: Database, wanted: AuditFilter, size: int
) -> None:
    with log.read() as session:
        assert all_pages(session, size, wanted) == expected(wanted)


@pytest.mark.parametrize("bounds", [(3, None), (None, 3), (3, 9), (4, 4)])
@pytest.mark.parametrize("wanted", FILTERS)
def test_a_span_of_time_has_its_beginning_and_not_its_end(
    log: Database, wanted: AuditFilter, bounds: tuple[int | None, int | None]
) -> None:
    start, end = (None if bound is None else moment(bound) for bound in bounds)
    spanned = replace(wanted, start=start, end=end)
    with log.read() as session:
        assert all_pages(session, 2, spanned) == expected(spanned)


@contextmanager
def plans(database: Database) -> Iterator[list[str]]:
    """Collect how SQLite carries out every SELECT."""
    found: list[str] = []

    def explain(_: Any, cursor: Any, statement: str, parameters: Any, *__: Any) -> None:
        if statement.startswith("SELECT"):
            asked = cursor.connection.execute(f"EXPLAIN QUERY PLAN {statement}", parameters)
            found.extend(row[3] for row in asked)

    event.listen(database.engine, "before_cursor_execute", explain)
    try:
        yield found
    finally:
        event.remove(database.engine, "before_cursor_execute", explain)


class TestPlansOfSqlite:
    """PostgreSQL plans by what a table holds, and these are small."""

    @pytest.fixture
    def database_url(self, sqlite_url: str) -> str:
        """Return an SQLite database."""
        return sqlite_url

    @pytest.mark.parametrize("wanted", FILTERS)
    @pytest.mark.parametrize("end", [None, 8])
    def test_a_page_is_a_range_of_an_index(
        self, log: Database, wanted: AuditFilter, end: int | None
    ) -> None:
        spanned = replace(wanted, end=None if end is None else moment(end))
        with log.read() as session, plans(log) as found:
            first = audit.list_entries(session, PageRequest(1), spanned)
            audit.list_entries(session, PageRequest(1, first.next_token), spanned)
        assert len(found) == 2, "a sort, or a second statement"
        assert all("USING INDEX ix_audit_log" in plan for plan in found)
        assert "created_at<?" in found[1]

    @pytest.mark.parametrize("wanted", FILTERS)
    def test_an_export_goes_on_from_its_last_entry(
        self, log: Database, wanted: AuditFilter
    ) -> None:
        with log.read() as session, plans(log) as found:
            rows = views.audit_after(session, 4, wanted, 100)
        assert numbers_of(rows) == sorted(number for number in expected(wanted) if number >= 4)
        assert found == ["SEARCH audit_log USING INTEGER PRIMARY KEY (rowid>?)"]
