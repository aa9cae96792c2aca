"""Schema revisions of a database: check, upgrade, downgrade.

A coordinator serves on exactly one revision, the head of `qflare_server.migrations`. It changes the schema of a
database that holds data only on command.
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
    """The database's schema is not the one that this program needs. Never sent to a client.

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
    """Return the revision that this program needs."""
    head = _script().get_current_head()
    if head is None:
        raise SchemaError("this installation has no migrations", INSTALL_COMMAND)
    return head


def current_revision(engine: Engine) -> str | None:
    """Return the revision of a database; None if no migration has run on it."""
    with engine.connect() as connection:
        return MigrationContext.configure(connection).get_current_revision()


def require_unicode(engine: Engine) -> None:
    """Refuse a PostgreSQL database whose encoding cannot hold all text: names of devices and sessions are Unicode.

    Raises:
        SchemaError: Its encoding is not UTF8.
    """
    if engine.dialect.name != "postgresql":
        return
    with engine.connect() as connection:
        encoding = connection.exec_driver_sql("SHOW server_encoding").scalar_one()
    if encoding != "UTF8":
        raise SchemaError(
            f"the database has the encoding {encoding}, want UTF8",
            "create it again with ENCODING 'UTF8'",
        )


def is_empty(engine: Engine) -> bool:
    """Return whether a database has no tables."""
    return not inspect(engine).get_table_names()


def upgrade(engine: Engine, revision: str = "head") -> None:
    """Upgrade a database to a revision; does nothing if it has that revision already.

    Safe to call from several processes at once: one migrates, the others wait and then find nothing to do.

    Args:
        engine: From `qflare_server.storage.engine.make_engine`.
        revision: Target revision; the head by default.

    Raises:
        SchemaError: The database has a revision unknown to this program.
    """
    require_known(current_revision(engine))
    config = _config()
    config.attributes["engine"] = engine
    with _ALEMBIC_LOCK:
        command.upgrade(config, revision)


def downgrade(engine: Engine, revision: str) -> None:
    """Downgrade a database to an earlier revision; data that only the later revisions hold is lost.

    Args:
        engine: From `qflare_server.storage.engine.make_engine`.
        revision: Target revision; `base` removes the whole schema.

    Raises:
        SchemaError: The database has a revision unknown to this program.
    """
    require_known(current_revision(engine))
    config = _config()
    config.attributes["engine"] = engine
    with _ALEMBIC_LOCK:
        command.downgrade(config, revision)


def require_current(engine: Engine) -> None:
    """Raise SchemaError unless a database is at the head revision.

    Raises:
        SchemaError: The schema is missing, older or newer; the message names the command to run.
    """
    current, head = current_revision(engine), head_revision()
    if current == head:
        return
    require_known(current)
    if current is None:
        raise SchemaError("the database has no schema", MIGRATE_COMMAND)
    raise SchemaError(
        f"the database has schema {current}, this program needs {head}", MIGRATE_COMMAND
    )


def require_known(current: str | None) -> None:
    """Refuse a revision that this program does not have.

    Raises:
        SchemaError: The revision is that of a later program.
    """
    known = {script.revision for script in _script().walk_revisions()}
    if current is not None and current not in known:
        raise SchemaError(
            f"the database has schema {current}, which is newer than this program",
            "pip install --upgrade 'qflare[server]'",
            "upgrade the program",
        )
