"""`qflare-admin`: remote administration of a coordinator.

Exit codes: 0 success; 1 the coordinator refused, the message gives the reason; 2 wrong usage, or an unusable profile,
file or extra; 3 the coordinator is unreachable or busy, try again later; 4 no valid token, or not allowed; 130
interrupted.
"""

import argparse
import os
import sys
from collections.abc import Sequence
from functools import partial
from typing import Final

import qflare
from qflare.command_line import (
    WRONG_USAGE,
    ArgumentParser,
    address,
    protect_process,
    run_program,
    seconds,
)
from qflare.terminal import show_uncaught
from qflare_client.admin import (
    analytics,
    audit,
    devices,
    live,
    login,
    measurements,
    models,
    overview,
    references,
    sessions,
    setup,
    tokens,
)
from qflare_client.admin.connection import Admin
from qflare_client.admin.extras import MissingExtraError
from qflare_client.admin.login import LoginError, ProviderAwayError
from qflare_client.admin.profile import ProfileError, load, profile_path
from qflare_client.errors import (
    AuthenticationError,
    PermissionDeniedError,
    UnavailableError,
)
from qflare_client.failures import report

PROGRAM: Final = "qflare-admin"
REFUSED: Final = 1
UNREACHABLE: Final = 3
NOT_ALLOWED: Final = 4

OVERRIDES: Final = (
    "address",
    "ca_file",
    "certificate_file",
    "key_file",
    "token_file",
    "insecure",
)
EPILOG: Final = """\
first steps:
  qflare-admin profile set --address localhost:50051 --token-file admin.token
  qflare-admin session create --name digits --rounds 10 --quorum 3
  qflare-admin model upload ID initial.safetensors
  qflare-admin session start ID
  qflare-admin watch ID

exit codes:
  0 done   1 refused   2 wrong usage   3 not reached or busy   4 no valid token, or not allowed
  130 interrupted
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command and return its exit code.

    Args:
        arguments: Command-line arguments without the program name; None means those of the process, which is then
            protected.
    """
    if arguments is None:
        protect_process()
    sys.excepthook = show_uncaught
    return run_program(lambda: _run(parser().parse_args(arguments)), _reported)


def _reported(error: Exception) -> int:
    report(PROGRAM, error)
    return exit_code(error)


def exit_code(error: Exception) -> int:
    """Return the exit code of an error."""
    if isinstance(error, (UnavailableError, ProviderAwayError)):
        return UNREACHABLE
    if isinstance(error, (AuthenticationError, PermissionDeniedError, LoginError)):
        return NOT_ALLOWED
    usable = isinstance(error, ProfileError | MissingExtraError | OSError | ValueError)
    return WRONG_USAGE if usable else REFUSED


def _run(options: argparse.Namespace) -> None:
    if "offline" in options:
        options.offline(options)
        return
    given = {name: getattr(options, name) for name in OVERRIDES}
    renew = partial(login.refreshed, path=profile_path(os.environ))
    with Admin(load(os.environ, given), timeout_s=options.timeout_s, renew=renew) as admin:
        references.resolve(admin, options)
        options.run(admin, options)


def parser() -> argparse.ArgumentParser:
    """Return the parser of all commands."""
    root = ArgumentParser(
        prog=PROGRAM,
        description="Administer a QFLARE coordinator.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    root.add_argument("--version", action="version", version=qflare.__version__)
    root.add_argument("--address", type=address, help="host:port; overrides the profile")
    root.add_argument("--ca", dest="ca_file", help="PEM certificate authorities of the coordinator")
    root.add_argument(
        "--certificate",
        dest="certificate_file",
        help="PEM client certificate chain, for mutual TLS",
    )
    root.add_argument("--key", dest="key_file", help="PEM key of the client certificate")
    root.add_argument("--token-file", help="file with the token")
    root.add_argument("--insecure", action="store_true", help="use plaintext with any address")
    root.add_argument(
        "--timeout-s", type=seconds(0.001), default=30.0, help="timeout of one call in seconds (30)"
    )
    commands = root.add_subparsers(required=True, metavar="COMMAND")
    for topic in (
        sessions,
        live,
        models,
        measurements,
        analytics,
        devices,
        tokens,
        audit,
        overview,
    ):
        topic.add(commands)
    setup.add(commands, parser)
    login.add(commands)
    return root


if __name__ == "__main__":
    sys.exit(main())
