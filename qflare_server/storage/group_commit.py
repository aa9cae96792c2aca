"""Group commit: one thread writes to SQLite and commits many units of work in one transaction."""

import queue
import sqlite3
import threading
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from contextlib import suppress
from pathlib import Path
from typing import Any, Final, TypeVar, cast

from sqlalchemy import Connection, Engine, exc
from sqlalchemy.orm import Session

from qflare_server.errors import StorageFullError, StoreUnavailableError
from qflare_server.storage.epochs import are_changed
from qflare_server.storage.file_identity import FileIdentity

GROUP_LIMIT: Final = 128  # units of work per commit; past a few dozen the fsync no longer dominates
WRITE_ATTEMPTS: Final = 8

T = TypeVar("T")
Work = Callable[[Session], Any]
Outcome = tuple[Future[Any], Any, BaseException | None]


class GroupWriter:
    """Owns the writing connection of an SQLite database, in a thread of its own.

    Args:
        engine: Of an SQLite database.
        info: Copied into the `info` of every session.
        invalidate: Called after the commit of a group that has changed the epochs, before its futures are done.
    """

    def __init__(
        self, engine: Engine, info: Mapping[str, Any], invalidate: Callable[[], None]
    ) -> None:
        self._info = dict(info)
        self._invalidate = invalidate
        self._epochs_changed = False
        self._engine = engine.execution_options(qflare_write=True)
        self._connection: Connection | None = None
        self._file: FileIdentity | None = None
        self._queue: queue.SimpleQueue[tuple[Work, Future[Any]] | None] = queue.SimpleQueue()
        self._stopped = False
        self._thread = threading.Thread(target=self._run, name="database-writer", daemon=True)
        self._thread.start()

    def submit(self, work: Work) -> Future[Any]:
        """Queue a unit of work; its future is done once the group is durable."""
        if self._stopped:
            raise StoreUnavailableError("the database is closed")
        future: Future[Any] = Future()
        self._queue.put((work, future))
        return future

    def stop(self) -> None:
        """Finish queued work and end the thread."""
        self._stopped = True
        self._queue.put(None)
        self._thread.join()

    def _run(self) -> None:
        while (group := self._next_group()) is not None:
            self._commit(group)
        self._disconnect()

    def _connected(self) -> Connection:
        """Return the writing connection, detached from the pool; opened again after a failure."""
        if self._connection is None:
            self._connection = self._engine.connect()
            self._connection.detach()
            if self._file is None:  # set once: the file that this process opened first
                self._file = FileIdentity(Path(self._engine.url.database or ""))
        return self._connection

    def require_file(self) -> None:
        """Check that the database file is the one that this process opened first.

        Raises:
            StoreUnavailableError: It was deleted or replaced.
        """
        if self._file is not None:
            self._file.require()

    def _disconnect(self) -> None:
        connection, self._connection = self._connection, None
        if connection is not None:
            with suppress(exc.SQLAlchemyError):
                connection.close()

    def _next_group(self) -> list[tuple[Work, Future[Any]]] | None:
        item = self._queue.get()
        if item is None:
            return None
        group = [item]
        while len(group) < GROUP_LIMIT and not self._queue.empty():
            item = self._queue.get()
            if item is None:
                self._queue.put(None)
                break
            group.append(item)
        return group

    def _commit(self, group: list[tuple[Work, Future[Any]]]) -> None:
        """Run a group in one transaction; no future is done before the transaction is durable."""
        try:
            outcomes = self._committed(group)
        except Exception as error:  # noqa: BLE001 - passed on to every waiting caller
            self._disconnect()
            for _work, future in group:
                future.set_exception(error)
            return
        for future, result, failure in outcomes:
            if failure is None:
                future.set_result(result)
            else:
                future.set_exception(failure)

    def _committed(self, group: list[tuple[Work, Future[Any]]]) -> list[Outcome]:
        """Run a group in one transaction and return each future with its result or failure, once durable."""
        outcomes: list[Outcome] = []
        self._epochs_changed = False
        try:
            connection = self._connected()
            with connection.begin():
                if len(group) == 1:  # its failure may undo the whole transaction
                    outcomes.append((group[0][1], self._done(connection, group[0][0]), None))
                else:
                    for work, future in group:
                        outcomes.append((future, *self._done_in_savepoint(connection, work)))
                _require_transaction(connection)
        finally:  # a commit that reports a failure may have succeeded
            if self._epochs_changed:
                self._invalidate()
        self.require_file()
        return outcomes

    def _done(self, connection: Connection, work: Work) -> Any:
        """Run one unit of work in a session of its own."""
        with Session(connection, autoflush=False, info=self._info) as session:
            result = work(session)
            session.flush()
            self._epochs_changed |= are_changed(session)
            return result

    def _done_in_savepoint(
        self, connection: Connection, work: Work
    ) -> tuple[Any, BaseException | None]:
        """Run one unit of work in a savepoint; its failure undoes only its own writes."""
        connection.exec_driver_sql("SAVEPOINT work")
        try:
            result = self._done(connection, work)
        except Exception as error:  # noqa: BLE001 - handed to the caller that waits for this work
            _require_transaction(connection)
            connection.exec_driver_sql("ROLLBACK TO work")
            connection.exec_driver_sql("RELEASE work")
            return None, error
        connection.exec_driver_sql("RELEASE work")
        return result, None


def _require_transaction(connection: Connection) -> None:
    """Raise StorageFullError if SQLite has rolled the whole transaction back by itself, as on a full disk."""
    raw = cast("sqlite3.Connection", connection.connection.dbapi_connection)
    if not raw.in_transaction:
        raise StorageFullError
