"""Value objects that mirror rows of payloads, and the statements that write and read them."""

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
from qflare_server.storage.repository import payloads as rows
from qflare_server.storage.tables import Payload


@dataclass(frozen=True)
class Seal:
    """How a stored payload is sealed.

    Attributes:
        header: What stands before its segments, 74 bytes.
        stored_key: Its key at rest; empty if it is gone.
        content_digests: Leaf hashes of the chunks of what is in it, 32 bytes each; empty where nobody asks for them.
    """

    header: bytes
    stored_key: bytes = field(repr=False)
    content_digests: bytes = b""


@dataclass(frozen=True)
class ReceivedPayload:
    """A whole payload, checked; `data` is None if its chunks are in the store.

    Size and digests are those of the bytes that are kept: of the segments where it is sealed.
    """

    payload_id: str
    size_bytes: int
    digest: str
    chunk_digests: bytes
    data: bytes | None
    seal: Seal | None = None

    @property
    def content_size_bytes(self) -> int:
        """Bytes of what is in it."""
        return self.size_bytes if self.seal is None else opened_size_bytes(self.size_bytes)

    @property
    def content_digest(self) -> str:
        """Root over the chunks of what is in it, 64 hex digits."""
        if self.seal is None:
            return self.digest
        return merkle.root(split_digests(self.seal.content_digests)).hex()

    def insert(self, session: Session, at: datetime) -> None:
        """Insert the payload's row; from then on its chunks are no longer those of an upload."""
        insert_received(session, [self], at)


def insert_received(session: Session, payloads: Sequence[ReceivedPayload], at: datetime) -> None:
    """Insert the rows of payloads; from then on their chunks are no longer those of uploads.

    Raises:
        ConflictError: An upload was given up meanwhile, or chunks are missing: the payload has to be sent again.
    """
    values = [
        {
            "id": payload.payload_id,
            "size_bytes": payload.size_bytes,
            "digest": payload.digest,
            "chunk_digests": payload.chunk_digests,
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
    """Forget an upload whose chunks are all there, in the transaction that names them."""
    chunk_count = len(payload.chunk_digests) // HASH_BYTES
    if not rows.has_every_chunk(session, payload.payload_id, chunk_count):
        raise ConflictError("chunks of the upload are missing; send them again")
    if not rows.finish_upload(session, payload.payload_id):
        raise ConflictError("the upload was given up; send it again")


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
    """A payload that can be read outside a transaction."""

    payload_id: str
    size_bytes: int
    digest: str
    chunk_digests: bytes
    in_row: bool
    seal: Seal | None = None

    @property
    def chunk_count(self) -> int:
        """Number of chunks that are kept."""
        return -(-self.size_bytes // CHUNK_BYTES)


def describe(payload: Payload | None) -> StoredPayload:
    """Return what is needed to read a payload.

    Raises:
        PayloadPrunedError: Its bytes are no longer kept.
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
    )


def content_digest_of(payload: Payload) -> str:
    """Return the root over the chunks of what is in a payload, from its row; 64 hex digits."""
    if payload.content_digests is None:
        return payload.digest
    return merkle.root(split_digests(payload.content_digests)).hex()


def seal_of(header: bytes | None, key: bytes | None, content_digests: bytes | None) -> Seal | None:
    """Return how a payload is sealed, from its columns; None if it is not."""
    return None if header is None else Seal(header, key or b"", content_digests or b"")


@dataclass(frozen=True)
class Download:
    """The form in which devices get a version, where that is not its payload."""

    encoding: Encoding
    payload: ReceivedPayload

    def statement(self) -> training_pb2.EncodedPayload:
        """Return what the version's statement says of it."""
        return training_pb2.EncodedPayload(
            encoding=training_pb2.Encoding.ValueType(self.encoding),
            size_bytes=self.payload.size_bytes,
            payload_digest=self.payload.digest,
        )


HASH_BYTES: Final = 32


def split_digests(digests: bytes) -> list[bytes]:
    """Cut concatenated leaf hashes apart."""
    return [digests[start : start + HASH_BYTES] for start in range(0, len(digests), HASH_BYTES)]
