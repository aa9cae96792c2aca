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


SQLITE_ERROR: Final = 1  # primary result codes (sqlite.org/rescode.html): an invalid statement
SQLITE_FULL: Final = 13
SQLITE_DAMAGED: Final = frozenset({11, 26})  # CORRUPT, NOTADB
POSTGRES_DAMAGED: Final = frozenset({"XX001", "XX002"})  # data_corrupted, index_corrupted
POSTGRES_READ_ONLY: Final = "25006"  # read_only_sql_transaction: a former primary
POSTGRES_RETRY: Final = frozenset({"40001", "40P01"})  # serialization_failure, deadlock_detected
POSTGRES_FULL: Final = frozenset({"53100"})  # disk_full


def translate(error: exc.SQLAlchemyError) -> QflareError | None:
    """Return the domain error for a database error; None if it is a bug in this program."""
    if isinstance(error, exc.IntegrityError):
        return ConflictError("conflicting concurrent call; retry")
    if isinstance(error, exc.TimeoutError):
        return StoreUnavailableError("no database connection became free in time")
    return _translate_driver_error(error) if isinstance(error, exc.DBAPIError) else None


def _translate_driver_error(error: exc.DBAPIError) -> QflareError | None:
    code, sqlite_code = getattr(error.orig, "pgcode", None), _sqlite_code(error.orig)
    if sqlite_code == SQLITE_FULL or code in POSTGRES_FULL:
        return StorageFullError()
    if code in POSTGRES_RETRY:
        return ConflictError("conflicting concurrent call; retry")
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
    """Return whether psycopg2 raised a bare error without a code, as for a backend that dies during a COPY."""
    original = error.orig
    return type(original).__name__ == "DatabaseError" and getattr(original, "pgcode", "") is None


@contextmanager
def domain_errors() -> Iterator[None]:
    """Translate database errors of the block into domain errors and log them; bugs in this program pass unchanged.

    Raises:
        ConflictError: A unique key exists already, or a lock was not granted.
        StorageDamagedError: The database has pages that cannot be read.
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
    """Return the primary result code of an SQLite error, the low byte of an extended one."""
    code = getattr(original, "sqlite_errorcode", None)
    return None if code is None else int(code) & 0xFF


def _log(translated: QflareError, error: exc.SQLAlchemyError) -> None:
    """Log an error for operators. Conflicts are routine and not logged; statements and their values never are."""
    if not isinstance(translated, ConflictError):
        cause = getattr(error, "orig", None) or error
        logger.warning("database error: %s: %s", type(cause).__name__, str(cause).strip()[:200])
