"""Receives the chunks of one payload in bounded memory.

A `Receiver` verifies each chunk of one payload as it arrives and holds at most two batches in memory. A small payload
waits in memory for the transaction that writes its row; a large one is written to the payload store by a background
thread while the next batch arrives. `payloads.reader` reads payloads back.
"""

from concurrent.futures import Future, ThreadPoolExecutor
from datetime import datetime
from typing import Final

from qflare.crypto import merkle
from qflare.tensors import CHUNK_BYTES, BytesLike, FiniteCheck, InvalidPayloadError
from qflare_server.context import Context
from qflare_server.errors import (
    ConflictError,
    DigestMismatchError,
    InvalidRequestError,
    InvalidUpdateError,
)
from qflare_server.payloads.expected import ExpectedPayload
from qflare_server.storage.ids import payload_name
from qflare_server.storage.payload_records import ReceivedPayload, Seal, split_digests
from qflare_server.storage.payload_store import READ_CHUNKS, PayloadStore
from qflare_server.storage.place_ownership import require_owner
from qflare_server.storage.repository import payloads as rows

TOUCH_SHARE: Final = 0.25  # share of the expiry time after which an upload is touched again


class Receiver:
    """Receives the chunks of one payload in order; used by one thread.

    Args:
        context: The coordinator's parts.
        executor: Runs the writes of large payloads.
        expected: Layout, size and digests of the payload; already checked.
        payload_id: Id of an upload to resume; empty starts a new one.
        first_chunk: Number of chunks already in the payload store.
        store: Payload store of an upload to resume; None means that of new payloads.
    """

    def __init__(
        self,
        context: Context,
        executor: ThreadPoolExecutor,
        expected: ExpectedPayload,
        *,
        payload_id: str = "",
        first_chunk: int = 0,
        store: PayloadStore | None = None,
    ) -> None:
        self._context = context
        self._store = context.store if store is None else store
        self._executor = executor
        self._expected = expected
        self._size_bytes = self._kept_bytes = expected.wire_size_bytes
        self._chunk_count = expected.wire_chunk_count
        self._wanted = split_digests(expected.chunk_digests)
        self._finite = FiniteCheck(expected.manifest, expected.rules)
        self._leaves: list[bytes] = []
        self._has_lost_chunks = False
        self._batch: list[BytesLike] = []
        self._batch_bytes = 0
        self._stored = first_chunk
        self._pending: Future[None] | None = None
        self.payload_id = payload_id or payload_name()
        self.is_large = self._size_bytes > context.config.inline_payload_bytes
        is_new = self.is_large and not payload_id
        self._touched_at = context.clock() if is_new else rows.LONG_AGO
        if first_chunk:
            self._replay(first_chunk)
        self._resumed_at = self.next_index

    @property
    def chunks(self) -> rows.ChunkSet:
        """The payload's chunks in the payload store."""
        return rows.ChunkSet(self.payload_id, self._store.name)

    @property
    def _store_name(self) -> str | None:
        return self._store.name if self.is_large else None

    def begin(self, at: datetime) -> None:
        """Record that the chunks of a payload of the coordinator's own are being written, so that they can be swept."""
        self._context.database.write(
            lambda session: rows.begin_upload(
                session, payload_id=self.payload_id, store=self._store.name, at=at
            )
        )

    @property
    def next_index(self) -> int:
        """Index of the next chunk."""
        return len(self._leaves)

    @property
    def is_complete(self) -> bool:
        """Whether all chunks have arrived."""
        return self.next_index == self._chunk_count

    def require_intact(self) -> None:
        """Check that the store has not lost chunks of the interrupted upload that have not come again.

        Raises:
            ConflictError: It has; the upload can be resumed.
        """
        if self._has_lost_chunks and not self.is_complete:
            raise ConflictError("stored chunks of the upload are damaged; ask where to go on")

    def _replay(self, count: int) -> None:
        """Verify the chunks that an interrupted upload left in the store, without writing them again.

        A crash may have damaged the last ones. The store forgets those, and the device sends them again.
        """
        try:
            for first in range(0, count, READ_CHUNKS):
                stored = self._store.read(self.payload_id, first, min(READ_CHUNKS, count - first))
                for chunk in stored:
                    self._check(len(self._leaves), chunk)
        except InvalidRequestError:
            self._store.truncate(self.payload_id, self.next_index)
        self._has_lost_chunks = self.next_index < count
        self._stored = self.next_index

    def add(self, index: int, chunk: BytesLike) -> None:
        """Verify a chunk and add it to the batch; ignores a chunk that an interrupted upload stored already.

        Raises:
            InvalidUpdateError: The chunk is out of order, has the wrong size, or holds NaN or infinity.
            DigestMismatchError: The chunk's digest does not match the stated one.
            ConflictError: The store has lost earlier chunks; the upload can be resumed.
        """
        if index < self._resumed_at:
            return
        if index > self.next_index:
            self.require_intact()
        self._check(index, chunk)
        self._keep(chunk)

    def _keep(self, chunk: BytesLike) -> None:
        """Add a chunk to the batch, and write the batch if it is full."""
        self._batch.append(chunk)
        self._batch_bytes += len(chunk)
        batch_bytes = max(self._context.config.upload_batch_bytes, self._store.batch_bytes)
        full = self._batch_bytes >= batch_bytes
        if self.is_large:
            self._touch()
        if self.is_large and (full or self.is_complete):
            self._flush()

    def _check(self, index: int, chunk: BytesLike) -> None:
        number = self.next_index
        if index != number:
            raise InvalidUpdateError(f"chunk index: got {index}, want {number}")
        if self.is_complete:
            raise InvalidUpdateError(
                f"too many bytes: got chunk {number}, want {self._size_bytes} bytes in"
                f" {self._chunk_count} chunks"
            )
        wanted = min(CHUNK_BYTES, self._size_bytes - number * CHUNK_BYTES)
        if len(chunk) != wanted:
            raise InvalidUpdateError(f"chunk {number}: got {len(chunk)} bytes, want {wanted}")
        leaf = merkle.leaf_hash(chunk)
        if self._wanted and leaf != self._wanted[number]:
            raise DigestMismatchError(f"chunk {number}: digest does not match the stated one")
        self._take_content(chunk)
        self._leaves.append(leaf)

    def _take_content(self, chunk: BytesLike) -> None:
        """Check the content of the next chunk."""
        self._check_elements(chunk)

    def _check_elements(self, data: BytesLike) -> None:
        try:
            self._finite.feed(data)
        except InvalidPayloadError as error:
            raise InvalidUpdateError(str(error)) from error

    def _flush(self) -> None:
        """Write the batch in the background, once the previous one is written: at most two are in memory."""
        self._wait()
        batch, first = self._batch, self._stored
        self._stored += len(batch)
        self._batch, self._batch_bytes = [], 0
        self._pending = self._executor.submit(self._store.append, self.payload_id, first, batch)

    def _touch(self) -> None:
        """Keep a slow upload from expiring, however long a batch takes to fill."""
        at = self._context.clock()
        expiry_s = self._context.config.upload_expiry_s
        if (at - self._touched_at).total_seconds() > expiry_s * TOUCH_SHARE:
            self._touched_at = at
            self._context.database.write(
                lambda session: rows.touch_upload(session, self.chunks, at)
            )

    def _wait(self) -> None:
        if self._pending is not None:
            pending, self._pending = self._pending, None
            pending.result()

    def finish(self) -> ReceivedPayload:
        """Return the whole payload, durable if it is large.

        Raises:
            InvalidUpdateError: Chunks are missing.
            DigestMismatchError: The payload is not the one that was stated.
            ConflictError: The store has lost chunks; the upload can be resumed.
        """
        digest = self._whole_digest()
        seal = self._seal()
        return ReceivedPayload(
            payload_id=self.payload_id,
            size_bytes=self._size_bytes,
            digest=digest,
            chunk_digests=b"".join(self._leaves),
            data=self._last_batch(),
            seal=seal,
            store=self._store_name,
        )

    def _whole_digest(self) -> str:
        """Return the Merkle root over the chunks, after checking that all have arrived and that it was stated."""
        if not self.is_complete:
            raise InvalidUpdateError(f"chunks: got {self.next_index}, want {self._chunk_count}")
        digest = merkle.root(self._leaves).hex()
        if self._expected.wire_digest and digest != self._expected.wire_digest:
            if self._resumed_at and not self._wanted:  # what a crash left may be to blame
                self._store.truncate(self.payload_id, 0)
                raise ConflictError("stored chunks of the upload are damaged; send it again")
            raise DigestMismatchError("payload: digest does not match the stated one")
        return digest

    def _seal(self) -> Seal | None:
        """Return the seal of the payload; None if it is not sealed."""
        return None

    def _last_batch(self) -> bytes | None:
        """Return the bytes of a small payload; write the rest of a large one and return None.

        Raises:
            ConflictError: The store has lost chunks meanwhile; the upload can be resumed.
            PayloadPlaceTakenError: Another database owns the folder or bucket.
        """
        if not self.is_large:
            return b"".join(self._batch)
        self.keep()
        self._store.complete(self.payload_id, self._kept_bytes)
        require_owner(self._context.database, self._store)  # otherwise the owner deletes it
        return None

    def keep(self) -> None:
        """Write the chunks received so far, so that an interrupted upload can be resumed."""
        if self.is_large and self._batch:
            self._flush()
        self._wait()

    def abandon(self) -> None:
        """Free the batch, and wait for the write in progress, ignoring its result."""
        self._batch = []
        if self._pending is not None:
            self._pending.exception()
