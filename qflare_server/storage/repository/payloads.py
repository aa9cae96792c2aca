"""The rows of payloads and of unfinished uploads.

A small payload is stored in its row, in the transaction of the row that refers to it; the chunks of a large one are
written to the payload store (`storage.payload_store`) beforehand. A chunk that no payload row refers to is invisible;
the table `uploads` records it until a payload row refers to it or it is swept.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, Final

from sqlalchemy import delete, func, insert, select, update
from sqlalchemy.orm import Session

from qflare_server.storage.prepared import PreparedInsert
from qflare_server.storage.tables import Payload, PayloadChunk, Upload

PAYLOADS = Payload.__table__
UPLOADS = Upload.__table__
CHUNKS = PayloadChunk.__table__
LONG_AGO: Final = datetime(2000, 1, 1, tzinfo=UTC)
"""When an upload that was given up was last touched."""

_INSERT_PAYLOAD = PreparedInsert(
    PAYLOADS,
    (
        "id",
        "size_bytes",
        "digest",
        "chunk_digests",
        "location",
        "data",
        "sealed_header",
        "sealed_key",
        "content_digests",
        "created_at",
    ),
)


def insert_payloads(session: Session, rows: Sequence[Mapping[str, Any]]) -> None:
    """Insert payloads' rows; one without `data` has its chunks in the store."""
    _INSERT_PAYLOAD.run(
        session,
        [{**row, "location": "store" if row["data"] is None else "row"} for row in rows],
    )


def read_data(session: Session, payload_id: str) -> bytes | None:
    """Return the bytes of a payload that lie in its row."""
    return session.execute(
        select(PAYLOADS.c.data).where(PAYLOADS.c.id == payload_id)
    ).scalar_one_or_none()


def get_payload(session: Session, payload_id: str) -> Payload | None:
    """Return a payload's row."""
    return session.get(Payload, payload_id)


def begin_upload(
    session: Session,
    *,
    payload_id: str,
    at: datetime,
    update_id: str | None = None,
    device_id: str | None = None,
    statement_digest: str = "",
    sealed_key: bytes | None = None,
) -> None:
    """Remember chunks that are about to be written, so that they can be found again or swept."""
    session.execute(
        insert(UPLOADS).values(
            payload_id=payload_id,
            update_id=update_id,
            device_id=device_id,
            statement_digest=statement_digest,
            sealed_key=sealed_key,
            created_at=at,
            touched_at=at,
        )
    )


@dataclass(frozen=True)
class UnfinishedUpload:
    """An upload that broke off, and whose it is."""

    payload_id: str
    device_id: str | None
    statement_digest: str
    sealed_key: bytes | None


def find_upload(session: Session, update_id: str) -> UnfinishedUpload | None:
    """Return the unfinished upload of an update, None if there is none."""
    row = session.execute(
        select(
            UPLOADS.c.payload_id,
            UPLOADS.c.device_id,
            UPLOADS.c.statement_digest,
            UPLOADS.c.sealed_key,
        ).where(UPLOADS.c.update_id == update_id)
    ).one_or_none()
    return None if row is None else UnfinishedUpload(*row)


def uploads_of(session: Session, device_id: str) -> list[str]:
    """Return the payload ids of a device's unfinished uploads, the one that was touched longest ago first."""
    query = (
        select(UPLOADS.c.payload_id)
        .where(UPLOADS.c.device_id == device_id)
        .order_by(UPLOADS.c.touched_at, UPLOADS.c.payload_id)
    )
    return list(session.scalars(query))


def touch_upload(session: Session, payload_id: str, at: datetime) -> None:
    """Keep an unfinished upload from expiring; one that is given up stays so."""
    session.execute(
        update(UPLOADS)
        .where(UPLOADS.c.payload_id == payload_id, UPLOADS.c.touched_at > LONG_AGO)
        .values(touched_at=at)
    )


def give_up_uploads(session: Session, payload_ids: Sequence[str]) -> None:
    """Make uploads impossible to continue or finish; their chunks are swept."""
    session.execute(
        update(UPLOADS)
        .where(UPLOADS.c.payload_id.in_(payload_ids))
        .values(update_id=None, device_id=None, touched_at=LONG_AGO)
    )


def finish_upload(session: Session, payload_id: str) -> bool:
    """Forget an upload whose payload has a row; False if it was given up, and its chunks may be gone."""
    result = session.execute(
        delete(UPLOADS).where(UPLOADS.c.payload_id == payload_id, UPLOADS.c.touched_at > LONG_AGO)
    )
    return bool(result.rowcount)  # type: ignore[attr-defined]  # a DML result has it


def has_every_chunk(session: Session, payload_id: str, chunk_count: int) -> bool:
    """Return whether all chunks of an upload are in this database; true where chunks lie in a store of their own.

    PostgreSQL shows a chunk to others only after its commit is on disk, so a chunk that is seen here is durable.
    """
    if session.get_bind().dialect.name != "postgresql":
        return True
    query = select(func.count()).select_from(CHUNKS).where(CHUNKS.c.payload_id == payload_id)
    return session.execute(query).scalar_one() == chunk_count


def end_upload(session: Session, payload_id: str) -> None:
    """Forget an upload whose chunks are deleted."""
    session.execute(delete(UPLOADS).where(UPLOADS.c.payload_id == payload_id))


def expired_uploads(session: Session, before: datetime, limit: int) -> list[str]:
    """Return payload ids of uploads that nobody has touched since `before`, those given up among them."""
    query = select(UPLOADS.c.payload_id).where(UPLOADS.c.touched_at < before).limit(limit)
    return list(session.scalars(query))


def mark_pruned(session: Session, payload_ids: Sequence[str], at: datetime) -> None:
    """Say that payloads are gone: before their chunks are deleted, so that no reader meets half a payload.

    The keys of sealed ones go at once, so that nothing opens chunks that are still there.
    """
    session.execute(
        update(PAYLOADS)
        .where(PAYLOADS.c.id.in_(payload_ids))
        .values(location="none", data=None, sealed_key=None, pruned_at=at)
    )


def keys_under_others(
    session: Session, storage_key_name: bytes, limit: int
) -> Sequence[tuple[str, bytes, bytes]]:
    """Return ids, headers and stored keys of sealed payloads whose key is under another storage key than this."""
    query = (
        select(PAYLOADS.c.id, PAYLOADS.c.sealed_header, PAYLOADS.c.sealed_key)
        .where(
            PAYLOADS.c.sealed_key.is_not(None),
            func.substr(PAYLOADS.c.sealed_key, 1, len(storage_key_name)) != storage_key_name,
        )
        .order_by(PAYLOADS.c.id)
        .limit(limit)
    )
    return [(row[0], row[1], row[2]) for row in session.execute(query)]


def replace_key(session: Session, payload_id: str, stored_key: bytes) -> None:
    """Replace the stored key of a sealed payload that is still kept."""
    session.execute(
        update(PAYLOADS)
        .where(PAYLOADS.c.id == payload_id, PAYLOADS.c.sealed_key.is_not(None))
        .values(sealed_key=stored_key)
    )
