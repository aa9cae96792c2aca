"""Translation of database errors into domain errors."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final

from sqlalchemy import exc

from qflare_server.errors import ConflictError, QflareError, StorageFullError, StoreUnavailableError

logger = logging.getLogger(__name__)


SQLITE_ERROR: Final = 1  # primary result codes, sqlite.org/rescode.html: a faulty statement


SQLITE_FULL: Final = 13


POSTGRES_RETRY: Final = frozenset({"40001", "40P01"})  # serialization_failure, deadlock_detected


POSTGRES_FULL: Final = frozenset({"53100"})  # disk_full


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
