"""Payload records: values that mirror rows of payloads, and the functions that write and read them."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import Final

from sqlalchemy.orm import Session

from qflare.crypto import merkle
from qflare.crypto.sealed_payloads import opened_size_bytes
from qflare.tensors import CHUNK_BYTES
from qflare.tensors.encodings import Encoding
from qflare.v1 import training_pb2
from qflare_server.errors import ConflictError, PayloadPrunedError
from qflare_server.storage.records import Payload
from qflare_server.storage.repository import payloads as rows


@dataclass(frozen=True)
class Seal:
    """Seal of a stored payload.

    Attributes:
        header: Header of the segments, 74 bytes.
        stored_key: Content key, encrypted for storage; empty after it was deleted.
        content_digests: Leaf hashes of the plaintext chunks, 32 bytes each; empty where the caller does not need them.
    """

    header: bytes
    stored_key: bytes = field(repr=False)
    content_digests: bytes = b""


@dataclass(frozen=True)
class ReceivedPayload:
    """A complete, verified payload; `data` is None if its chunks are in the payload store `store`.

    Size and digests are those of the stored bytes: of the segments if the payload is sealed.
    """

    payload_id: str
    size_bytes: int
    digest: str
    chunk_digests: bytes
    data: bytes | None
    seal: Seal | None = None
    store: str | None = None

    @property
    def chunks(self) -> rows.ChunkSet:
        """Its chunks in the payload store; `data` is None."""
        assert self.store is not None
        return rows.ChunkSet(self.payload_id, self.store)

    @property
    def content_size_bytes(self) -> int:
        """Size of the plaintext in bytes."""
        return self.size_bytes if self.seal is None else opened_size_bytes(self.size_bytes)

    @property
    def content_digest(self) -> str:
        """Merkle root over the plaintext chunks, 64 hex digits."""
        if self.seal is None:
            return self.digest
        return merkle.root(split_digests(self.seal.content_digests)).hex()

    def insert(self, session: Session, at: datetime) -> None:
        """Insert the payload's row, and delete that of its upload."""
        insert_received(session, [self], at)


def insert_received(session: Session, payloads: Sequence[ReceivedPayload], at: datetime) -> None:
    """Insert the rows of payloads, and delete those of their uploads.

    Raises:
        ConflictError: An upload was abandoned, or chunks are missing: the payload must be sent again.
    """
    values = [
        {
            "id": payload.payload_id,
            "size_bytes": payload.size_bytes,
            "digest": payload.digest,
            "chunk_digests": payload.chunk_digests,
            "store": payload.store,
            "data": payload.data,
            **_seal_columns(payload.seal),
            "created_at": at,
        }
        for payload in payloads
    ]
    rows.insert_payloads(session, values)
    for payload in payloads:
        if payload.data is None:
            _finish_upload(session, payload)


def _finish_upload(session: Session, payload: ReceivedPayload) -> None:
    """Delete the row of an upload whose chunks are complete, in the transaction that refers to them."""
    chunk_count = len(payload.chunk_digests) // HASH_BYTES
    if not rows.has_every_chunk(session, payload.chunks, chunk_count):
        raise ConflictError("chunks of the upload are missing; send it again")
    if not rows.finish_upload(session, payload.chunks):
        raise ConflictError("the upload was abandoned; send it again")


_NOT_SEALED: Final = dict.fromkeys(("sealed_header", "sealed_key", "content_digests"))


def _seal_columns(seal: Seal | None) -> Mapping[str, bytes | None]:
    if seal is None:
        return _NOT_SEALED
    return {
        "sealed_header": seal.header,
        "sealed_key": seal.stored_key,
        "content_digests": seal.content_digests,
    }


@dataclass(frozen=True)
class StoredPayload:
    """Reference to a stored payload, sufficient to read it outside a transaction.

    `chunks` are its chunks in a payload store; None if they are in its row.
    """

    payload_id: str
    size_bytes: int
    digest: str
    chunk_digests: bytes
    in_row: bool
    seal: Seal | None = None
    chunks: rows.ChunkSet | None = None

    @property
    def chunk_count(self) -> int:
        """Number of stored chunks."""
        return -(-self.size_bytes // CHUNK_BYTES)


def describe(payload: Payload | None) -> StoredPayload:
    """Return the reference to a payload, from its row.

    Raises:
        PayloadPrunedError: Its bytes were pruned.
    """
    if payload is None or payload.location == "none":
        raise PayloadPrunedError
    return StoredPayload(
        payload.id,
        payload.size_bytes,
        payload.digest,
        payload.chunk_digests,
        payload.location == "row",
        seal_of(payload.sealed_header, payload.sealed_key, payload.content_digests),
        chunks_of(payload.chunks_id, payload.store),
    )


def chunks_of(chunks_id: str | None, store: str | None) -> rows.ChunkSet | None:
    """Return the chunks of a payload from its columns; None if its bytes are in its row."""
    return None if chunks_id is None or store is None else rows.ChunkSet(chunks_id, store)


def content_digest_of(payload: Payload) -> str:
    """Return the Merkle root over a payload's plaintext chunks, from its row; 64 hex digits."""
    if payload.content_digests is None:
        return payload.digest
    return merkle.root(split_digests(payload.content_digests)).hex()


def seal_of(header: bytes | None, key: bytes | None, content_digests: bytes | None) -> Seal | None:
    """Return the seal of a payload from its columns; None if it is not sealed."""
    return None if header is None else Seal(header, key or b"", content_digests or b"")


@dataclass(frozen=True)
class Download:
    """The payload that devices download instead of a version's own, in a smaller encoding."""

    encoding: Encoding
    payload: ReceivedPayload

    def statement(self) -> training_pb2.EncodedPayload:
        """Return its entry in the version's statement."""
        return training_pb2.EncodedPayload(
            encoding=training_pb2.Encoding.ValueType(self.encoding),
            size_bytes=self.payload.size_bytes,
            payload_digest=self.payload.digest,
        )


HASH_BYTES: Final = 32


def split_digests(digests: bytes) -> list[bytes]:
    """Split concatenated leaf hashes."""
    return [digests[start : start + HASH_BYTES] for start in range(0, len(digests), HASH_BYTES)]
