"""Alembic environment, used by `qflare_server.storage.schema` and by the `alembic` command.

Only one migration runs at a time: PostgreSQL uses an advisory lock, SQLite BEGIN IMMEDIATE. A process that waits for
the lock then finds the schema up to date. On SQLite all revisions run in one transaction with foreign keys off, because
Alembic rebuilds a table by dropping it, which would cascade to its children; foreign keys are checked before the
commit. On PostgreSQL each command runs in one transaction, except for autocommit blocks.
"""

import os
import sqlite3
from typing import Any, Literal, cast

from alembic import context
from alembic.autogenerate.api import AutogenContext
from sqlalchemy import Connection, Engine

from qflare_server.config import ServerConfig
from qflare_server.storage.engine import make_engine
from qflare_server.storage.postgresql import lift_bounds
from qflare_server.storage.tables import Base, UtcDateTime

ADVISORY_LOCK = 0x71666C61726501  # "qflare", 1: the same for all coordinators of a database
METADATA = Base.metadata


def render_item(kind: str, item: Any, _autogen_context: AutogenContext) -> str | Literal[False]:
    """Render custom column types as their SQLAlchemy base types, so that revisions never import the models."""
    if kind == "type" and isinstance(item, UtcDateTime):
        return "sa.DateTime(timezone=True)"
    return False


def configure(connection: Connection) -> None:
    """Configure Alembic for this connection."""
    is_sqlite = connection.dialect.name == "sqlite"
    context.configure(
        connection=connection,
        target_metadata=METADATA,
        render_item=render_item,
        render_as_batch=is_sqlite,
        transactional_ddl=True,
        compare_type=True,
    )


def run_on_sqlite(connection: Connection) -> None:
    """Run all revisions in one write transaction, and check foreign keys before the commit."""
    raw = cast("sqlite3.Connection", connection.connection.dbapi_connection)
    raw.execute("PRAGMA foreign_keys=OFF")  # has no effect inside a transaction
    try:
        with connection.begin():
            configure(connection)
            with context.begin_transaction():
                context.run_migrations()
            orphans = connection.exec_driver_sql("PRAGMA foreign_key_check").all()
            if orphans:
                raise RuntimeError(f"rows without their parent after the migration: {orphans[:5]}")
    finally:
        raw.execute("PRAGMA foreign_keys=ON")


def run_on_postgresql(connection: Connection) -> None:
    """Run all revisions under an advisory lock, without a time limit."""
    lift_bounds(connection.connection.dbapi_connection)
    connection.exec_driver_sql("SET lock_timeout = 0")
    connection.exec_driver_sql(f"SELECT pg_advisory_lock({ADVISORY_LOCK})")
    connection.exec_driver_sql("RESET lock_timeout")
    connection.commit()
    try:
        configure(connection)
        with context.begin_transaction():
            context.run_migrations()
    finally:
        connection.rollback()
        connection.exec_driver_sql(f"SELECT pg_advisory_unlock({ADVISORY_LOCK})")
        connection.commit()


def run(engine: Engine) -> None:
    """Run the requested revisions."""
    with engine.execution_options(qflare_write=True).connect() as connection:
        if connection.dialect.name == "sqlite":
            run_on_sqlite(connection)
        else:
            run_on_postgresql(connection)


def run_offline() -> None:
    """Print the SQL instead of running it (`alembic upgrade --sql`), for PostgreSQL."""
    context.configure(
        dialect_name="postgresql",
        target_metadata=METADATA,
        literal_binds=True,
        transactional_ddl=True,
    )
    with context.begin_transaction():
        context.run_migrations()


def run_from_environment() -> None:
    """Run on the database configured by `QFLARE_*`."""
    engine = make_engine(ServerConfig.from_env(os.environ))
    try:
        run(engine)
    finally:
        engine.dispose()


if context.is_offline_mode():
    run_offline()
elif "engine" in context.config.attributes:
    run(context.config.attributes["engine"])
else:
    run_from_environment()
