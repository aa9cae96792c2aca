"""Engine, dialect settings and the only two ways to a transaction.

`Database.read()` is a block of consistent reads. `Database.write(work)` runs `work(session)` in a transaction;
`work` holds everything that must be true together, keeps no state outside, and may be run again. An error that
leaves `work` undoes all that it wrote, and nothing else.

On SQLite one thread owns the writing connection and commits many works together, each in a savepoint: requests
never fight for the file lock, and one fsync serves them all. On PostgreSQL the calling thread runs its own
transaction and repeats it after a serialization failure or a deadlock.
"""

import logging
import queue
import select
import sqlite3
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Final, TypeVar, cast

import psycopg2
from sqlalchemy import URL, Connection, Engine, create_engine, event, exc, make_url
from sqlalchemy.orm import Session
from sqlalchemy.pool import ConnectionPoolEntry

from qflare_server.config import ServerConfig
from qflare_server.errors import ConflictError, QflareError, StorageFullError, StoreUnavailableError
from qflare_server.repository.epochs import EpochReader, Epochs
from qflare_server.repository.prepared import sqlalchemy_error

logger = logging.getLogger(__name__)

IDLE_SINCE: Final = "qflare_idle_since"
PING_AFTER_S: Final = 30.0
GROUP_LIMIT: Final = 128  # works in one commit; past a few dozen the fsync is no longer what costs
WRITE_ATTEMPTS: Final = 8
SQLITE_ERROR: Final = 1  # primary result codes, sqlite.org/rescode.html: a faulty statement
SQLITE_FULL: Final = 13
POSTGRES_RETRY: Final = frozenset({"40001", "40P01"})  # serialization_failure, deadlock_detected
POSTGRES_FULL: Final = frozenset({"53100"})  # disk_full

T = TypeVar("T")
Work = Callable[[Session], Any]


def normalise_url(text: str) -> URL:
    """Return the URL with its driver: SQLAlchemy 2.1 takes a bare postgresql:// for psycopg 3.

    Raises:
        ValueError: It is neither an SQLite nor a PostgreSQL URL.
    """
    try:
        url = make_url(text)
    except exc.ArgumentError as error:
        raise ValueError("database URL: not a URL") from error
    if url.drivername in {"postgres", "postgresql"}:
        url = url.set(drivername="postgresql+psycopg2")
    if url.drivername not in {"sqlite", "postgresql+psycopg2"}:
        raise ValueError(f"database URL: got {url.drivername}, want sqlite or postgresql")
    if url.drivername == "sqlite" and not url.database:
        raise ValueError("database URL: an SQLite database needs a file")
    return url


def make_engine(config: ServerConfig) -> Engine:
    """Build an engine with QFLARE's settings for the dialect; make an SQLite file's folder, connect to nothing."""
    url = normalise_url(config.database_url)
    if url.drivername == "sqlite":
        if url.database:
            Path(url.database).parent.mkdir(parents=True, exist_ok=True)
        engine = create_engine(
            url,
            pool_size=config.database_pool_size,
            max_overflow=0,
            pool_timeout=config.database_timeout_s,
            connect_args={"timeout": config.database_timeout_s, "check_same_thread": False},
        )
        event.listen(engine, "connect", _configure_sqlite)
        event.listen(engine, "begin", _begin_sqlite)
        return engine
    timeout_ms = int(config.database_timeout_s * 1000)
    engine = create_engine(
        url,
        pool_size=config.database_pool_size,
        max_overflow=0,
        pool_timeout=config.database_timeout_s,
        pool_recycle=1800,
        isolation_level="READ COMMITTED",
        connect_args={
            "application_name": "qflare",
            "connect_timeout": max(2, int(config.database_timeout_s)),
            "options": f"-c lock_timeout={timeout_ms} -c idle_in_transaction_session_timeout=60000",
        },
    )
    event.listen(engine, "checkin", _note_idle)
    event.listen(engine, "checkout", _require_alive)
    return engine


def _note_idle(_connection: Any, entry: ConnectionPoolEntry) -> None:
    entry.info[IDLE_SINCE] = time.monotonic()


def _require_alive(connection: Any, entry: ConnectionPoolEntry, _proxy: Any) -> None:
    """Have the pool replace a connection that is dead, without a round trip for one that was in use just now.

    A server that ends a connection says so or closes it: where nothing was asked there is nothing to read otherwise.
    """
    idle_s = time.monotonic() - entry.info.get(IDLE_SINCE, 0.0)
    if idle_s < PING_AFTER_S and not _has_input(connection):
        return
    try:
        with connection.cursor() as cursor:
            cursor.execute("SELECT 1")
        connection.rollback()
    except psycopg2.Error as error:
        raise exc.DisconnectionError("the server has closed the connection") from error


def _has_input(connection: Any) -> bool:
    poll = select.poll()
    poll.register(connection, select.POLLIN)
    return bool(poll.poll(0))


def _configure_sqlite(connection: sqlite3.Connection, _entry: ConnectionPoolEntry) -> None:
    """Take transactions into our own hands and set what must hold on every connection."""
    connection.isolation_level = None
    for pragma in (
        "page_size=8192",
        "journal_mode=WAL",
        "synchronous=FULL",
        "foreign_keys=ON",
        "cache_size=-16384",
        "journal_size_limit=67108864",
    ):
        connection.execute(f"PRAGMA {pragma}")


def _begin_sqlite(connection: Connection) -> None:
    """Begin as a writer or a reader; a reader that turned writer would lose its snapshot."""
    writing = connection.get_execution_options().get("qflare_write", False)
    statement = "BEGIN IMMEDIATE" if writing else "BEGIN"
    raw = cast("sqlite3.Connection", connection.connection.dbapi_connection)
    try:
        raw.execute(statement)
    except sqlite3.Error as error:
        raise sqlalchemy_error(connection.dialect, statement, error) from error


def translate(error: exc.SQLAlchemyError) -> QflareError | None:
    """Return the domain error that a database error stands for, None if it is a fault of ours."""
    if isinstance(error, exc.IntegrityError):
        return ConflictError("another call was faster; repeat the call")
    if isinstance(error, exc.TimeoutError):
        return StoreUnavailableError("no database connection became free in time")
    if not isinstance(error, exc.DBAPIError):
        return None
    if _is_full(error.orig):
        return StorageFullError()
    if getattr(error.orig, "pgcode", None) in POSTGRES_RETRY:
        return ConflictError("another call was faster; repeat the call")
    if _sqlite_code(error.orig) == SQLITE_ERROR:
        return None
    if error.connection_invalidated or isinstance(
        error, (exc.OperationalError, exc.InterfaceError)
    ):
        return StoreUnavailableError("the database cannot be reached")
    return None


@contextmanager
def domain_errors() -> Iterator[None]:
    """Turn a database's errors into the domain's, logged; what is a fault of ours goes through.

    Raises:
        ConflictError: A unique key or a lock was taken by somebody else.
        StorageFullError: The disk is full.
        StoreUnavailableError: The database cannot be reached.
    """
    try:
        yield
    except exc.SQLAlchemyError as error:
        translated = translate(error)
        if translated is None:
            raise
        _log(translated, error)
        raise translated from error


def _is_full(original: BaseException | None) -> bool:
    return (
        _sqlite_code(original) == SQLITE_FULL or getattr(original, "pgcode", None) in POSTGRES_FULL
    )


def _sqlite_code(original: BaseException | None) -> int | None:
    """Return the primary result code of an SQLite error; extended ones keep it in their low byte."""
    code = getattr(original, "sqlite_errorcode", None)
    return None if code is None else int(code) & 0xFF


def _log(translated: QflareError, error: exc.SQLAlchemyError) -> None:
    """Log what an operator may want to see: not that two calls met, and no statement with its values."""
    if not isinstance(translated, ConflictError):
        cause = getattr(error, "orig", None) or error
        logger.warning("database failed: %s: %s", type(cause).__name__, str(cause).strip()[:200])


class _GroupWriter:
    """The thread that owns the writing connection of an SQLite database."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine.execution_options(qflare_write=True)
        self._connection: Connection | None = None
        self._queue: queue.SimpleQueue[tuple[Work, Future[Any]] | None] = queue.SimpleQueue()
        self._stopped = False
        self._thread = threading.Thread(target=self._run, name="database-writer", daemon=True)
        self._thread.start()

    def submit(self, work: Work) -> Future[Any]:
        """Queue a work; the future is done once its group is durable."""
        if self._stopped:
            raise StoreUnavailableError("the database is closed")
        future: Future[Any] = Future()
        self._queue.put((work, future))
        return future

    def stop(self) -> None:
        """Finish what is queued and end the thread."""
        self._stopped = True
        self._queue.put(None)
        self._thread.join()

    def _run(self) -> None:
        while (group := self._next_group()) is not None:
            self._commit(group)
        self._disconnect()

    def _connected(self) -> Connection:
        """Return the writing connection, which is not the pool's: one that has failed is replaced."""
        if self._connection is None:
            self._connection = self._engine.connect()
            self._connection.detach()
        return self._connection

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
        """Run a group in one transaction; answer nobody before it is durable."""
        outcomes: list[tuple[Future[Any], Any, BaseException | None]] = []
        try:
            connection = self._connected()
            with connection.begin(), Session(connection, autoflush=False) as session:
                if len(group) == 1:  # its failure may undo the whole transaction
                    outcomes.append((group[0][1], group[0][0](session), None))
                    session.flush()
                else:
                    for work, future in group:
                        outcomes.append((future, *_in_savepoint(session, connection, work)))
                _require_transaction(connection)
        except Exception as error:  # noqa: BLE001 - whatever it is, every waiting caller must hear of it
            self._disconnect()
            for _work, future in group:
                future.set_exception(error)
            return
        for future, result, failure in outcomes:
            if failure is None:
                future.set_result(result)
            else:
                future.set_exception(failure)


def _require_transaction(connection: Connection) -> None:
    """Refuse to commit where SQLite has rolled the whole transaction back by itself, as on a full disk."""
    raw = cast("sqlite3.Connection", connection.connection.dbapi_connection)
    if not raw.in_transaction:
        raise StorageFullError


def _in_savepoint(
    session: Session, connection: Connection, work: Work
) -> tuple[Any, BaseException | None]:
    """Run one work of a group; its failure undoes its own writes only."""
    connection.exec_driver_sql("SAVEPOINT work")
    try:
        result = work(session)
        session.flush()
    except Exception as error:  # noqa: BLE001 - handed to the caller that waits for this work
        _require_transaction(connection)
        session.expunge_all()
        connection.exec_driver_sql("ROLLBACK TO work")
        connection.exec_driver_sql("RELEASE work")
        return None, error
    session.expunge_all()
    connection.exec_driver_sql("RELEASE work")
    return result, None


class Database:
    """One database and its connections; safe to share between threads.

    Args:
        engine: From `make_engine`.
        timeout_s: Seconds that a write waits for its commit before StoreUnavailableError.
    """

    def __init__(self, engine: Engine, *, timeout_s: float = 30.0) -> None:
        self.engine = engine
        self.is_sqlite = engine.dialect.name == "sqlite"
        self._timeout_s = timeout_s
        self._epochs = EpochReader(engine)
        self._writer = _GroupWriter(engine) if self.is_sqlite else None

    def epochs(self) -> Epochs:
        """Return the counts of changes that every call must notice at once.

        Raises:
            StoreUnavailableError: The database cannot be reached.
        """
        return self._epochs.read()

    @contextmanager
    def read(self) -> Iterator[Session]:
        """Open a block of consistent reads; nothing written in it stays.

        Raises:
            StoreUnavailableError: The database cannot be reached.
        """
        with domain_errors(), Session(self.engine, autoflush=False) as session:
            yield session

    def write(self, work: Callable[[Session], T]) -> T:
        """Run `work` in a transaction and return its result once that is durable.

        Raises:
            ConflictError: A unique key or a lock was taken by somebody else: repeat the whole call.
            StorageFullError: The disk is full.
            StoreUnavailableError: The database cannot be reached.
        """
        try:
            with domain_errors():
                if self._writer is not None:
                    return cast("T", self._writer.submit(work).result(timeout=self._timeout_s))
                return self._write_alone(work)
        except TimeoutError as error:
            raise StoreUnavailableError("the database did not commit in time") from error

    def _write_alone(self, work: Callable[[Session], T]) -> T:
        for attempt in range(1, WRITE_ATTEMPTS + 1):
            try:
                with (
                    Session(self.engine, autoflush=False, expire_on_commit=False) as session,
                    session.begin(),
                ):
                    return work(session)
            except exc.DBAPIError as error:
                code = getattr(error.orig, "pgcode", None)
                if code not in POSTGRES_RETRY or attempt == WRITE_ATTEMPTS:
                    raise
        raise AssertionError("unreachable")

    def close(self) -> None:
        """Finish queued writes and close every connection."""
        if self._writer is not None:
            self._writer.stop()
        self._epochs.close()
        self.engine.dispose()
