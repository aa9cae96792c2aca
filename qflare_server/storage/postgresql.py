"""PostgreSQL connections: their arguments, and a bound on every wait for the server.

A blocking driver cannot distinguish a network path that fails without a reset, a stopped server process and a statement
that never ends. TCP detects the first (`tcp_user_timeout`, keepalives), the server ends long statements
(`statement_timeout`), and `WaitWatchdog` shuts down the socket in all remaining cases, so that a call is answered
within `QFLARE_DATABASE_TIMEOUT_S`.
"""

import os
import socket
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from typing import Any, Final, TypeVar

import psycopg2
import psycopg2.extensions
from sqlalchemy import URL, Engine, event

from qflare_server.config import ServerConfig

SLACK_S: Final = 1.0
"""Added to the timeout, so that the server ends a statement first, which keeps the connection usable."""
RETRY_CONNECT_S: Final = 1.0
"""Pause after a slow failed connect, during which calls fail at once instead of each waiting for a timeout."""
SLOW_CONNECT_S: Final = 0.5
IDLE_S: Final = 3.0
"""Time without a wait after which a watchdog's thread ends, so that none outlives its engine."""

T = TypeVar("T")


class WaitWatchdog:
    """Shuts down the sockets of connections whose server has not answered in time; thread-safe.

    Its thread runs while there are waits, and for `IDLE_S` after the last one.

    Args:
        limit_s: Longest wait for one answer, in seconds.
    """

    def __init__(self, limit_s: float) -> None:
        self._limit_s = limit_s
        self._waits: dict[int, tuple[float, BoundedConnection]] = {}
        self._started = threading.Lock()
        self._thread: threading.Thread | None = None

    def wait(self, connection: "BoundedConnection", call: Callable[[], T]) -> T:
        """Run a blocking call of the driver; past the limit it fails like a call on a reset connection."""
        key = id(connection)
        self._waits[key] = time.monotonic(), connection
        try:
            if self._thread is None:  # after the entry: a thread that ends looks for entries last
                self._start()
            return call()
        finally:
            self._waits.pop(key, None)

    def _start(self) -> None:
        with self._started:
            if self._thread is None:
                thread = threading.Thread(target=self._run, name="database-watchdog", daemon=True)
                try:
                    thread.start()
                except RuntimeError as error:  # the limit of the process or of the machine
                    raise psycopg2.OperationalError(f"no watchdog: {error}") from error
                self._thread = thread

    def _run(self) -> None:
        latest = time.monotonic()
        while True:
            time.sleep(min(1.0, self._limit_s / 4))
            now = time.monotonic()
            for key, entry in list(self._waits.items()):
                latest = max(latest, now)
                if now - entry[0] > self._limit_s and self._waits.get(key) is entry:
                    _shut(entry[1])
            if now - latest > IDLE_S and self._ended():
                return

    def _ended(self) -> bool:
        """Give the thread up; return False if there is a wait again."""
        with self._started:
            mine, self._thread = self._thread, None
            if self._waits:
                self._thread = mine
            return self._thread is None


def _shut(connection: "BoundedConnection") -> None:
    """Shut down a connection's socket: the thread that waits on it wakes up and closes the connection."""
    with (
        suppress(psycopg2.Error, OSError),
        socket.socket(fileno=os.dup(connection.fileno())) as line,
    ):
        line.shutdown(socket.SHUT_RDWR)


class BoundedConnection(psycopg2.extensions.connection):
    """A connection whose waits the watchdog bounds; unbounded where `watchdog` is None, as during migrations."""

    watchdog: WaitWatchdog | None = None

    def bounded(self, call: Callable[[], T]) -> T:
        """Run a blocking call of the driver under the watchdog."""
        return call() if self.watchdog is None else self.watchdog.wait(self, call)

    def commit(self) -> None:
        """Commit."""
        self.bounded(super().commit)

    def rollback(self) -> None:
        """Roll back."""
        self.bounded(super().rollback)


class BoundedCursor(psycopg2.extensions.cursor):
    """A cursor of a `BoundedConnection`."""

    def execute(self, query: Any, vars: Any = None) -> None:  # noqa: A002 - the driver's name
        """Run a statement."""
        _connection_of(self).bounded(lambda: super(BoundedCursor, self).execute(query, vars))

    def executemany(self, query: Any, vars_list: Any) -> None:
        """Run a statement for each of several sets of parameters; the limit holds for all of them together."""
        _connection_of(self).bounded(
            lambda: super(BoundedCursor, self).executemany(query, vars_list)
        )

    def fetchone(self) -> tuple[Any, ...] | None:
        """Return the next row; a named cursor fetches it from the server."""
        if self.name is None:
            return super().fetchone()
        return _connection_of(self).bounded(lambda: super(BoundedCursor, self).fetchone())

    def fetchmany(self, size: int | None = None) -> list[tuple[Any, ...]]:
        """Return the next rows; a named cursor fetches them from the server."""
        wanted = self.arraysize if size is None else size
        if self.name is None:
            return super().fetchmany(wanted)
        return _connection_of(self).bounded(lambda: super(BoundedCursor, self).fetchmany(wanted))

    def fetchall(self) -> list[tuple[Any, ...]]:
        """Return the remaining rows; a named cursor fetches them from the server."""
        if self.name is None:
            return super().fetchall()
        return _connection_of(self).bounded(lambda: super(BoundedCursor, self).fetchall())

    def copy_expert(self, sql: Any, file: Any, size: int = 8192) -> None:
        """Run a COPY."""
        _connection_of(self).bounded(
            lambda: super(BoundedCursor, self).copy_expert(sql, file, size)
        )


def _connection_of(cursor: BoundedCursor) -> BoundedConnection:
    connection = cursor.connection
    assert isinstance(connection, BoundedConnection)
    return connection


def connect_arguments(config: ServerConfig, url: URL) -> dict[str, Any]:
    """Return the arguments of a connection; arguments in the URL take precedence."""
    timeout_ms = int(config.database_timeout_s * 1000)
    ours = {
        "application_name": "qflare",
        "connect_timeout": max(2, int(config.database_timeout_s)),
        "keepalives_idle": 10,
        "keepalives_interval": 5,
        "keepalives_count": 3,
        "tcp_user_timeout": timeout_ms,
    }
    settings = (
        f"-c lock_timeout={timeout_ms} -c statement_timeout={timeout_ms}"
        " -c idle_in_transaction_session_timeout=60000"
    )
    given = url.query.get("options", "")
    options = f"{settings} {given if isinstance(given, str) else ' '.join(given)}".strip()
    return {name: value for name, value in ours.items() if name not in url.query} | {
        "options": options,
        "connection_factory": BoundedConnection,
        "cursor_factory": BoundedCursor,
    }


def bound_waits(engine: Engine, config: ServerConfig) -> None:
    """Bound the waits of an engine's connections, require synchronous commits, and pause after a failed connect."""
    watchdog = WaitWatchdog(config.database_timeout_s + SLACK_S)
    failed_at = [float("-inf")]

    @event.listens_for(engine, "do_connect")
    def _connect(dialect: Any, _record: Any, arguments: Any, parameters: Any) -> Any:
        if time.monotonic() - failed_at[0] < RETRY_CONNECT_S:
            raise psycopg2.OperationalError("the last attempt to connect failed a moment ago")
        started = time.monotonic()
        try:
            connection = dialect.connect(*arguments, **parameters)
        except psycopg2.OperationalError:
            if time.monotonic() - started > SLOW_CONNECT_S:
                failed_at[0] = time.monotonic()
            raise
        connection.watchdog = watchdog
        return connection

    event.listen(engine, "connect", _require_synchronous_commit)


def _require_synchronous_commit(connection: Any, _entry: object) -> None:
    """Turn synchronous commits on where the server has them off: receipts promise durability."""
    with connection.cursor() as cursor:
        cursor.execute("SHOW synchronous_commit")
        if cursor.fetchone() == ("off",):
            cursor.execute("SET SESSION synchronous_commit TO on")
    connection.commit()


def lift_bounds(connection: Any) -> None:
    """Remove the bounds of a connection: a migration may rewrite whole tables."""
    connection.watchdog = None
    with connection.cursor() as cursor:
        cursor.execute("SET statement_timeout TO 0")
