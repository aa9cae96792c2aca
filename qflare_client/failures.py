"""Error messages of `qflare-client` and `qflare-admin`: the cause of a failure and its remedy."""

import errno
import logging
from typing import Final

from qflare.command_line import describe_os_error, report_failure
from qflare_client import errors

logger = logging.getLogger(__name__)

_HELP: Final = "the same command with --help"
_TELL: Final = "tell the administrator, and do not use the received data"
_REMEDIES: Final[dict[type[Exception], str]] = {
    errors.BusyError: "repeat the command later",
    errors.CoordinatorFaultError: "tell the administrator the request id; its log has the reason",
    errors.TlsError: "check --ca-file, --certificate-file, --key-file and the address",
    errors.UnavailableError: "check address, port and TLS files, and that the coordinator runs",
    errors.InvalidEnrollmentTokenError: "ask the administrator for a new bundle",
    errors.AuthenticationError: "a valid token (qflare-admin), or enroll again with a new bundle (qflare-client)",
    errors.DeviceSuspendedError: "ask the administrator to reactivate this device",
    errors.DeviceRevokedError: "ask the administrator for a bundle, and enroll again in a new folder",
    errors.PermissionDeniedError: "a token whose roles allow this; qflare-admin token list shows them",
    errors.NotFoundError: "check the id; the list commands show the existing ones",
    errors.AlgorithmNotAcceptedError: "one of the accepted algorithms",
    errors.InvalidRequestError: _HELP,
    errors.DuplicateUpdateError: "another name or id, or leave what exists as it is",
    errors.FailedPreconditionError: "check its state with the show command, then repeat",
    errors.ProxyRefusedError: "a higher limit of the proxy (nginx: client_max_body_size 0)",
    errors.RejectedError: _HELP,
    errors.VerificationError: _TELL,
    errors.NotEnrolledError: "qflare-client enroll BUNDLE --home FOLDER, or the right --home",
    errors.KeyStoreLockedError: "end the other process, or use another --home",
    errors.WrongPassphraseError: "the right --passphrase-file",
    errors.KeyStoreError: "check owner and mode of the folder in --home (0700) and of its files (0600)",
    errors.ForkedError: "open the client in the process that uses it",
    errors.PrivacyError: "wait for the next round, or set a larger budget",
    errors.AmbiguousReferenceError: "the whole id, or more characters of it",
    errors.UnsupportedTaskError: "upgrade the SDK on this device, or install the extra that the message names",
    errors.TaskFailedError: "mend the cause that the training function names",
    errors.TrainingFunctionError: "correct the function; it returns arrays by name, a count and metrics",
    errors.QflareClientError: _HELP,
    FileNotFoundError: "check the path",
    FileExistsError: "a path that does not exist yet",
    IsADirectoryError: "the path of a file",
    NotADirectoryError: "the path of a folder",
    PermissionError: "check owner and mode of the file and its folder",
    OSError: "check the path",
    UnicodeDecodeError: "a text file in UTF-8",
    ValueError: _HELP,
}
"""Remedies by exception class, looked up along the bases."""

_INSTALL: Final = {
    "torch": "pip install torch --index-url https://download.pytorch.org/whl/cpu (without a GPU), or pip install torch",
    "sklearn": "pip install scikit-learn",
}
"""Remedies for modules whose package has another name or a smaller variant."""

_BY_FIELD: Final = {
    "model": "a .safetensors file of arrays that this program supports",
    "config.rounds.quorum": "--quorum N, or --devices N for a majority of N devices",
}
"""Remedies for fields that have an option on the command line."""

_BY_NUMBER: Final = {
    errno.ENOSPC: "free space on the disk",
    errno.EROFS: "a folder that can be written",
    errno.ENAMETOOLONG: "a shorter path",
}


def report(program: str, error: Exception) -> None:
    """Print cause and remedy of a failure to standard error, with a traceback for a bug of the program."""
    explained = explain(error)
    if explained is None:
        logger.error("the command failed", exc_info=error)
        cause = f"{type(error).__name__}: {error}"
        explained = (
            cause,
            "correct the cause named in the traceback's last line, or report a bug of QFLARE",
        )
    else:
        logger.debug("the command failed", exc_info=error)
    report_failure(program, *explained)


def explain(error: Exception) -> tuple[str, str] | None:
    """Return cause and remedy of an error; None for a bug of the program."""
    if isinstance(error, ModuleNotFoundError):
        return f"{error.name} is not installed", _INSTALL.get(
            error.name or "", f"pip install {error.name}"
        )
    own = getattr(error, "remedy", "")
    if own:
        return str(error), own
    if isinstance(error, errors.RejectedError) and error.metadata.get("field") in _BY_FIELD:
        return _cause(error), _BY_FIELD[error.metadata["field"]]
    for kind in type(error).__mro__:
        if kind in _REMEDIES:
            number = error.errno if isinstance(error, OSError) else None
            return _cause(error), _BY_NUMBER.get(number or 0, _REMEDIES[kind])
    return None


def _cause(error: Exception) -> str:
    if isinstance(error, OSError) and error.strerror:
        return describe_os_error(error)
    return str(error) or type(error).__name__
