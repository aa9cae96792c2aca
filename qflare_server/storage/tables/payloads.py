"""Tables of payloads, their chunks, and unfinished uploads."""

from datetime import datetime

from sqlalchemy import BigInteger, CheckConstraint, ForeignKey, Index, String, UniqueConstraint
from sqlalchemy.orm import Mapped, mapped_column

from qflare_server.storage.tables.types import Base


class Payload(Base):
    """Bytes of a model, an update or an optimizer's state.

    `location` is `row` for a small payload in `data`, `store` for chunks in the payload store, `none` after pruning.
    `store` names the payload store of the chunks, and `chunks_id` their id in it; both are null for a payload in its
    row. The id is that of the payload until it is moved to another store.
    `digest` is the Merkle root over `chunk_digests`, leaf hashes of 32 bytes each.

    A sealed payload is stored as its segments: size and digests above are those of the segments. `content_digests` are
    the leaf hashes of the plaintext chunks, `sealed_header` is the header of the segments, and `sealed_key` their
    content key, encrypted under a key that is not in the database (`payloads.keys`) and deleted when the payload is
    pruned. All three are null for a payload that is not sealed.
    """

    __tablename__ = "payloads"

    id: Mapped[str] = mapped_column(String(32), primary_key=True)
    size_bytes: Mapped[int] = mapped_column(BigInteger)
    digest: Mapped[str] = mapped_column(String(64))
    chunk_digests: Mapped[bytes]
    location: Mapped[str] = mapped_column(String(8))
    store: Mapped[str | None] = mapped_column(String(8))
    chunks_id: Mapped[str | None] = mapped_column(String(32))
    data: Mapped[bytes | None] = mapped_column(deferred=True)
    sealed_header: Mapped[bytes | None]
    sealed_key: Mapped[bytes | None]
    content_digests: Mapped[bytes | None]
    created_at: Mapped[datetime]
    pruned_at: Mapped[datetime | None]

    __table_args__ = (CheckConstraint("location IN ('row', 'store', 'none')", name="location"),)


class PayloadChunk(Base):
    """One chunk of a large payload in the payload store `database`, written before the payload's row.

    With an SQLite database chunks are in a separate file, and this table of the database stays empty.
    """

    __tablename__ = "payload_chunks"

    payload_id: Mapped[str] = mapped_column(String(32), primary_key=True)
    chunk_index: Mapped[int] = mapped_column(primary_key=True, autoincrement=False)
    data: Mapped[bytes]


class Upload(Base):
    """Chunks in a payload store that no payload's row refers to: of an unfinished upload or of a payload being moved.

    `payload_id` is the id of the chunks, which a copy has for itself. A row is deleted when that of the payload is
    written, or with the chunks after the upload has expired or was abandoned.

    `update_id` and `device_id` are null for payloads that the coordinator writes itself. A device that sends the same
    update again resumes after the last stored chunk. `sealed_key` is the content key as in `Payload`, so that a sealed
    upload can be resumed after the coordinator's keys have changed.
    """

    __tablename__ = "uploads"

    payload_id: Mapped[str] = mapped_column(String(32), primary_key=True)
    store: Mapped[str] = mapped_column(String(8))
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


class PayloadPlace(Base):
    """The folder or bucket of a payload store: a random name, which a marker in it repeats.

    It tells a folder that is not mounted, a wrong bucket and one of another deployment from the right one. Its owner is
    the database that may delete from it (`storage.place_ownership`); `next_owner` is about to replace it.
    """

    __tablename__ = "payload_places"

    store: Mapped[str] = mapped_column(String(8), primary_key=True)
    identity: Mapped[str] = mapped_column(String(32))
    created_at: Mapped[datetime]
    owner: Mapped[str | None] = mapped_column(String(32))
    next_owner: Mapped[str | None] = mapped_column(String(32))
