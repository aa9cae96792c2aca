"""The revision of the schema that a database has, and the way to the one that this program needs.

A coordinator serves on exactly one revision, the head of `qflare_server.migrations`. It never changes a schema
that holds data unless it is told to.
"""

import threading
from importlib.resources import files
from typing import Final

from alembic import command
from alembic.config import Config
from alembic.migration import MigrationContext
from alembic.script import ScriptDirectory
from sqlalchemy import Engine, inspect

MIGRATE_COMMAND: Final = "qflare-server migrate"
INSTALL_COMMAND: Final = "pip install --force-reinstall 'qflare[server]'"
_ALEMBIC_LOCK: Final = threading.Lock()  # Alembic's context is one per process


class SchemaError(Exception):
    """The schema is not the one that this program works on. Never crosses the wire.

    Args:
        cause: What is wrong.
        remedy: The command to run.
        action: What that command does.
    """

    def __init__(self, cause: str, remedy: str, action: str = "run") -> None:
        super().__init__(f"{cause}; {action}: {remedy}")
        self.cause, self.remedy = cause, remedy


def _config() -> Config:
    config = Config()
    config.set_main_option("path_separator", "os")
    location = str(files("qflare_server.migrations"))
    config.set_main_option("script_location", location.replace("%", "%%"))
    return config


def _script() -> ScriptDirectory:
    return ScriptDirectory.from_config(_config())


def head_revision() -> str:
    """Return the revision that this program works on."""
    head = _script().get_current_head()
    if head is None:
        raise SchemaError("this installation holds no migrations", INSTALL_COMMAND)
    return head


def current_revision(engine: Engine) -> str | None:
    """Return the revision of a database, None if no migration ever ran on it."""
    with engine.connect() as connection:
        return MigrationContext.configure(connection).get_current_revision()


def is_empty(engine: Engine) -> bool:
    """Return whether a database holds no table at all."""
    return not inspect(engine).get_table_names()


def upgrade(engine: Engine, revision: str = "head") -> None:
    """Bring a database to a revision; does nothing where it is there already.

    Safe to call from several processes at once: one migrates, the others wait and find nothing to do.

    Args:
        engine: From `qflare_server.storage.engine.make_engine`.
        revision: Where to; the head unless a test or an operator says otherwise.

    Raises:
        SchemaError: The database has a revision that this program does not know.
    """
    _refuse_unknown(current_revision(engine))
    config = _config()
    config.attributes["engine"] = engine
    with _ALEMBIC_LOCK:
        command.upgrade(config, revision)


def downgrade(engine: Engine, revision: str) -> None:
    """Take a database back to an earlier revision, `base` for none; what only the later one holds is lost.

    Args:
        engine: From `qflare_server.storage.engine.make_engine`.
        revision: Where to.

    Raises:
        SchemaError: The database has a revision that this program does not know.
    """
    _refuse_unknown(current_revision(engine))
    config = _config()
    config.attributes["engine"] = engine
    with _ALEMBIC_LOCK:
        command.downgrade(config, revision)


def require_current(engine: Engine) -> None:
    """Refuse a database that is not at the head revision.

    Raises:
        SchemaError: The schema is missing, older or newer; the message holds the command to run.
    """
    current, head = current_revision(engine), head_revision()
    if current == head:
        return
    _refuse_unknown(current)
    if current is None:
        raise SchemaError("the database has no schema", MIGRATE_COMMAND)
    raise SchemaError(
        f"the database has schema {current}, this program needs {head}", MIGRATE_COMMAND
    )


def _refuse_unknown(current: str | None) -> None:
    known = {script.revision for script in _script().walk_revisions()}
    if current is not None and current not in known:
        raise SchemaError(
            f"the database has schema {current}, which is newer than this program",
            "pip install --upgrade 'qflare[server]'",
            "upgrade the program",
        )
