"""Statements on payloads and unfinished uploads.

A small payload is stored in its row, in the transaction of the row that refers to it; the chunks of a large one are
written to the payload store (`storage.payload_store`) beforehand. A chunk that no payload row refers to is invisible;
the table `uploads` records it until a payload row refers to it or it is swept.
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, Final, NamedTuple

from sqlalchemy import (
    ColumnElement,
    Select,
    and_,
    bindparam,
    delete,
    func,
    insert,
    select,
    union_all,
    update,
)
from sqlalchemy.orm import Session

from qflare_server.storage import tables
from qflare_server.storage.prepared import PreparedInsert
from qflare_server.storage.records import Payload, Rows

PAYLOADS = tables.Payload.__table__
UPLOADS = tables.Upload.__table__
CHUNKS = tables.PayloadChunk.__table__
PLACES = tables.PayloadPlace.__table__
UPDATES = tables.ModelUpdate.__table__
_ROWS = Rows(Payload, PAYLOADS)
_ROW = _ROWS.select.where(PAYLOADS.c.id == bindparam("payload"))
DATABASE: Final = "database"
"""Name of the payload store whose chunks are rows."""
LONG_AGO: Final = datetime(2000, 1, 1, tzinfo=UTC)
"""`touched_at` of an abandoned upload."""


class ChunkSet(NamedTuple):
    """Chunks in a payload store; `payload_id` is their id in it."""

    payload_id: str
    store: str


_INSERT_PAYLOAD = PreparedInsert(
    PAYLOADS,
    (
        "id",
        "size_bytes",
        "digest",
        "chunk_digests",
        "location",
        "store",
        "chunks_id",
        "data",
        "sealed_header",
        "sealed_key",
        "content_digests",
        "created_at",
    ),
)


def insert_payloads(session: Session, rows: Sequence[Mapping[str, Any]]) -> None:
    """Insert rows of payloads; a payload without `data` has its chunks in the payload store `store`."""
    _INSERT_PAYLOAD.run(
        session,
        [
            {
                **row,
                "location": "store" if row["data"] is None else "row",
                "chunks_id": row["id"] if row["data"] is None else None,
            }
            for row in rows
        ],
    )


def read_data(session: Session, payload_id: str) -> bytes | None:
    """Return the bytes of a payload that are in its row."""
    return session.execute(
        select(PAYLOADS.c.data).where(PAYLOADS.c.id == payload_id)
    ).scalar_one_or_none()


def chunks_of(session: Session, payload_id: str) -> ChunkSet | None:
    """Return the chunks of a payload; None if its bytes are in its row, or if it was pruned."""
    query = select(PAYLOADS.c.chunks_id, PAYLOADS.c.store).where(
        PAYLOADS.c.id == payload_id, PAYLOADS.c.location == "store"
    )
    row = session.execute(query).one_or_none()
    return None if row is None else ChunkSet(*row)


def get_payload(session: Session, payload_id: str) -> Payload | None:
    """Return a payload, without the bytes stored in its row."""
    return _ROWS.one(session, _ROW, {"payload": payload_id})


def begin_upload(
    session: Session,
    *,
    payload_id: str,
    store: str,
    at: datetime,
    update_id: str | None = None,
    device_id: str | None = None,
    statement_digest: str = "",
    sealed_key: bytes | None = None,
) -> None:
    """Record an upload before its chunks are written, so that it can be resumed or swept."""
    session.execute(
        insert(UPLOADS).values(
            payload_id=payload_id,
            store=store,
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
    """An unfinished upload."""

    payload_id: str
    store: str
    device_id: str | None
    statement_digest: str
    sealed_key: bytes | None

    @property
    def chunks(self) -> ChunkSet:
        """Its chunks."""
        return ChunkSet(self.payload_id, self.store)


def find_upload(session: Session, update_id: str) -> UnfinishedUpload | None:
    """Return the unfinished upload of an update; None without one."""
    row = session.execute(
        select(
            UPLOADS.c.payload_id,
            UPLOADS.c.store,
            UPLOADS.c.device_id,
            UPLOADS.c.statement_digest,
            UPLOADS.c.sealed_key,
        ).where(UPLOADS.c.update_id == update_id)
    ).one_or_none()
    return None if row is None else UnfinishedUpload(*row)


def uploads_of(session: Session, device_id: str) -> list[ChunkSet]:
    """Return the chunks of a device's unfinished uploads, the least recently touched first."""
    query = (
        select(UPLOADS.c.payload_id, UPLOADS.c.store)
        .where(UPLOADS.c.device_id == device_id)
        .order_by(UPLOADS.c.touched_at, UPLOADS.c.payload_id)
    )
    return [ChunkSet(*row) for row in session.execute(query)]


def _is(chunks: ChunkSet) -> ColumnElement[bool]:
    return and_(UPLOADS.c.payload_id == chunks.payload_id, UPLOADS.c.store == chunks.store)


def touch_upload(session: Session, chunks: ChunkSet, at: datetime) -> bool:
    """Keep an unfinished upload from expiring; does nothing to an abandoned one, and returns False."""
    result = session.execute(
        update(UPLOADS).where(_is(chunks), UPLOADS.c.touched_at > LONG_AGO).values(touched_at=at)
    )
    return bool(result.rowcount)  # type: ignore[attr-defined]  # a CursorResult has it


def give_up_uploads(session: Session, abandoned: Sequence[ChunkSet]) -> None:
    """Abandon uploads: they cannot be resumed or finished, and their chunks are swept."""
    for chunks in abandoned:
        session.execute(
            update(UPLOADS)
            .where(_is(chunks))
            .values(update_id=None, device_id=None, touched_at=LONG_AGO)
        )


def finish_upload(session: Session, chunks: ChunkSet) -> bool:
    """Delete the record of an upload whose payload has a row; False if it was abandoned, and chunks may be gone."""
    result = session.execute(delete(UPLOADS).where(_is(chunks), UPLOADS.c.touched_at > LONG_AGO))
    return bool(result.rowcount)  # type: ignore[attr-defined]  # a CursorResult has it


def has_every_chunk(session: Session, chunks: ChunkSet, chunk_count: int) -> bool:
    """Return whether all chunks of an upload are in the table of chunks; True if they are not kept in it.

    PostgreSQL makes a chunk visible only after its commit is on disk, so a visible chunk is durable. Other stores
    have confirmed that the payload is whole and durable (`PayloadStore.complete`) before the transaction begins.
    """
    if chunks.store != DATABASE or session.get_bind().dialect.name != "postgresql":
        return True
    payload_id = chunks.payload_id
    query = select(func.count()).select_from(CHUNKS).where(CHUNKS.c.payload_id == payload_id)
    return session.execute(query).scalar_one() == chunk_count


def end_upload(session: Session, chunks: ChunkSet) -> None:
    """Delete the record of an upload whose chunks are deleted."""
    session.execute(delete(UPLOADS).where(_is(chunks)))


def expired_uploads(
    session: Session, before: datetime, stores: Collection[str], limit: int
) -> list[ChunkSet]:
    """Return chunks in some stores of uploads last touched before a time, abandoned ones included."""
    query = select(UPLOADS.c.payload_id, UPLOADS.c.store).where(
        UPLOADS.c.touched_at < before, UPLOADS.c.store.in_(stores)
    )
    return [ChunkSet(*row) for row in session.execute(query.limit(limit))]


def prune_updates(
    session: Session,
    training_session_id: str,
    round_number: int,
    last: int,
    count: int,
    at: datetime,
) -> None:
    """Mark the payloads of `count` updates of a round as pruned, those up to acceptance sequence `last`.

    They are marked before their chunks are deleted, so that no reader finds half a payload; the chunks are left to be
    swept. The keys of sealed payloads are deleted at once, so that chunks that still exist cannot be opened.
    """
    ids = select(UPDATES.c.payload_id).where(
        UPDATES.c.training_session_id == training_session_id,
        UPDATES.c.round_number == round_number,
        UPDATES.c.acceptance_sequence > last - count,
        UPDATES.c.acceptance_sequence <= last,
    )
    stored = select(PAYLOADS.c.chunks_id, PAYLOADS.c.store).where(
        PAYLOADS.c.id.in_(ids), PAYLOADS.c.location == "store"
    )
    for chunks_id, store in session.execute(stored).all():
        begin_upload(session, payload_id=chunks_id, store=store, at=LONG_AGO)
    mark_pruned(session, ids, at)


def mark_pruned(session: Session, payload_ids: Sequence[str] | Select[Any], at: datetime) -> None:
    """Mark payloads, by ids or a query for ids, as pruned; the caller abandons their chunks."""
    session.execute(
        update(PAYLOADS)
        .where(PAYLOADS.c.id.in_(payload_ids), PAYLOADS.c.location != "none")
        .values(location="none", data=None, sealed_key=None, pruned_at=at)
    )


def keys_under_others(
    session: Session, storage_key_name: bytes, limit: int
) -> Sequence[tuple[str, bytes, bytes]]:
    """Return ids, headers and stored keys of sealed payloads whose key is encrypted under another storage key."""
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
    """Replace the stored key of a sealed payload, unless it was pruned."""
    session.execute(
        update(PAYLOADS)
        .where(PAYLOADS.c.id == payload_id, PAYLOADS.c.sealed_key.is_not(None))
        .values(sealed_key=stored_key)
    )


def place_identity(session: Session, store: str) -> str:
    """Return the name of the folder or bucket of a payload store; empty before its first use."""
    query = select(PLACES.c.identity).where(PLACES.c.store == store)
    return session.execute(query).scalar_one_or_none() or ""


def record_place(session: Session, store: str, identity: str, at: datetime) -> None:
    """Record the name of the folder or bucket of a payload store."""
    session.execute(insert(PLACES).values(store=store, identity=identity, created_at=at))


def place_owners(session: Session, store: str) -> set[str]:
    """Return the names under which this database may own the folder or bucket of a payload store."""
    query = select(PLACES.c.owner, PLACES.c.next_owner).where(PLACES.c.store == store)
    return {name for row in session.execute(query) for name in row if name}


def begin_owner(session: Session, store: str, name: str, *, forced: bool) -> str:
    """Record the name that is about to replace the owner's; return it.

    Args:
        session: Write transaction.
        store: Payload store.
        name: A new name.
        forced: Use it even if another one is about to be written; otherwise that one is returned.
    """
    if not forced:
        query = select(PLACES.c.next_owner).where(PLACES.c.store == store).with_for_update()
        pending: str | None = session.execute(query).scalar_one_or_none()
        if pending:
            return pending
    session.execute(update(PLACES).where(PLACES.c.store == store).values(next_owner=name))
    return name


def finish_owner(session: Session, store: str, name: str) -> None:
    """Record that the folder or bucket of a payload store has the new name of its owner."""
    session.execute(
        update(PLACES)
        .where(PLACES.c.store == store, PLACES.c.next_owner == name)
        .values(owner=name, next_owner=None)
    )


def has_payloads(session: Session, store: str) -> bool:
    """Return whether a row refers to chunks in a payload store."""
    query = select(PAYLOADS.c.id).where(PAYLOADS.c.store == store, PAYLOADS.c.location == "store")
    return session.execute(query.limit(1)).first() is not None


def in_stores(
    session: Session, stores: Collection[str] | None, after: str, limit: int
) -> Sequence[Payload]:
    """Return payloads whose chunks are in some payload stores, or in any, by id from after one."""
    query = _ROWS.select.where(PAYLOADS.c.location == "store", PAYLOADS.c.id > after)
    if stores is not None:
        query = query.where(PAYLOADS.c.store.in_(stores))
    return _ROWS.all(session, query.order_by(PAYLOADS.c.id).limit(limit))


def named_stores(session: Session) -> list[str]:
    """Return the payload stores that rows refer to."""
    query = select(PAYLOADS.c.store).where(PAYLOADS.c.location == "store").distinct()
    return [name for name in session.scalars(query) if name is not None]


def move(session: Session, original: ChunkSet, copy: ChunkSet) -> bool:
    """Refer to a copy of a payload's chunks instead of the original; leave the one that is not needed to be swept.

    Returns:
        False if the copy was abandoned, or the payload was pruned or moved meanwhile.
    """
    if not finish_upload(session, copy):
        return False
    moved = session.execute(
        update(PAYLOADS)
        .where(PAYLOADS.c.chunks_id == original.payload_id, PAYLOADS.c.location == "store")
        .values(store=copy.store, chunks_id=copy.payload_id)
    )
    is_moved = bool(moved.rowcount)  # type: ignore[attr-defined]  # a CursorResult has it
    left = original if is_moved else copy
    begin_upload(session, payload_id=left.payload_id, store=left.store, at=LONG_AGO)
    return is_moved


def claim_orphans(session: Session, store: str, payload_ids: Collection[str]) -> int:
    """Leave those chunks in a payload store to be swept that no row refers to; return the number of payloads.

    Chunks are written after a row of `uploads` names them, so chunks that were listed before cannot be of an upload
    whose row is still to come.
    """
    named = union_all(
        select(PAYLOADS.c.chunks_id).where(
            PAYLOADS.c.chunks_id.in_(payload_ids), PAYLOADS.c.location == "store"
        ),
        select(UPLOADS.c.payload_id).where(UPLOADS.c.payload_id.in_(payload_ids)),
    )
    orphans = set(payload_ids) - set(session.scalars(named))
    for payload_id in sorted(orphans):
        begin_upload(session, payload_id=payload_id, store=store, at=LONG_AGO)
    return len(orphans)
