"""Transactions: `Database.read` and `Database.write`, the only two ways to open one.

`Database.read()` is a block of consistent reads. `Database.write(work)` runs `work(session)` in a transaction. `work`
makes all changes that belong together, keeps no state outside, and may run more than once. An exception raised by
`work` undoes everything that it wrote, and nothing else.

On SQLite one thread owns the writing connection and commits many units of work together, each in a savepoint: calls do
not compete for the file lock, and one fsync serves them all. On PostgreSQL the calling thread runs its own transaction
and repeats it after a serialization failure or a deadlock.
"""

import logging
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from typing import cast

from sqlalchemy import Engine, exc, text
from sqlalchemy.orm import Session

from qflare_server.errors import StorageDamagedError, StoreUnavailableError
from qflare_server.storage.epochs import EpochReader, Epochs, are_changed
from qflare_server.storage.error_translation import POSTGRES_RETRY, domain_errors
from qflare_server.storage.group_commit import WRITE_ATTEMPTS, GroupWriter, T
from qflare_server.storage.steady_clock import SteadyClock
from qflare_server.storage.training_configs import INFO_KEY, ParsedConfigs

logger = logging.getLogger(__name__)

_SERVER_STATE = text(
    "SELECT pg_is_in_recovery() OR current_setting('transaction_read_only') = 'on', clock_timestamp()"
)


class Database:
    """One database and its connections; thread-safe.

    Args:
        engine: From `make_engine`.
        timeout_s: Longest wait of a write for its commit, in seconds; then StoreUnavailableError is raised.
    """

    def __init__(self, engine: Engine, *, timeout_s: float = 30.0) -> None:
        self.engine = engine
        self.is_sqlite = engine.dialect.name == "sqlite"
        self._timeout_s = timeout_s
        self._epochs = EpochReader(engine)
        self._info = {INFO_KEY: ParsedConfigs()}
        self._writer = (
            GroupWriter(engine, self._info, self._epochs.invalidate) if self.is_sqlite else None
        )
        self._damage: StorageDamagedError | None = None
        self._server_time: tuple[datetime, float] | None = None
        self._steady_clock = SteadyClock()

    def epochs(self) -> Epochs:
        """Return the counters of changes that invalidate caches.

        Raises:
            StoreUnavailableError: The database cannot be reached.
        """
        return self._epochs.read()

    def recent_epochs(self) -> Epochs:
        """Return the counters from memory: all changes of this process, those of others within `epochs.MAX_AGE_S`.

        Raises:
            StoreUnavailableError: They are older than that, and the database cannot be reached.
        """
        return self._epochs.recent()

    def epochs_snapshot(self) -> Epochs | None:
        """Return what `recent_epochs` returns without a read; None if that takes one."""
        return self._epochs.snapshot()

    @contextmanager
    def read(self) -> Iterator[Session]:
        """Open a block of consistent reads; anything written in it is rolled back.

        Raises:
            StoreUnavailableError: The database cannot be reached.
        """
        with self._errors(), Session(self.engine, autoflush=False, info=self._info) as session:
            yield session

    def write(self, work: Callable[[Session], T]) -> T:
        """Run `work` in a transaction and return its result once the transaction is durable.

        Raises:
            ConflictError: A unique key exists already, or a lock was not granted: retry the whole call.
            StorageFullError: The disk is full.
            StoreUnavailableError: The database cannot be reached.
        """
        try:
            with self._errors():
                if self._writer is not None:
                    return cast("T", self._writer.submit(work).result(timeout=self._timeout_s))
                return self._write_alone(work)
        except TimeoutError as error:
            raise StoreUnavailableError("the database did not commit in time") from error

    def _write_alone(self, work: Callable[[Session], T]) -> T:
        for attempt in range(1, WRITE_ATTEMPTS + 1):
            try:
                return self._attempt(work)
            except exc.DBAPIError as error:
                code = getattr(error.orig, "pgcode", None)
                if code not in POSTGRES_RETRY or attempt == WRITE_ATTEMPTS:
                    raise
        raise AssertionError("unreachable")

    def _attempt(self, work: Callable[[Session], T]) -> T:
        with Session(self.engine, autoflush=False, info=self._info) as session:
            try:
                with session.begin():
                    return work(session)
            finally:  # the commit may have succeeded even if its response was lost
                if are_changed(session):
                    self._epochs.invalidate()

    def check(self) -> None:
        """Check that the database can be read and written. Called once a second for the health service.

        Raises:
            StorageDamagedError: A page has been unreadable since the process started.
            StoreUnavailableError: The database does not answer or is read-only, or its file is gone.
        """
        if self._damage is not None:
            raise self._damage
        if self._writer is not None:
            self._writer.require_file()
        with self.read() as session:
            if self.is_sqlite:
                session.execute(text("SELECT 1"))
            else:
                self._check_server(session)

    def _check_server(self, session: Session) -> None:
        asked = time.monotonic()
        is_read_only, at = session.execute(_SERVER_STATE).one()
        if is_read_only:
            self.engine.dispose()  # pooled connections lead to a server that is a standby now
            raise StoreUnavailableError("the database is read-only")
        self._server_time = at, (asked + time.monotonic()) / 2

    def clock(self) -> datetime:
        """Return the time in UTC by the clock of the database server, which all coordinators on it share.

        Deadlines and leases written by one coordinator are read by others, whose own clocks may differ by minutes.
        `check` queries the server once a second; in between, the monotonic clock of the process extrapolates. On SQLite
        this is the clock of the machine, without its jumps.
        """
        if self.is_sqlite:
            return self._steady_clock()
        if self._server_time is None:
            self.check()
        assert self._server_time is not None
        at, answered = self._server_time
        return (at + timedelta(seconds=time.monotonic() - answered)).astimezone(UTC)

    @contextmanager
    def _errors(self) -> Iterator[None]:
        """Translate errors, and record damage, after which no read can be trusted."""
        try:
            with domain_errors():
                yield
        except StorageDamagedError as error:
            self._damage = error
            raise

    def close(self) -> None:
        """Finish queued writes and close all connections."""
        if self._writer is not None:
            self._writer.stop()
        self._epochs.close()
        self.engine.dispose()
