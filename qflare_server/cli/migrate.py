"""`migrate`: migrates the database to the schema of this program."""

import argparse
from typing import Any

from qflare.terminal import say
from qflare_server.config import ServerConfig
from qflare_server.storage.engine import make_engine
from qflare_server.storage.schema import current_revision, upgrade


def add(commands: Any) -> None:
    """Add this module's parsers."""
    migrate = commands.add_parser(
        "migrate",
        help="migrate the database to this program's schema",
        epilog="example: QFLARE_DATABASE_URL=postgresql://... qflare-server migrate",
    )
    migrate.set_defaults(run=run_migrate)


def run_migrate(config: ServerConfig, _arguments: argparse.Namespace) -> int:
    """Migrate the database."""
    engine = make_engine(config)
    before = current_revision(engine)
    upgrade(engine)
    say(f"schema: {before or 'none'} -> {current_revision(engine)}")
    engine.dispose()
    return 0
