"""PostgreSQL connections: connection arguments, and a bound on every wait for the server.

A line that dies without a reset, a server process that is stopped and a statement that never ends all look the same
to a blocking driver: no answer. TCP ends what it can see (`tcp_user_timeout`, keepalives), the server ends its own
statements (`statement_timeout`), and `WaitWatchdog` shuts the socket of whatever is left, so that a call is answered
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
"""What the server gets on top of the timeout to end a statement by itself, which keeps the connection."""
RETRY_CONNECT_S: Final = 1.0
"""Rest after an attempt to connect that failed slowly: calls fail at once instead of each waiting as long."""
SLOW_CONNECT_S: Final = 0.5

T = TypeVar("T")


class WaitWatchdog:
    """Shuts the sockets of connections whose server has not answered in time; safe to share between threads.

    Args:
        limit_s: Longest wait for one answer, in seconds.
    """

    def __init__(self, limit_s: float) -> None:
        self._limit_s = limit_s
        self._waits: dict[int, tuple[float, BoundedConnection]] = {}
        self._stopped = threading.Event()
        self._started = threading.Lock()
        self._thread: threading.Thread | None = None

    def wait(self, connection: "BoundedConnection", call: Callable[[], T]) -> T:
        """Run a blocking call of the driver; if it takes too long, it fails as on a connection that was reset."""
        if self._thread is None:
            self._start()
        key = id(connection)
        self._waits[key] = time.monotonic(), connection
        try:
            return call()
        finally:
            self._waits.pop(key, None)

    def _start(self) -> None:
        with self._started:
            if self._thread is None:
                self._thread = threading.Thread(
                    target=self._run, name="database-watchdog", daemon=True
                )
                self._thread.start()

    def _run(self) -> None:
        while not self._stopped.wait(min(1.0, self._limit_s / 4)):
            now = time.monotonic()
            for key, entry in list(self._waits.items()):
                if now - entry[0] > self._limit_s and self._waits.get(key) is entry:
                    _shut(entry[1])

    def stop(self) -> None:
        """End the thread."""
        self._stopped.set()


def _shut(connection: "BoundedConnection") -> None:
    """Shut a connection's socket, which wakes the thread that waits for it; that thread closes the connection."""
    with (
        suppress(psycopg2.Error, OSError),
        socket.socket(fileno=os.dup(connection.fileno())) as line,
    ):
        line.shutdown(socket.SHUT_RDWR)


class BoundedConnection(psycopg2.extensions.connection):
    """A connection whose every wait is watched; `watchdog` None leaves it unbounded, for migrations."""

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

    def fetchmany(self, size: int | None = None) -> list[tuple[Any, ...]]:
        """Return the next rows; a cursor with a name asks the server for them."""
        wanted = self.arraysize if size is None else size
        if self.name is None:
            return super().fetchmany(wanted)
        return _connection_of(self).bounded(lambda: super(BoundedCursor, self).fetchmany(wanted))

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
    """Return the arguments of a connection; what the URL says of them holds."""
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
    """Have an engine's connections watched, made durable, and not retried by every caller while none can be made."""
    watchdog = WaitWatchdog(config.database_timeout_s + SLACK_S)
    failed_at = [float("-inf")]

    @event.listens_for(engine, "do_connect")
    def _connect(dialect: Any, _record: Any, arguments: Any, parameters: Any) -> Any:
        if time.monotonic() - failed_at[0] < RETRY_CONNECT_S:
            raise psycopg2.OperationalError("the database could not be reached a moment ago")
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
    """Make commits wait for the disk where the server's settings would not: receipts rely on it."""
    with connection.cursor() as cursor:
        cursor.execute("SHOW synchronous_commit")
        if cursor.fetchone() == ("off",):
            cursor.execute("SET SESSION synchronous_commit TO on")
    connection.commit()


def lift_bounds(connection: Any) -> None:
    """Let a connection take as long as it needs: a migration rewrites whole tables."""
    connection.watchdog = None
    with connection.cursor() as cursor:
        cursor.execute("SET statement_timeout TO 0")
