"""Periodic maintenance: last-seen times, audit sequencing, expired tokens and uploads, health.

Maintenance never runs in the thread of a call.
"""

import hashlib
import logging
import socket
import threading
from collections.abc import Callable
from datetime import datetime, timedelta
from typing import Final, Protocol

from sqlalchemy.orm import Session

import qflare
from qflare_server.context import Context
from qflare_server.errors import PayloadStoreConflictError, QflareError
from qflare_server.payloads.keys import rewrap
from qflare_server.storage.payload_store import FILES, PayloadStore
from qflare_server.storage.place_ownership import PlaceKeeper, require_owner
from qflare_server.storage.repository import (
    device_failures,
    devices,
    fold_slices,
    idempotent_calls,
    late_updates,
    leases,
    tokens,
)
from qflare_server.training.retention import prune_ended, sweep, sweep_orphans
from qflare_server.use_cases import UseCases
from qflare_server.use_cases.audit.sequencer import AuditSequencer
from qflare_server.use_cases.status import REPLICA_MEMORY_S

logger = logging.getLogger(__name__)

TICK_S: Final = 1.0
MINUTE_TICKS: Final = 60
HOUR_TICKS: Final = 3600
ORPHAN_TICK: Final = 1800
EXPLAIN_TICKS: Final = 10
TOKEN_BATCH: Final = 1000
CALL_MEMORY: Final = timedelta(days=1)
FACTS_KEPT: Final = timedelta(days=60)
"""How long it is kept which devices were late for a round or failed in it."""
"""How long calls with a request id are remembered."""


class SetHealthy(Protocol):
    """Health state of the coordinator."""

    def __call__(self, *, healthy: bool) -> None:
        """Set the state."""


def _place_of(store: PayloadStore) -> str:
    """Return a text that two processes share if they store new payloads in the same place, 32 characters at most.

    A folder counts as shared on one machine only.
    """
    host = socket.gethostname() if store.name == FILES else ""
    digest = hashlib.sha256(f"{store.identity()} {host}".encode()).hexdigest()
    return f"{store.name} {digest[:16]}"


class Maintenance:
    """Background thread that runs maintenance.

    Args:
        context: The coordinator's components.
        use_cases: Use cases, for device presence.
        sequencer: Appends audit entries to the tree.
        replica_id: Name of this process among the replicas.
        address: Listening address.
        set_healthy: Called with whether the database responds.
    """

    def __init__(
        self,
        context: Context,
        use_cases: UseCases,
        sequencer: AuditSequencer,
        replica_id: str,
        address: str,
        set_healthy: SetHealthy,
    ) -> None:
        self._context = context
        self._use_cases = use_cases
        self._sequencer = sequencer
        self._replica_id = replica_id
        self._address = address
        self._set_healthy = set_healthy
        self._payload_store = _place_of(context.store)
        self._started_at = context.clock()
        self._ticks = 0
        self._said: set[tuple[str, ...]] = set()
        self._keepers: dict[str, PlaceKeeper] = {}
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="housekeeping", daemon=True)

    def start(self) -> None:
        """Start the thread."""
        self._thread.start()

    def stop(self) -> None:
        """Write pending state and stop the thread."""
        self._stop.set()
        if self._thread.is_alive():
            self._thread.join()
        self._attempt(self._flush)
        self._attempt(self._sequence)
        self._attempt(self._retire)

    def _run(self) -> None:
        while not self._stop.wait(TICK_S):
            self.tick()

    def tick(self) -> None:
        """Run the tasks that are due."""
        self._ticks += 1
        healthy = self._attempt(self._check)
        self._set_healthy(healthy=healthy)
        if not healthy:  # every task would wait for the same database
            return
        self._attempt(self._sequence)
        due = self._ticks % max(1, round(self._context.config.last_seen_interval_s / TICK_S)) == 0
        if due:
            self._attempt(self._flush)
        if due or self._ticks == 1:
            self._attempt(self._announce)
        if self._ticks % EXPLAIN_TICKS == 1:
            self._attempt(self._explain)
        if self._ticks % MINUTE_TICKS == 1:
            for chore in self._minute_chores:
                self._attempt(chore)
        if self._ticks % HOUR_TICKS == ORPHAN_TICK:
            self._attempt(self._sweep_orphans)

    @property
    def _minute_chores(self) -> tuple[Callable[[], None], ...]:
        return (
            self._expire,
            self._prune,
            self._end_passes,
            self._sweep,
            self._deactivate,
            self._rewrap,
            self._renew,
        )

    def _attempt(self, chore: Callable[[], None]) -> bool:
        """Run a task; a failed task is retried at its next interval."""
        try:
            chore()
        except QflareError as error:
            logger.warning("maintenance task deferred: %s: %s", chore.__name__, error)
            return False
        except Exception:
            logger.exception("maintenance task failed: %s", chore.__name__)
            return False
        return True

    def _check(self) -> None:
        self._context.database.check()
        for store in self._context.stores:
            store.check()
            if store.name not in self._keepers:
                self._keepers[store.name] = PlaceKeeper(self._context.database, store)
            self._keepers[store.name].keep()

    def _sequence(self) -> None:
        self._sequencer.run_once()

    def _flush(self) -> None:
        self._use_cases.presence.flush(self._context.clock())

    def join(self) -> None:
        """Record that this process is about to serve.

        Raises:
            PayloadStoreConflictError: Another coordinator stores new payloads elsewhere.
            PayloadPlaceTakenError: The folder or bucket belongs to another copy of this database.
        """
        for store in self._context.stores:
            require_owner(self._context.database, store)
        now = self._context.clock()
        memory_s = max(REPLICA_MEMORY_S, 3 * self._context.config.last_seen_interval_s)
        since = now - timedelta(seconds=memory_s)

        def work(session: Session) -> None:
            others = leases.with_other_stores(session, self._replica_id, self._payload_store, since)
            if others:
                theirs = others[0].payload_store.partition(" ")[0]
                raise PayloadStoreConflictError(self._context.store.name, others[0].address, theirs)
            self._record(session, now)

        self._context.database.write(work)

    def _announce(self) -> None:
        now = self._context.clock()
        self._context.database.write(lambda session: self._record(session, now))

    def _record(self, session: Session, now: datetime) -> None:
        leases.announce(
            session,
            self._replica_id,
            self._address,
            qflare.__version__,
            self._payload_store,
            self._started_at,
            now,
        )

    def _retire(self) -> None:
        self._context.database.write(lambda session: leases.retire(session, self._replica_id))

    def _renew(self) -> None:
        """Sign anew tasks of rounds in progress whose key is about to leave the keyset."""
        count = self._context.signer.renew_tasks()
        if count:
            logger.info("tasks signed anew: count=%d", count)

    def _expire(self) -> None:
        """Delete expired rows in short transactions until none is left."""
        now = self._context.clock()

        def delete_late(session: Session) -> int:
            return late_updates.delete_old(session, now - FACTS_KEPT, TOKEN_BATCH)

        def delete_failures(session: Session) -> int:
            return device_failures.delete_old(session, now - FACTS_KEPT, TOKEN_BATCH)

        def delete_nonces(session: Session) -> int:
            return tokens.delete_expired_nonces(session, now, TOKEN_BATCH)

        def delete_tokens(session: Session) -> int:
            return tokens.delete_expired(session, now - timedelta(days=1), TOKEN_BATCH)

        self._context.database.write(
            lambda session: idempotent_calls.delete_old(session, now - CALL_MEMORY)
        )
        for delete in (delete_nonces, delete_tokens, delete_late, delete_failures):
            while not self._stop.is_set():
                if self._context.database.write(delete) < TOKEN_BATCH:
                    break

    def _prune(self) -> None:
        prune_ended(self._context)

    def _end_passes(self) -> None:
        self._context.database.write(fold_slices.end_abandoned)

    def _sweep(self) -> None:
        sweep(self._context)

    def _sweep_orphans(self) -> None:
        count = sweep_orphans(self._context)
        if count:
            logger.warning("deleted %d payloads that no row refers to", count)

    def _explain(self) -> None:
        """Log what running training sessions wait for, each notice once for as long as it lasts."""
        found = {
            (row.id, item.code, *item.device_ids): (row, item)
            for row, notices in self._use_cases.explanations.list_running()
            for item in notices
        }
        for key in sorted(found.keys() - self._said):
            row, item = found[key]
            logger.warning("session=%s %s: %s; try: %s", row.name, row.id, item.text, item.remedy)
        self._said = set(found)

    def _rewrap(self) -> None:
        moved = rewrap(self._context)
        if moved:
            logger.info("keys of sealed payloads moved to the current state key: %d", moved)

    def _deactivate(self) -> None:
        if not self._context.config.inactive_after_s:
            return
        before = self._context.clock() - timedelta(seconds=self._context.config.inactive_after_s)
        self._context.database.write(lambda session: devices.mark_inactive(session, before))
