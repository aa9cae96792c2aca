"""Bytes of models and updates, and uploads under way."""

from datetime import datetime

from sqlalchemy import BigInteger, CheckConstraint, ForeignKey, Index, String, UniqueConstraint
from sqlalchemy.orm import Mapped, mapped_column

from qflare_server.storage.tables.types import Base


class Payload(Base):
    """Bytes of a model, an update or an optimiser's state.

    `location` says where they are: `row` for a small payload in `data`, `store` for chunks in the payload store,
    `none` once pruned. `digest` is the Merkle root over `chunk_digests`, the leaf hashes of 32 bytes each.

    A sealed payload is kept as its segments: size and digests above are theirs, `content_digests` are the leaf hashes
    of what is in them, `sealed_header` stands before them, and `sealed_key` is their key, encrypted under a key that
    is not in the database (`payloads.keys`); it goes with the bytes. All three are null otherwise.
    """

    __tablename__ = "payloads"

    id: Mapped[str] = mapped_column(String(32), primary_key=True)
    size_bytes: Mapped[int] = mapped_column(BigInteger)
    digest: Mapped[str] = mapped_column(String(64))
    chunk_digests: Mapped[bytes]
    location: Mapped[str] = mapped_column(String(8))
    data: Mapped[bytes | None] = mapped_column(deferred=True)
    sealed_header: Mapped[bytes | None]
    sealed_key: Mapped[bytes | None]
    content_digests: Mapped[bytes | None]
    created_at: Mapped[datetime]
    pruned_at: Mapped[datetime | None]

    __table_args__ = (CheckConstraint("location IN ('row', 'store', 'none')", name="location"),)


class PayloadChunk(Base):
    """One chunk of a large payload, written before the payload's row.

    Beside an SQLite database these rows are in a file of their own, and this table stays empty.
    """

    __tablename__ = "payload_chunks"

    payload_id: Mapped[str] = mapped_column(String(32), primary_key=True)
    chunk_index: Mapped[int] = mapped_column(primary_key=True, autoincrement=False)
    data: Mapped[bytes]


class Upload(Base):
    """A large payload whose chunks are being written; deleted when its own row is written or it is given up.

    `update_id` and `device_id` are null for payloads that the coordinator itself writes. A device that comes
    back with the same update goes on where its chunks end. `sealed_key` is the key of a sealed one, as `Payload` has
    it, so that it can go on after the coordinator's keys have changed.
    """

    __tablename__ = "uploads"

    payload_id: Mapped[str] = mapped_column(String(32), primary_key=True)
    update_id: Mapped[str | None] = mapped_column(String(36))
    device_id: Mapped[str | None] = mapped_column(ForeignKey("devices.id"))
    statement_digest: Mapped[str] = mapped_column(String(64), default="")
    sealed_key: Mapped[bytes | None]
    created_at: Mapped[datetime]
    touched_at: Mapped[datetime]

    __table_args__ = (
        UniqueConstraint("update_id"),
        Index(None, "touched_at"),
        Index(None, "device_id"),
    )
