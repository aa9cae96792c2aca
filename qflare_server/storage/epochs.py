"""The counts of changes that every call must notice at once, and the cheap way to read them.

Reading stands on the path of every call, so it goes past the session: one prepared statement on a connection of its
own, outside any transaction, a few microseconds on SQLite and one round trip on PostgreSQL; calls that come at the same
time share it. To look at SQLite's shared memory instead would be cheaper still, but a process that closes any
descriptor of that file loses all its locks on it (sqlite.org/howtocorrupt.html, section 2.2).
"""

import threading
from contextlib import suppress
from typing import Any, Final, NamedTuple

from sqlalchemy import Engine, insert, select, update
from sqlalchemy.orm import Session

from qflare_server.errors import StoreUnavailableError
from qflare_server.storage.tables import Epoch

EPOCHS = Epoch.__table__
ROW: Final = 1
_READ: Final = "SELECT security, rounds FROM epochs WHERE id = 1"


class Epochs(NamedTuple):
    """How often who may call, and what there is to do, have changed."""

    security: int
    rounds: int


def bump_security(session: Session) -> None:
    """Count a change of who may call: devices, their states and keys, tokens revoked."""
    _bump(session, "security")


def bump_rounds(session: Session) -> None:
    """Count a change that may give a device something to do: a round opened or resumed."""
    _bump(session, "rounds")


def _bump(session: Session, column: str) -> None:
    changed = session.execute(
        update(EPOCHS).where(EPOCHS.c.id == ROW).values({column: EPOCHS.c[column] + 1})
    )
    if changed.rowcount == 0:  # type: ignore[attr-defined]  # a DML result has it
        session.execute(insert(EPOCHS).values({"id": ROW, "security": 0, "rounds": 0, column: 1}))


class EpochReader:
    """Reads the counts as they are committed; safe to share between threads."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._lock = threading.Lock()
        self._connection: Any = None
        self._known = Epochs(0, 0)
        self._begun_count = 0
        self._read_number = 0  # of the read that gave what is known

    def read(self) -> Epochs:
        """Return the counts of this moment; zeros before the first change.

        Raises:
            StoreUnavailableError: The database cannot be reached; the next call connects again.
        """
        begun_count = self._begun_count
        with self._lock:
            if self._read_number > begun_count:  # begun after this call came
                return self._known
            self._begun_count += 1
            self._known = self._read_again()
            self._read_number = self._begun_count
            return self._known

    def _read_again(self) -> Epochs:
        try:
            return self._read()
        except Exception:  # noqa: BLE001 - a connection that broke while idle heals by itself
            self._drop()
        try:
            return self._read()
        except Exception as error:
            self._drop()
            raise StoreUnavailableError("the database cannot be reached") from error

    def _read(self) -> Epochs:
        if self._connection is None:
            self._connection = self._connect()
        cursor = self._connection.cursor()
        try:
            cursor.execute(_READ)
            row = cursor.fetchone()
        finally:
            cursor.close()
        return Epochs(0, 0) if row is None else Epochs(row[0], row[1])

    def _connect(self) -> Any:
        """Take a connection out of the pool for good, set to see every commit at once."""
        pooled = self._engine.raw_connection()
        connection: Any = pooled.dbapi_connection
        pooled.detach()
        if self._engine.dialect.name == "postgresql":
            connection.autocommit = True
        return connection

    def _drop(self) -> None:
        connection, self._connection = self._connection, None
        if connection is not None:
            with suppress(Exception):
                connection.close()

    def close(self) -> None:
        """Close the connection."""
        with self._lock:
            self._drop()


def current(session: Session) -> Epochs:
    """Return the counts as a transaction sees them."""
    row = session.execute(select(EPOCHS.c.security, EPOCHS.c.rounds)).one_or_none()
    return Epochs(0, 0) if row is None else Epochs(row[0], row[1])
