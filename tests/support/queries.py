"""Statements that the threads of calls send to a coordinator's database."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from sqlalchemy import event

CALL_THREADS = ("device-", "anonymous-", "Thread-")


@contextmanager
def counted_queries(deployment: Any) -> Iterator[list[str]]:
    """Give the statements that threads of calls send to the database, and reads of the counts of changes."""
    database = deployment.coordinator.parts.database
    statements: list[str] = []

    def note(_connection: Any, _cursor: Any, statement: str, *_others: Any) -> None:
        if threading.current_thread().name.startswith(CALL_THREADS):
            statements.append(statement)

    event.listen(database.engine, "before_cursor_execute", note)
    reads = database._epochs.read_count
    try:
        yield statements
    finally:
        event.remove(database.engine, "before_cursor_execute", note)
        statements += ["epochs"] * (database._epochs.read_count - reads)
