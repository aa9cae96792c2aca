"""The `qflare-server` command: parser, logging and exit codes.

Exit codes: 0 success, 1 failure (the message states the cause and the remedy), 2 wrong usage, 130 interrupted. Only the
module of the command that was asked for is imported, so that `health`, which probes call often, starts quickly.
"""

import argparse
import importlib
import json
import logging
import os
import sys
from collections.abc import Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import Final

import qflare
from qflare.command_line import (
    ArgumentParser,
    protect_process,
    report_failure,
    run_program,
)
from qflare.terminal import LogFormatter, show_uncaught
from qflare_server.cli.failures import explain
from qflare_server.config import ServerConfig

logger = logging.getLogger(__name__)

PROGRAM: Final = "qflare-server"
COMMANDS: Final = {
    "serve": "serve",
    "migrate": "migrate",
    "backup": "backups",
    "restore": "backups",
    "health": "health",
    "init": "keys",
    "keys": "keys",
    "bundle": "keys",
    "certificates": "certificates",
    "token": "tokens",
    "session": "training_sessions",
    "model": "models",
    "status": "status",
    "registry": "registry",
    "audit": "verify",
    "payloads": "payloads",
    "webhooks": "webhooks",
}
"""Module of each command, in the order of the help text."""
FLAGS: Final = (
    "data_dir",
    "database_url",
    "log_level",
    "listen",
    "workers",
    "online_algorithm",
    "root_algorithm",
    "dashboard",
)
"""Settings that flags override."""
DESCRIPTION: Final = "The QFLARE coordinator: a quantum-resistant federated-learning server."
EPILOG: Final = """\
Settings come from QFLARE_* variables; flags override them. First steps:

  qflare-server serve                        run on SQLite in ./qflare-data
  qflare-server token issue --count 3        enrollment tokens for three devices
  qflare-server session create --name demo --model initial.safetensors --quorum 3 --start
"""


class _JsonFormatter(logging.Formatter):
    """Formats a log record as one JSON object per line."""

    def format(self, record: logging.LogRecord) -> str:
        """Return a record as JSON."""
        line = {
            "time": self.formatTime(record),
            "level": record.levelname,
            "logger": record.name,
            "message": record.getMessage(),
        }
        if record.exc_info:
            line["traceback"] = self.formatException(record.exc_info)
        return json.dumps(line)


def configure_logging(config: ServerConfig) -> None:
    """Configure logging to standard error; called only here."""
    handler = logging.StreamHandler()
    if config.log_format == "json":
        handler.setFormatter(_JsonFormatter())
    else:
        handler.setFormatter(LogFormatter("%(asctime)s %(levelname)s %(name)s %(message)s"))
    logging.basicConfig(level=config.log_level, handlers=[handler])
    logging.getLogger("alembic").setLevel("WARNING")


def parser(modules: Iterable[str] | None = None) -> argparse.ArgumentParser:
    """Return the parser of the commands of the given modules; default: all."""
    root = ArgumentParser(
        prog=PROGRAM,
        description=DESCRIPTION,
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    root.add_argument("--version", action="version", version=qflare.__version__)
    _add_settings(root)
    commands = root.add_subparsers(required=True, metavar="COMMAND")
    for name in dict.fromkeys(COMMANDS.values() if modules is None else modules):
        importlib.import_module(f"qflare_server.cli.{name}").add(commands)
    return root


def _add_settings(root: argparse.ArgumentParser) -> None:
    root.add_argument("--data-dir", type=Path, help="folder of database and keys")
    root.add_argument(
        "--database-url", help="sqlite:///FILE or postgresql://...; better in a variable"
    )
    root.add_argument("--log-level", choices=["DEBUG", "INFO", "WARNING", "ERROR"])


def _modules(argv: Sequence[str]) -> list[str] | None:
    """Return the module of the command in these arguments; None if there is none."""
    words = argparse.ArgumentParser(add_help=False, exit_on_error=False, allow_abbrev=False)
    _add_settings(words)
    words.add_argument("command", nargs="?", default="")
    try:
        found, _ = words.parse_known_args(argv)
    except argparse.ArgumentError:
        return None
    if not found.command and "--version" in argv:
        return []
    return [COMMANDS[found.command]] if found.command in COMMANDS else None


def main(argv: Sequence[str] | None = None) -> int:
    """Run one subcommand and return its exit code.

    Args:
        argv: Arguments without the program name; None means those of the process, which also hardens the process.
    """
    if argv is None:
        protect_process()
        argv = sys.argv[1:]
    sys.excepthook = show_uncaught
    return run_program(partial(_run, argv), _report)


def _run(argv: Sequence[str]) -> int:
    arguments = parser(_modules(argv)).parse_args(argv)
    flags = {name: getattr(arguments, name, None) for name in FLAGS}
    config = ServerConfig.from_env(os.environ, **flags)
    configure_logging(config)
    return int(arguments.run(config, arguments))


def _report(error: Exception) -> int:
    """Print cause and remedy of a failure to standard error; return the exit code."""
    failure = explain(error)
    if failure is None:
        logger.error("the command failed", exc_info=error)
        cause = f"internal error: {type(error).__name__}: {error}"
        remedy = "report this as a fault, with the lines above"
        report_failure(PROGRAM, cause, remedy)
        return 1
    logger.debug("the command failed", exc_info=error)
    report_failure(PROGRAM, failure.cause, failure.remedy)
    return 1
