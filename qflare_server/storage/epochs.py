"""Epochs: counters of changes that invalidate what coordinators cache, and a cheap way to read them.

Every call reads them, so the read bypasses the session: one statement on a dedicated connection, outside any
transaction. It takes a few microseconds on SQLite and one round trip on PostgreSQL; concurrent calls share one read.
Polls, which are most calls of a large fleet, accept a snapshot: it contains every change committed by this process, and
lacks a change of another process for at most `MAX_AGE_S`.
Reading SQLite's shared memory directly would be cheaper still, but a process that closes any descriptor of that file
drops all its locks on it (sqlite.org/howtocorrupt.html, section 2.2).
"""

import math
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from typing import Any, Final, NamedTuple

from sqlalchemy import Engine, insert, select, update
from sqlalchemy.orm import Session

from qflare_server.errors import StoreUnavailableError
from qflare_server.storage.tables import Epoch

EPOCHS = Epoch.__table__
ROW: Final = 1
MAX_AGE_S: Final = 1.0
"""Longest use of a snapshot, in seconds: how late polls notice a change that another process has committed."""
_CHANGED: Final = "epochs_changed"
_READ: Final = "SELECT security, rounds FROM epochs WHERE id = 1"


class Epochs(NamedTuple):
    """Values of the counters.

    Attributes:
        security: Changes of credentials: devices, their states and keys, revoked tokens.
        rounds: Changes that may give devices a task: rounds opened or resumed.
    """

    security: int
    rounds: int


def bump_security(session: Session) -> None:
    """Count a change of credentials: a device, its state or keys, a revoked token."""
    _bump(session, "security")


def bump_rounds(session: Session) -> None:
    """Count a change that may give devices a task: a round opened or resumed."""
    _bump(session, "rounds")


def are_changed(session: Session) -> bool:
    """Return whether a transaction has counted a change."""
    return _CHANGED in session.info


def _bump(session: Session, column: str) -> None:
    session.info[_CHANGED] = True
    changed = session.execute(
        update(EPOCHS).where(EPOCHS.c.id == ROW).values({column: EPOCHS.c[column] + 1})
    )
    if changed.rowcount == 0:  # type: ignore[attr-defined]  # a CursorResult has it
        session.execute(insert(EPOCHS).values({"id": ROW, "security": 0, "rounds": 0, column: 1}))


class EpochReader:
    """Reads the committed counters; thread-safe.

    Args:
        engine: Of the database.
        monotonic: Monotonic clock, in seconds.
    """

    def __init__(self, engine: Engine, monotonic: Callable[[], float] = time.monotonic) -> None:
        self._engine = engine
        self._monotonic = monotonic
        self._lock = threading.Lock()
        self._connection: Any = None
        self._known = Epochs(0, 0)
        self._begun_count = 0
        self._read_number = 0  # number of the read that returned `_known`
        self._snapshot = Epochs(0, 0), -math.inf  # counters, and when their read began
        self._changed_at = -math.inf

    @property
    def read_count(self) -> int:
        """Number of reads of the database so far."""
        return self._begun_count

    def recent(self) -> Epochs:
        """Return counters that lack no change of this process, and changes of others for at most `MAX_AGE_S`.

        Raises:
            StoreUnavailableError: The snapshot is too old, and the database cannot be reached.
        """
        return self.snapshot() or self.read()

    def snapshot(self) -> Epochs | None:
        """Return what `recent` returns without a read; None if that takes one."""
        known, began_at = self._snapshot
        is_recent = began_at > self._changed_at and self._monotonic() - began_at <= MAX_AGE_S
        return known if is_recent else None

    def invalidate(self) -> None:
        """Discard the snapshot, because a change has been committed; a read in progress may not have seen it."""
        self._changed_at = self._monotonic()

    def read(self) -> Epochs:
        """Return the current counters; zeros before the first change.

        Raises:
            StoreUnavailableError: The database cannot be reached; the next call connects again.
        """
        begun_count = self._begun_count
        with self._lock:
            if self._read_number > begun_count:  # that read began after this call
                return self._known
            self._begun_count += 1
            began_at = self._monotonic()
            self._known = self._read_again()
            self._snapshot = self._known, began_at
            self._read_number = self._begun_count
            return self._known

    def _read_again(self) -> Epochs:
        try:
            return self._read()
        except Exception:  # noqa: BLE001 - the connection broke while idle: connect again
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
        """Take a connection out of the pool for good, outside any transaction, so that it sees every commit."""
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
    """Return the counters as seen by a transaction."""
    row = session.execute(select(EPOCHS.c.security, EPOCHS.c.rounds)).one_or_none()
    return Epochs(0, 0) if row is None else Epochs(row[0], row[1])
