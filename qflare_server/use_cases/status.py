"""Coordinator status: replicas, database, backlog and storage."""

import shutil
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Final, cast

from sqlalchemy import QueuePool, text

from qflare_server.context import Context, KeysetStatus
from qflare_server.storage.records import Replica
from qflare_server.storage.repository import devices, leases, training_sessions, views
from qflare_server.storage.schema import current_revision

REPLICA_MEMORY_S: Final = 60.0


@dataclass(frozen=True)
class DatabaseHealth:
    """Health of the database, measured by this process."""

    dialect: str
    schema_revision: str
    latency_s: float
    pool_size: int
    pool_in_use_count: int


@dataclass(frozen=True)
class Report:
    """Coordinator status."""

    at: datetime
    replicas: Sequence[Replica]
    database: DatabaseHealth
    queues: views.Backlog
    stored: views.StorageUsage
    payload_store_bytes: int
    free_bytes: int | None
    device_counts: Mapping[str, int]
    session_counts: Mapping[str, int]
    upload_retention_s: float
    keyset: KeysetStatus | None = None
    """The keyset in force."""


class Overview:
    """Reports the coordinator's status."""

    def __init__(self, context: Context) -> None:
        self._context = context

    def now(self) -> datetime:
        """Return the coordinator's time."""
        return self._context.clock()

    def report(self) -> Report:
        """Return the coordinator's status.

        Raises:
            StoreUnavailableError: The database does not answer.
        """
        now = self._context.clock()
        config = self._context.config
        with self._context.database.read() as session:
            since = now - timedelta(seconds=max(REPLICA_MEMORY_S, 3 * config.last_seen_interval_s))
            replicas = leases.list_replicas(session, since)
            waiting = views.queues(session)
            kept = views.stored(session)
            device_counts = devices.count_by_state(session)
            session_counts = training_sessions.count_sessions(session)
        return Report(
            at=now,
            replicas=replicas,
            database=self.database_health(),
            queues=waiting,
            stored=kept,
            payload_store_bytes=sum(store.size_bytes() for store in self._context.stores),
            free_bytes=self._free_bytes(),
            device_counts=device_counts,
            session_counts=session_counts,
            upload_retention_s=config.upload_expiry_s,
            keyset=self.keyset_status(),
        )

    def keyset_status(self) -> KeysetStatus | None:
        """Return the keyset in force, None if there is none."""
        find = self._context.keyset_status
        return None if find is None else find()

    def database_health(self) -> DatabaseHealth:
        """Return the health of the database.

        Raises:
            StoreUnavailableError: The database does not answer.
        """
        engine = self._context.database.engine
        started = time.monotonic()
        with self._context.database.read() as session:
            session.execute(text("SELECT 1"))
        latency_s = time.monotonic() - started
        pool = cast("QueuePool", engine.pool)
        return DatabaseHealth(
            dialect=engine.dialect.name,
            schema_revision=current_revision(engine) or "",
            latency_s=latency_s,
            pool_size=pool.size(),
            pool_in_use_count=pool.checkedout(),
        )

    def _free_bytes(self) -> int | None:
        """Return the free disk space of an SQLite database; None for a database server."""
        if not self._context.database.is_sqlite:
            return None
        path = self._context.database.engine.url.database
        return None if path is None else shutil.disk_usage(path).free
