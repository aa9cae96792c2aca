"""Translation of database errors into domain errors."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final

from sqlalchemy import exc

from qflare_server.errors import (
    ConflictError,
    QflareError,
    StorageDamagedError,
    StorageFullError,
    StoreUnavailableError,
)

logger = logging.getLogger(__name__)


SQLITE_ERROR: Final = 1  # primary result codes, sqlite.org/rescode.html: a faulty statement


SQLITE_FULL: Final = 13
SQLITE_DAMAGED: Final = frozenset({11, 26})  # CORRUPT, NOTADB
POSTGRES_DAMAGED: Final = frozenset({"XX001", "XX002"})  # data_corrupted, index_corrupted
POSTGRES_READ_ONLY: Final = "25006"  # read_only_sql_transaction: a primary that is one no longer


POSTGRES_RETRY: Final = frozenset({"40001", "40P01"})  # serialization_failure, deadlock_detected


POSTGRES_FULL: Final = frozenset({"53100"})  # disk_full


def translate(error: exc.SQLAlchemyError) -> QflareError | None:
    """Return the domain error that a database error stands for, None if it is a fault of ours."""
    if isinstance(error, exc.IntegrityError):
        return ConflictError("another call was faster; repeat the call")
    if isinstance(error, exc.TimeoutError):
        return StoreUnavailableError("no database connection became free in time")
    return _translate_driver_error(error) if isinstance(error, exc.DBAPIError) else None


def _translate_driver_error(error: exc.DBAPIError) -> QflareError | None:
    code, sqlite_code = getattr(error.orig, "pgcode", None), _sqlite_code(error.orig)
    if sqlite_code == SQLITE_FULL or code in POSTGRES_FULL:
        return StorageFullError()
    if code in POSTGRES_RETRY:
        return ConflictError("another call was faster; repeat the call")
    if sqlite_code in SQLITE_DAMAGED or code in POSTGRES_DAMAGED:
        return StorageDamagedError("the database is damaged: restore a backup")
    if code == POSTGRES_READ_ONLY:
        return StoreUnavailableError("the database is read-only")
    if sqlite_code != SQLITE_ERROR and (_is_broken(error) or _has_no_code(error)):
        return StoreUnavailableError("the database cannot be reached")
    return None


def _is_broken(error: exc.DBAPIError) -> bool:
    return error.connection_invalidated or isinstance(
        error, (exc.OperationalError, exc.InterfaceError)
    )


def _has_no_code(error: exc.DBAPIError) -> bool:
    """Return whether PostgreSQL's driver gave a bare error without a code, as for a backend that dies in a COPY."""
    original = error.orig
    return type(original).__name__ == "DatabaseError" and getattr(original, "pgcode", "") is None


@contextmanager
def domain_errors() -> Iterator[None]:
    """Turn a database's errors into the domain's, logged; what is a fault of ours goes through.

    Raises:
        ConflictError: A unique key or a lock was taken by somebody else.
        StorageDamagedError: The database holds pages that cannot be read.
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


def _sqlite_code(original: BaseException | None) -> int | None:
    """Return the primary result code of an SQLite error; extended ones keep it in their low byte."""
    code = getattr(original, "sqlite_errorcode", None)
    return None if code is None else int(code) & 0xFF


def _log(translated: QflareError, error: exc.SQLAlchemyError) -> None:
    """Log what an operator may want to see: not that two calls met, and no statement with its values."""
    if not isinstance(translated, ConflictError):
        cause = getattr(error, "orig", None) or error
        logger.warning("database failed: %s: %s", type(cause).__name__, str(cause).strip()[:200])
