"""Random access to stored payloads, sealed or not, in bounded memory."""

import threading
from collections.abc import Iterable, Iterator
from typing import Final

from qflare.crypto import merkle
from qflare.crypto.sealed_payloads import (
    PLAINTEXT_BYTES,
    PayloadKey,
    PayloadOpener,
    opened_size_bytes,
)
from qflare.crypto.sealing import UnsealError
from qflare.tensors import CHUNK_BYTES, rechunk
from qflare_server.context import Context
from qflare_server.errors import DamagedPayloadError, PayloadPrunedError, SealedPayloadLostError
from qflare_server.payloads.keys import restore_key
from qflare_server.storage.payload_records import Seal, StoredPayload, split_digests
from qflare_server.storage.payload_store import READ_CHUNKS
from qflare_server.storage.repository import payloads as rows

SMALLEST_CACHE: Final = 4
"""Pieces kept at least: a top-k update is read alternately in its indices and in its values."""


class PayloadBytes:
    """Random access to the plaintext of a payload; thread-safe.

    Every chunk that is read from the payload store is hashed and compared with its digest. The pieces that were read
    last are kept.

    Args:
        context: The coordinator's parts.
        stored: The payload.
        data: Its stored bytes, where its row was read with them.
        ahead: Pieces that are read at once at least.
        kept: Pieces to keep; 0 means twice `ahead`.
    """

    def __init__(
        self,
        context: Context,
        stored: StoredPayload,
        data: bytes | None,
        ahead: int,
        kept: int = 0,
    ) -> None:
        self._context = context
        self._stored = stored
        self._contents = Contents(context, stored)
        self._leaves = [] if stored.in_row else split_digests(stored.chunk_digests)
        self._ahead = ahead
        self._kept = max(SMALLEST_CACHE, kept or 2 * ahead)
        self._pieces: dict[int, bytes] = {}  # the one that was used last comes last
        self._lock = threading.Lock()
        if data:
            (self._pieces[0],) = self._contents.open([data])

    def read(self, offset: int, length: int) -> memoryview:
        """Return `length` bytes from `offset` on; copies only if they span several pieces.

        Raises:
            DamagedPayloadError: A chunk is missing or altered.
            SealedPayloadLostError: A piece cannot be opened.
        """
        if not length:
            return memoryview(b"")
        first, within = divmod(offset, self._contents.piece_bytes)
        last = (offset + length - 1) // self._contents.piece_bytes
        pieces = self._held(first, last)
        if first == last:
            return memoryview(pieces[0])[within : within + length]
        views = [memoryview(piece) for piece in pieces]
        views[0] = views[0][within:]
        views[-1] = views[-1][: length - sum(len(view) for view in views[:-1])]
        return memoryview(b"".join(views))

    def _held(self, first: int, last: int) -> list[bytes]:
        with self._lock:
            for number in range(first, last + 1):
                if number not in self._pieces:
                    self._load(number, last)
                self._pieces[number] = self._pieces.pop(number)
            found = [self._pieces[number] for number in range(first, last + 1)]
            for number in list(self._pieces)[: -max(self._kept, len(found))]:
                del self._pieces[number]
            return found

    def _load(self, first: int, last: int) -> None:
        """Read the pieces from `first` on up to the next one that is kept."""
        end = max(last + 1, first + self._ahead)
        stop = next((number for number in range(first, end) if number in self._pieces), end)
        chunks = self._chunks(first, stop - first)
        for number, piece in enumerate(self._contents.open(chunks, first), first):
            self._pieces[number] = piece

    @property
    def size_bytes(self) -> int:
        """Size of the plaintext in bytes."""
        return self._contents.size_bytes

    def verify(self, first: int, count: int) -> None:
        """Read consecutive chunks and compare them with their digests.

        Raises:
            DamagedPayloadError: A chunk is missing or altered.
        """
        self._chunks(first, count)

    def _chunks(self, first: int, count: int) -> list[bytes]:
        """Read stored chunks and compare them with their digests."""
        try:
            chunks = read_range(self._context, self._stored, first, count)
        except PayloadPrunedError as error:
            problem = f"chunks are missing from chunk {first} on"
            raise DamagedPayloadError(self._stored.payload_id, problem) from error
        for number, (chunk, leaf) in enumerate(zip(chunks, self._leaves[first:], strict=False)):
            if merkle.leaf_hash(chunk) != leaf:
                problem = f"chunk {first + number} is not the one that was received"
                raise DamagedPayloadError(self._stored.payload_id, problem)
        return chunks


def check_digests(stored: StoredPayload) -> None:
    """Check that the chunk digests of a payload in the payload store are those that its digest covers.

    Raises:
        DamagedPayloadError: They are not.
    """
    leaves = split_digests(stored.chunk_digests)
    if stored.in_row:
        return
    if len(leaves) != stored.chunk_count or merkle.root(leaves).hex() != stored.digest:
        problem = "its chunk digests are not those of its payload digest"
        raise DamagedPayloadError(stored.payload_id, problem)


def check_chunks(context: Context, stored: StoredPayload) -> None:
    """Read a payload in the payload store, and compare all of it with its digests.

    Raises:
        DamagedPayloadError: Chunks are missing or altered.
    """
    if stored.in_row:
        return
    check_digests(stored)
    source = PayloadBytes(context, stored, None, READ_CHUNKS)
    for first in range(0, stored.chunk_count, READ_CHUNKS):
        source.verify(first, min(READ_CHUNKS, stored.chunk_count - first))


def read_range(context: Context, stored: StoredPayload, first: int, count: int) -> list[bytes]:
    """Return up to `count` consecutive chunks as stored.

    Raises:
        PayloadPrunedError: They were pruned meanwhile.
    """
    wanted = max(0, min(count, stored.chunk_count - first))
    if stored.in_row:
        with context.database.read() as session:
            data = rows.read_data(session, stored.payload_id)
        chunks = [] if data is None else [data][first : first + wanted]
    else:
        chunks = _read(context, stored.chunks, first, wanted)
        if len(chunks) != wanted:
            chunks = _read_moved(context, stored, first, wanted)
    if len(chunks) != wanted:
        raise PayloadPrunedError
    return chunks


def _read_moved(context: Context, stored: StoredPayload, first: int, count: int) -> list[bytes]:
    """Return chunks of a payload that may have been moved to another payload store since its row was read."""
    with context.database.read() as session:
        found = rows.chunks_of(session, stored.payload_id)
    return [] if found == stored.chunks else _read(context, found, first, count)


def _read(context: Context, chunks: rows.ChunkSet | None, first: int, count: int) -> list[bytes]:
    if chunks is None:
        return []
    return context.store_of(chunks.store).read(chunks.payload_id, first, count)


def read_chunks(context: Context, stored: StoredPayload, first: int = 0) -> Iterator[bytes]:
    """Yield a payload's chunks as stored, from `first` on, in bounded memory."""
    for start in range(first, stored.chunk_count, READ_CHUNKS):
        yield from read_range(context, stored, start, READ_CHUNKS)


class Contents:
    """The plaintext of a stored payload, in pieces; used by one thread.

    Attributes:
        size_bytes: Size of the plaintext in bytes.
        piece_bytes: Size of each piece but the last: `CHUNK_BYTES`, less if the payload is sealed.
        piece_count: Number of pieces, equal to the number of stored chunks.

    Args:
        context: The coordinator's parts.
        stored: The payload.
    """

    def __init__(self, context: Context, stored: StoredPayload) -> None:
        self._context = context
        self._stored = stored
        self._opener: PayloadOpener | None = None
        is_sealed = stored.seal is not None
        self.piece_bytes = PLAINTEXT_BYTES if is_sealed else CHUNK_BYTES
        self.piece_count = stored.chunk_count
        self.size_bytes = opened_size_bytes(stored.size_bytes) if is_sealed else stored.size_bytes

    def read(self, first: int, count: int) -> list[bytes]:
        """Return up to `count` consecutive pieces.

        Raises:
            PayloadPrunedError: They were pruned meanwhile.
            SealedPayloadLostError: They cannot be opened.
        """
        kept = read_range(self._context, self._stored, first, count)
        return kept if self._stored.seal is None else list(self.open(kept, first))

    def open(self, kept: Iterable[bytes], first: int = 0) -> Iterator[bytes]:
        """Yield the plaintext of consecutive stored chunks, which begin with chunk `first`.

        Raises:
            SealedPayloadLostError: They cannot be opened.
        """
        if self._stored.seal is None:
            yield from kept
            return
        opener = self._opened(self._stored.seal)
        for number, chunk in enumerate(kept, first):
            try:
                yield opener.open_segment(number, chunk)
            except UnsealError as error:
                raise SealedPayloadLostError(
                    f"payload {self._stored.payload_id}: {error}"
                ) from error

    def _opened(self, seal: Seal) -> PayloadOpener:
        if self._opener is None:
            key: PayloadKey = restore_key(self._context, self._stored.payload_id, seal)
            self._opener = PayloadOpener(key, self.size_bytes)
        return self._opener


def rechunk_after(pieces: Iterator[bytes], skipped_bytes: int) -> Iterator[bytes]:
    """Yield chunks of `CHUNK_BYTES` from pieces of any size, skipping the first `skipped_bytes`."""

    def rest() -> Iterator[memoryview]:
        left = skipped_bytes
        for piece in pieces:
            view = memoryview(piece)[left:]
            left = max(0, left - len(piece))
            yield view

    return rechunk(rest())
