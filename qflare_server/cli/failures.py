"""Error messages of failed commands: the cause and its remedy.

Errors with their own `remedy` are reported with it, the others by class. An unlisted error is a bug; its traceback is
logged.
"""

import errno
import sys
from dataclasses import dataclass

from qflare.command_line import describe_os_error
from qflare_server import errors

INSTALL = "pip install 'qflare[server]'"
DATABASE = "check QFLARE_DATABASE_URL, and that the database runs and can be reached"
HELP = "the same command with --help"


@dataclass(frozen=True)
class Failure:
    """An error message.

    Attributes:
        cause: The cause, one line per problem.
        remedy: The remedy.
    """

    cause: str
    remedy: str


REMEDIES: dict[type[Exception], str] = {
    errors.StoreUnavailableError: DATABASE,
    errors.StorageDamagedError: "qflare-server restore, into another folder, of the latest backup",
    errors.StorageFullError: "free space on the disk of the database, or in the payload store",
    errors.ConflictError: "the same command again",
    errors.NotFoundError: "qflare-server status, which lists training sessions and devices with their ids",
    errors.AlreadyExistsError: "another name or id, or leave what exists as it is",
    errors.FailedPreconditionError: "qflare-server status, which shows the state of training sessions",
    errors.PermissionDeniedError: "a token with the role that is needed",
    errors.InvalidRequestError: HELP,
    errors.QflareError: "the same command again with --log-level DEBUG",
    FileNotFoundError: "check the path",
    FileExistsError: "a path that does not exist yet",
    IsADirectoryError: "the path of a file",
    NotADirectoryError: "the path of a folder",
    PermissionError: "check owner and mode of the file and its folder",
    UnicodeDecodeError: "a text file in UTF-8",
    ValueError: HELP,
}
"""Remedies by class; the first match applies, from the most specific to the most general."""

BY_FIELD: dict[str, str] = {
    "model": "a .safetensors file of arrays that this program supports",
    "reference": "the whole id, or more characters of it",
    "config.rounds.quorum": "--quorum N, or --devices N for a majority of N devices",
}
"""Remedies for fields that have an option on the command line."""

BY_NUMBER: dict[int, str] = {
    errno.ENOSPC: "free space on the disk",
    errno.EADDRINUSE: "stop what listens there, or choose another address",
    errno.EADDRNOTAVAIL: "an address of this machine",
    errno.EROFS: "a folder that can be written",
    errno.ENAMETOOLONG: "a shorter path",
    errno.EMFILE: "raise the limit of open files (ulimit -n)",
}


def explain(error: Exception) -> Failure | None:
    """Return how to report an error; None for a bug in the program."""
    if isinstance(error, ModuleNotFoundError):
        return Failure(f"{error.name} is not installed", INSTALL)
    database = sys.modules.get("sqlalchemy.exc")
    if database is not None and isinstance(error, database.SQLAlchemyError):
        return _explain_database(error)
    own = getattr(error, "remedy", "")
    if own:
        return Failure(getattr(error, "cause", str(error)), own)
    if isinstance(error, errors.InvalidRequestError) and error.field in BY_FIELD:
        return Failure(_cause(error), BY_FIELD[error.field])
    for kind in type(error).__mro__:
        if kind in REMEDIES:
            return Failure(_cause(error), _by_number(error) or REMEDIES[kind])
    if isinstance(error, OSError):
        return Failure(_cause(error), _by_number(error) or "check the path")
    return None


def _explain_database(error: Exception) -> Failure | None:
    """Return how to report a database error, with the first line of its driver's message."""
    from qflare_server.storage.error_translation import translate  # noqa: PLC0415  # heavy

    translated = translate(error)  # type: ignore[arg-type]  # known by its name, not imported
    if translated is None:
        return Failure(str(error), DATABASE) if type(error).__name__ == "ArgumentError" else None
    said = str(getattr(error, "orig", None) or error).splitlines()[0]
    found = explain(translated)
    return found and Failure(f"{found.cause} ({said})", found.remedy)


def _by_number(error: Exception) -> str | None:
    return BY_NUMBER.get(error.errno or 0) if isinstance(error, OSError) else None


def _cause(error: Exception) -> str:
    if isinstance(error, OSError) and error.strerror:
        return describe_os_error(error)
    return str(error) or type(error).__name__
