"""SQLAlchemy engines: URLs, pools, and the settings of each connection."""

import os
import select
import sqlite3
import time
from contextlib import suppress
from pathlib import Path
from typing import Any, Final, cast

import psycopg2
from sqlalchemy import URL, Connection, Engine, create_engine, event, exc, make_url
from sqlalchemy.pool import ConnectionPoolEntry

from qflare.files import make_private_folder
from qflare_server.config import ServerConfig
from qflare_server.storage.postgresql import bound_waits, connect_arguments
from qflare_server.storage.prepared import sqlalchemy_error

IDLE_SINCE: Final = "qflare_idle_since"
PING_AFTER_S: Final = 30.0
_IN_MEMORY: Final = ":memory:"


def normalize_url(text: str) -> URL:
    """Return the URL with its driver spelled out: SQLAlchemy 2.1 reads a bare postgresql:// as psycopg 3.

    Raises:
        ValueError: The URL is neither an SQLite nor a PostgreSQL URL.
    """
    try:
        url = make_url(text)
    except (exc.ArgumentError, ValueError) as error:  # ValueError: a port that is no number
        raise ValueError("database URL: not a URL") from error
    if url.drivername in {"postgres", "postgresql"}:
        url = url.set(drivername="postgresql+psycopg2")
    if url.drivername not in {"sqlite", "postgresql+psycopg2"}:
        raise ValueError(f"database URL: got {url.drivername}, want sqlite or postgresql")
    if url.drivername == "sqlite" and (not url.database or url.database == _IN_MEMORY):
        raise ValueError("database URL: an SQLite database needs a file")
    return url


def make_engine(config: ServerConfig) -> Engine:
    """Build an engine with the settings of its dialect. Does not connect; creates the folder of an SQLite file."""
    url = normalize_url(config.database_url)
    if url.drivername == "sqlite":
        if url.database and not url.database.startswith("file:"):
            make_private_file(Path(url.database))
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
    engine = create_engine(
        url.difference_update_query(["options"]),
        pool_size=config.database_pool_size,
        max_overflow=0,
        pool_timeout=config.database_timeout_s,
        pool_recycle=1800,
        isolation_level="READ COMMITTED",
        connect_args=connect_arguments(config, url),
    )
    bound_waits(engine, config)
    event.listen(engine, "checkin", _note_idle)
    event.listen(engine, "checkout", _require_alive)
    return engine


def make_private_file(path: Path) -> None:
    """Make an empty database file and its folder for their owner only, where they are missing.

    SQLite gives the files that it puts beside it, with the write-ahead log, the same permissions.
    """
    make_private_folder(path.parent)
    with suppress(FileExistsError):
        os.close(os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY | os.O_CLOEXEC, 0o600))


def _note_idle(_connection: Any, entry: ConnectionPoolEntry) -> None:
    entry.info[IDLE_SINCE] = time.monotonic()


def _require_alive(connection: Any, entry: ConnectionPoolEntry, _proxy: Any) -> None:
    """Raise DisconnectionError for a dead connection, so that the pool replaces it.

    A connection that was used recently is not pinged: a server that ends a connection sends a message or closes the
    socket, so the socket of a dead idle connection is readable, and that of a live one is not.
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
    """Turn off the driver's implicit transactions and set the pragmas of a connection."""
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
    """Begin a write or a read transaction. A read transaction that starts to write could fail with a stale snapshot."""
    writing = connection.get_execution_options().get("qflare_write", False)
    statement = "BEGIN IMMEDIATE" if writing else "BEGIN"
    raw = cast("sqlite3.Connection", connection.connection.dbapi_connection)
    try:
        raw.execute(statement)
    except sqlite3.Error as error:
        raise sqlalchemy_error(connection.dialect, statement, error) from error
