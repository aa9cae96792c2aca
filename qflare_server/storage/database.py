"""Engine, dialect settings and the only two ways to a transaction.

`Database.read()` is a block of consistent reads. `Database.write(work)` runs `work(session)` in a transaction;
`work` holds everything that must be true together, keeps no state outside, and may be run again. An error that
leaves `work` undoes all that it wrote, and nothing else.

On SQLite one thread owns the writing connection and commits many works together, each in a savepoint: requests
never fight for the file lock, and one fsync serves them all. On PostgreSQL the calling thread runs its own
transaction and repeats it after a serialization failure or a deadlock.
"""

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import cast

from sqlalchemy import Engine, exc
from sqlalchemy.orm import Session

from qflare_server.errors import StoreUnavailableError
from qflare_server.storage.epochs import EpochReader, Epochs
from qflare_server.storage.error_translation import POSTGRES_RETRY, domain_errors
from qflare_server.storage.group_commit import WRITE_ATTEMPTS, GroupWriter, T

logger = logging.getLogger(__name__)


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
        self._writer = GroupWriter(engine) if self.is_sqlite else None

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
