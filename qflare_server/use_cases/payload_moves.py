"""Moves payloads between payload stores while coordinators serve.

A payload is copied under a new id, its chunks verified on the way; one transaction then makes its row refer to the
copy and leaves the original to be swept. A crash at any point leaves a row that refers to a whole payload, and chunks
that the next sweep deletes. A reader that holds a reference to the original looks the row up again (`payloads.reader`).
"""

import secrets
from contextlib import suppress
from dataclasses import dataclass
from datetime import timedelta
from typing import Final

from qflare.crypto import merkle
from qflare.tensors import CHUNK_BYTES
from qflare_server.context import Context
from qflare_server.errors import ConflictError, QflareError
from qflare_server.storage.ids import payload_name
from qflare_server.storage.payload_records import chunks_of, split_digests
from qflare_server.storage.payload_store import READ_CHUNKS
from qflare_server.storage.place_ownership import require_owner
from qflare_server.storage.records import Payload
from qflare_server.storage.repository import leases, payloads
from qflare_server.storage.repository.payloads import ChunkSet
from qflare_server.training.retention import discard_uploads, sweep

PAGE: Final = 100
LEASE: Final = "payload move"
LEASE_TIME: Final = timedelta(minutes=2)


@dataclass
class MoveReport:
    """Result of a move.

    Attributes:
        moved_count: Payloads moved.
        moved_bytes: Their size.
        skipped: Ids of payloads that stay where they are, because chunks are missing or altered, or another process
            changed them meanwhile.
    """

    moved_count: int
    moved_bytes: int
    skipped: list[str]


class PayloadMover:
    """Moves all payloads to one payload store.

    Args:
        context: The coordinator's components.
        target: Name of the store.

    Raises:
        PayloadStoreNotConfiguredError: The store is not configured.
    """

    def __init__(self, context: Context, target: str) -> None:
        self._context = context
        self._store = context.store_of(target)
        self._holder = secrets.token_hex(16)
        self._renewed_at = context.clock()

    def run(self) -> MoveReport:
        """Move the payloads of all other stores; can be repeated after an interruption.

        Raises:
            ConflictError: Another process moves payloads.
            PayloadPlaceTakenError: Another database owns the folder or bucket of a store.
            PayloadStoreNotConfiguredError: A payload is in a store that is not configured.
            StoreUnavailableError: A store cannot be reached.
            StorageFullError: The store is full.
        """
        report = MoveReport(0, 0, [])
        self._hold()
        try:
            with self._context.database.read() as session:
                others = set(payloads.named_stores(session)) - {self._store.name}
            for name in others | {self._store.name}:
                require_owner(self._context.database, self._context.store_of(name))
            sweep(self._context)
            self._run(others, report)
        finally:
            self._context.database.write(lambda session: leases.release(session, self._holder))
        return report

    def _hold(self) -> None:
        """Take or renew the lease that keeps two processes from copying the same payloads."""
        now = self._renewed_at = self._context.clock()
        held = self._context.database.write(
            lambda session: leases.acquire(session, LEASE, self._holder, now, now + LEASE_TIME)
        )
        if not held:
            raise ConflictError("another process moves payloads: wait until it has finished")

    def _run(self, others: set[str], report: MoveReport) -> None:
        after = ""
        while True:
            with self._context.database.read() as session:
                page = payloads.in_stores(session, others, after, PAGE)
            for row in page:
                if self._move(row):
                    report.moved_count += 1
                    report.moved_bytes += row.size_bytes
                else:
                    report.skipped.append(row.id)
            if len(page) < PAGE:
                return
            after = page[-1].id

    def _move(self, row: Payload) -> bool:
        original = chunks_of(row.chunks_id, row.store)
        assert original is not None
        copy = ChunkSet(payload_name(), self._store.name)
        at = self._context.clock()
        write = self._context.database.write
        write(
            lambda session: payloads.begin_upload(
                session, payload_id=copy.payload_id, store=copy.store, at=at
            )
        )
        try:
            is_whole = self._copy(row, original, copy)
        except Exception:
            with suppress(QflareError):  # otherwise the next sweep deletes it
                discard_uploads(self._context, [copy])
            raise
        # After a failure of this transaction, which of the two the row refers to is unknown: both stay for the sweep.
        moved = is_whole and write(lambda session: payloads.move(session, original, copy))
        discard_uploads(self._context, [original if moved else copy])
        return moved

    def _copy(self, row: Payload, original: ChunkSet, copy: ChunkSet) -> bool:
        """Copy the chunks of a payload; False if the original is not what its row says."""
        source = self._context.store_of(original.store)
        wanted = split_digests(row.chunk_digests)
        step = max(READ_CHUNKS, self._store.batch_bytes // CHUNK_BYTES)
        for first in range(0, len(wanted), step):
            chunks = source.read(original.payload_id, first, min(step, len(wanted) - first))
            if [merkle.leaf_hash(chunk) for chunk in chunks] != wanted[first : first + step]:
                return False
            self._store.append(copy.payload_id, first, chunks)
            self._keep_alive(copy)
        try:
            self._store.complete(copy.payload_id, row.size_bytes)
        except ConflictError:  # the copy was swept meanwhile
            return False
        return True

    def _keep_alive(self, copy: ChunkSet) -> None:
        """Keep lease and copy from expiring."""
        now = self._context.clock()
        if now < self._renewed_at + LEASE_TIME / 4:
            return
        self._hold()
        self._context.database.write(lambda session: payloads.touch_upload(session, copy, now))
