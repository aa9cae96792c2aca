"""Verification of the bytes of models and updates against their digests, in bounded memory."""

from collections.abc import Iterator

from qflare.crypto import merkle
from qflare.tensors import CHUNK_BYTES, PieceHasher
from qflare_server.context import Context
from qflare_server.errors import PayloadPrunedError, SealedPayloadLostError
from qflare_server.payloads.reader import Contents, read_chunks
from qflare_server.storage.payload_records import describe, split_digests
from qflare_server.storage.records import Payload
from qflare_server.storage.repository import evidence
from qflare_server.verification.findings import Finding, Tally, faults, walk


class ContentVerification:
    """One pass over all payloads.

    Args:
        context: The coordinator's dependencies.
        tally: Counts of what was checked.
        read_bytes: Also hash the bytes; otherwise only the digests are checked.
    """

    def __init__(self, context: Context, tally: Tally, *, read_bytes: bool) -> None:
        self._context = context
        self._tally = tally
        self._read_bytes = read_bytes

    def findings(self) -> Iterator[Finding]:
        """Yield discrepancies."""
        rows = walk(self._context.database, evidence.payloads_after, "", _payload_id)
        yield from faults("payload", rows, self._check, _payload_id, self._tally)

    def _check(self, row: Payload) -> None:
        stated = split_digests(row.chunk_digests)
        if merkle.root(stated).hex() != row.digest:
            raise ValueError("chunk digests and digest do not belong together")
        if row.location == "none":
            self._tally.unchecked["payloads that are pruned"] += 1
        elif self._read_bytes:
            self._check_bytes(row, stated)
        else:
            self._tally.unchecked["payloads whose bytes were not read"] += 1

    def _check_bytes(self, row: Payload, stated: list[bytes]) -> None:
        size_bytes = place = 0
        try:
            for chunk in read_chunks(self._context, describe(row)):
                if place >= len(stated) or merkle.leaf_hash(chunk) != stated[place]:
                    raise ValueError(f"chunk {place} was changed")
                size_bytes += len(chunk)
                place += 1
        except PayloadPrunedError as error:
            raise ValueError(f"bytes are missing after chunk {place}") from error
        if size_bytes != row.size_bytes or place != -(-row.size_bytes // CHUNK_BYTES):
            raise ValueError(f"got {size_bytes} bytes, want {row.size_bytes}")
        if row.sealed_header is not None:
            self._check_sealed(row)

    def _check_sealed(self, row: Payload) -> None:
        """Open a sealed payload and compare its plaintext with its digests."""
        contents, content = Contents(self._context, describe(row)), PieceHasher()
        try:
            for place in range(contents.piece_count):
                for piece in contents.read(place, 1):
                    content.feed(piece)
        except SealedPayloadLostError as error:
            raise ValueError(f"it does not open: {error}") from error
        if b"".join(content.finish()) != row.content_digests:
            raise ValueError("what is sealed in it has other digests")


def _payload_id(row: Payload) -> str:
    return row.id
