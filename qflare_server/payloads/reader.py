"""Random access to stored payloads, sealed or not, in bounded memory."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from qflare.crypto.sealed_payloads import (
    PLAINTEXT_BYTES,
    PayloadKey,
    PayloadOpener,
    opened_size_bytes,
)
from qflare.crypto.sealing import UnsealError
from qflare.tensors import CHUNK_BYTES, rechunk
from qflare_server.context import Context
from qflare_server.errors import PayloadPrunedError, SealedPayloadLostError
from qflare_server.payloads.keys import restore_key
from qflare_server.storage.payload_records import Seal, StoredPayload
from qflare_server.storage.payload_store import READ_CHUNKS
from qflare_server.storage.repository import payloads as rows


@dataclass(frozen=True)
class _Range:
    """Consecutive pieces of a payload, each but the last of `piece_bytes`; the first begins at offset `start`."""

    start: int
    pieces: Sequence[bytes]
    piece_bytes: int

    @property
    def stop(self) -> int:
        return self.start + (len(self.pieces) - 1) * self.piece_bytes + len(self.pieces[-1])

    def view(self, offset: int, length: int) -> memoryview:
        """Return bytes of the payload; copies only if they span several pieces."""
        number, within = divmod(offset - self.start, self.piece_bytes)
        first = memoryview(self.pieces[number])[within : within + length]
        if len(first) == length:
            return first
        parts, missing = [first], length - len(first)
        while missing:
            number += 1
            parts.append(memoryview(self.pieces[number])[:missing])
            missing -= len(parts[-1])
        return memoryview(b"".join(parts))


class PayloadBytes:
    """Random access to the plaintext of a payload; caches the last two ranges. Used by one thread.

    Two ranges, because a top-k update is read alternately in its indices and in its values.
    """

    def __init__(
        self, context: Context, stored: StoredPayload, data: bytes | None, ahead: int
    ) -> None:
        self._contents = Contents(context, stored)
        self._ahead = ahead
        self._ranges: list[_Range] = []
        if data:
            (held,) = self._contents.open([data])
            self._ranges.append(_Range(0, [held], len(held)))

    def read(self, offset: int, length: int) -> memoryview:
        """Return `length` bytes from `offset` on."""
        if not length:
            return memoryview(b"")
        for held in self._ranges:
            if held.start <= offset and offset + length <= held.stop:
                return held.view(offset, length)
        held = self._load(offset, length)
        self._ranges = [held, *self._ranges[:1]]
        return held.view(offset, length)

    def _load(self, offset: int, length: int) -> _Range:
        piece_bytes = self._contents.piece_bytes
        first = offset // piece_bytes
        last = (offset + length - 1) // piece_bytes
        pieces = self._contents.read(first, max(self._ahead, last - first + 1))
        return _Range(first * piece_bytes, pieces, piece_bytes)


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
        chunks = context.store.read(stored.payload_id, first, wanted)
    if len(chunks) != wanted:
        raise PayloadPrunedError
    return chunks


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
