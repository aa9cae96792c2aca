"""The counts of changes that every call must notice at once, and the cheap way to read them.

Reading stands on the path of every call, so it goes past the session: one prepared statement on a connection of its
own, outside any transaction, one round trip on PostgreSQL. On SQLite it is left out where nothing has been committed
since the last time.
"""

import mmap
import threading
from contextlib import suppress
from pathlib import Path
from typing import Any, Final, NamedTuple

from sqlalchemy import Engine, insert, select, update
from sqlalchemy.orm import Session

from qflare_server.errors import StoreUnavailableError
from qflare_server.models import Epoch

EPOCHS = Epoch.__table__
ROW: Final = 1
MARK_BYTES: Final = 96
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


class CommitMark:
    """Bytes that are others after each commit to an SQLite database, by whatever process: without asking SQLite.

    They are both copies of the header of its WAL index (sqlite.org/walformat.html, section 2.1), which counts commits
    and lies in a file that all connections share in memory. What they mean does not matter here: as long as they are
    the same, nothing has been committed.

    Args:
        database: Path of the database file.
    """

    def __init__(self, database: str) -> None:
        self._path = f"{database}-shm"
        self._shared: mmap.mmap | None = None

    def open(self) -> None:
        """Map the file; a connection that has read holds it from then on."""
        with suppress(OSError, ValueError), Path(self._path).open("rb") as file:
            self._shared = mmap.mmap(file.fileno(), MARK_BYTES, access=mmap.ACCESS_READ)

    def read(self) -> bytes:
        """Return the mark of this moment, empty where there is none."""
        shared = self._shared
        return b"" if shared is None else shared[:]

    def close(self) -> None:
        """Forget the file: nothing holds it any more."""
        self._shared = None


class EpochReader:
    """Reads the counts as they are committed; safe to share between threads."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._lock = threading.Lock()
        self._connection: Any = None
        self._commits = _commit_mark(engine)
        self._known: tuple[bytes, Epochs] | None = None
        self._begun_count = 0
        self._read_number = 0  # of the last read that succeeded

    def read(self) -> Epochs:
        """Return the counts of this moment; zeros before the first change.

        Raises:
            StoreUnavailableError: The database cannot be reached; the next call connects again.
        """
        begun = self._begun_count
        known, mark = self._known, self._commits.read() if self._commits is not None else b""
        if mark and known is not None and known[0] == mark:
            return known[1]
        with self._lock:
            if self._known is not None and self._read_number > begun:
                return self._known[
                    1
                ]  # that read began after this call came: it saw all that this one would see
            self._begun_count += 1
            self._known = mark, self._read_again()
            self._read_number = self._begun_count
            return self._known[1]

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
        if self._commits is not None and not self._commits.read():
            self._commits.open()
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
        if self._commits is not None:
            self._commits.close()
        if connection is not None:
            with suppress(Exception):
                connection.close()

    def close(self) -> None:
        """Close the connection."""
        with self._lock:
            self._drop()


def _commit_mark(engine: Engine) -> CommitMark | None:
    is_sqlite = engine.dialect.name == "sqlite"
    return CommitMark(engine.url.database) if is_sqlite and engine.url.database else None


def current(session: Session) -> Epochs:
    """Return the counts as a transaction sees them."""
    row = session.execute(select(EPOCHS.c.security, EPOCHS.c.rounds)).one_or_none()
    return Epochs(0, 0) if row is None else Epochs(row[0], row[1])
