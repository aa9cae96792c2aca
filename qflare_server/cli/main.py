"""The `qflare-server` command: parser, logging and exit codes."""

import argparse
import json
import logging
import os
import sys
from collections.abc import Sequence
from pathlib import Path

import qflare
from qflare_server.cli import (
    certificates,
    keys,
    models,
    registry,
    serve,
    status,
    tokens,
    training_sessions,
    verify,
)
from qflare_server.config import ConfigError, ServerConfig
from qflare_server.errors import QflareError
from qflare_server.keys.secret_files import KeyStoreError
from qflare_server.storage.schema import SchemaError

TOPICS = (serve, keys, certificates, tokens, training_sessions, models, status, registry, verify)
DESCRIPTION = "The QFLARE coordinator: a quantum-resistant federated-learning server."


EPILOG = """\
Settings come from QFLARE_* variables; flags override them. First steps:

  qflare-server serve                        run on SQLite in ./qflare-data
  qflare-server token issue --count 3        rights to enrol three devices
  qflare-server session create --name demo --model initial.safetensors --quorum 3 --start
"""


class _JsonFormatter(logging.Formatter):
    """One JSON object a line."""

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
    """Send the program's log to standard error; done once, here."""
    handler = logging.StreamHandler()
    if config.log_format == "json":
        handler.setFormatter(_JsonFormatter())
    else:
        handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s %(message)s"))
    logging.basicConfig(level=config.log_level, handlers=[handler])
    logging.getLogger("alembic").setLevel("WARNING")


def parser() -> argparse.ArgumentParser:
    """Return the parser of all subcommands."""
    root = argparse.ArgumentParser(
        prog="qflare-server",
        description=DESCRIPTION,
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    root.add_argument("--version", action="version", version=qflare.__version__)
    root.add_argument("--data-dir", type=Path, help="folder of database and keys")
    root.add_argument(
        "--database-url", help="sqlite:///FILE or postgresql://...; better in a variable"
    )
    root.add_argument("--log-level", choices=["DEBUG", "INFO", "WARNING", "ERROR"])
    commands = root.add_subparsers(required=True, metavar="COMMAND")
    for topic in TOPICS:
        topic.add(commands)
    return root


def main(argv: Sequence[str] | None = None) -> int:
    """Run one subcommand; return 0 if it did what it was asked, 1 if not, 2 on wrong usage."""
    arguments = parser().parse_args(argv)
    flags = (
        "data_dir",
        "database_url",
        "log_level",
        "listen",
        "workers",
        "online_algorithm",
        "root_algorithm",
        "dashboard",
    )
    try:
        config = ServerConfig.from_env(
            os.environ, **{name: getattr(arguments, name, None) for name in flags}
        )
        configure_logging(config)
        return int(arguments.run(config, arguments))
    except (ConfigError, SchemaError, KeyStoreError, QflareError, OSError, ValueError) as error:
        print(f"qflare-server: {error}", file=sys.stderr)
        return 1
