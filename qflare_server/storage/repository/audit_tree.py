"""Statements on the Merkle tree over the audit log: its entries in order, its nodes, its signed heads.

Nodes are the roots of complete subtrees (`qflare.crypto.merkle`). Each is written once, so that the tree of any
earlier size can be read back: `complete_subtrees` lists the subtrees of a size.
"""

from collections.abc import Callable, Iterable, Sequence
from datetime import datetime
from functools import lru_cache
from typing import Any, Final

from sqlalchemy import Select, and_, bindparam, delete, func, insert, or_, select
from sqlalchemy.orm import Session

from qflare.crypto.merkle import CompactTree, Node
from qflare_server.storage import tables
from qflare_server.storage.records import AuditHead, AuditLog, Rows

AUDIT = tables.AuditLog.__table__
NODES = tables.AuditNode.__table__
HEADS = tables.AuditHead.__table__
_HEADS = Rows(AuditHead, HEADS)
_ENTRIES = Rows(AuditLog, AUDIT)
LEASES = tables.Lease.__table__

TREE_LEASE: Final = "audit-tree"
Place = tuple[int, int]
"""Level and index of a node."""

_ZERO: Final = bytes(32)
_PENDING = _ENTRIES.select.where(AUDIT.c.leaf_index.is_(None)).order_by(AUDIT.c.id)
_PENDING = _PENDING.limit(bindparam("limit"))
# A range, not a list of ids: the statement stays the same, and the ids of a batch follow on one another.
_STILL_PENDING = select(AUDIT.c.id).where(
    AUDIT.c.id.between(bindparam("first"), bindparam("last")), AUDIT.c.leaf_index.is_(None)
)
_BY_ID = _ENTRIES.select.where(AUDIT.c.id == bindparam("number"))
_BY_PLACE = _ENTRIES.select.where(AUDIT.c.leaf_index == bindparam("number"))
_SIZE = select(func.max(AUDIT.c.leaf_index))
_PLACE_SQLITE: Final = "UPDATE audit_log SET leaf_index = ?1, leaf_hash = ?3 WHERE id = ?2"
_PLACE_POSTGRES: Final = (
    "UPDATE audit_log SET leaf_index = placed.leaf_index, leaf_hash = placed.leaf_hash"
    " FROM unnest(%s::bigint[], %s::bigint[], %s::bytea[]) AS placed (leaf_index, id, leaf_hash)"
    " WHERE audit_log.id = placed.id"
)
_NODES_SQLITE: Final = "INSERT INTO audit_nodes (level, node_index, hash) VALUES (?1, ?2, ?3)"
_NODES_POSTGRES: Final = (
    "INSERT INTO audit_nodes (level, node_index, hash)"
    " SELECT * FROM unnest(%s::integer[], %s::bigint[], %s::bytea[])"
)


def lock(session: Session, at: datetime, *, wait: bool) -> bool:
    """Lock the tree for appending until the transaction ends; False if it is locked and `wait` is False.

    The lock is on one row, so it is released at once when a coordinator dies. SQLite has only one writer.
    """
    query = select(LEASES.c.name).where(LEASES.c.name == TREE_LEASE)
    locking = query.with_for_update(skip_locked=not wait)
    if session.execute(locking).one_or_none() is not None:
        return True
    if session.execute(query).one_or_none() is not None:
        return False
    session.execute(insert(LEASES).values(name=TREE_LEASE, holder="", expires_at=at))
    return True


def pending(session: Session, limit: int) -> Sequence[AuditLog]:
    """Return entries without a leaf index, by id."""
    return _ENTRIES.all(session, _PENDING, {"limit": limit})


def still_pending(session: Session, ids: Sequence[int]) -> set[int]:
    """Return which entries have no leaf index yet, of all from the first to the last of some ids in ascending order."""
    span = {"first": ids[0], "last": ids[-1]}
    return set(session.connection().execute(_STILL_PENDING, span).scalars())


def place(session: Session, placed: Sequence[tuple[int, int, bytes]]) -> None:
    """Write leaf index, id and leaf hash of entries; the unique key rejects a leaf index that is taken."""
    _write_many(session, _PLACE_SQLITE, _PLACE_POSTGRES, placed)


def insert_nodes(session: Session, nodes: Sequence[Node]) -> None:
    """Write complete subtrees; the primary key rejects one that exists."""
    _write_many(session, _NODES_SQLITE, _NODES_POSTGRES, nodes)


def _write_many(
    session: Session, sqlite: str, postgres: str, rows: Sequence[tuple[int, int, bytes]]
) -> None:
    """Run one statement for many rows, bypassing SQLAlchemy's handling of each row, which takes five times as long."""
    connection = session.connection()
    if connection.dialect.name == "sqlite":
        connection.exec_driver_sql(sqlite, [tuple(row) for row in rows])
    else:
        connection.exec_driver_sql(
            postgres, tuple(list(column) for column in zip(*rows, strict=True))
        )


def size(session: Session) -> int:
    """Return the number of leaves."""
    last = session.connection().execute(_SIZE).scalar_one()
    return 0 if last is None else int(last) + 1


def complete_subtrees(leaf_count: int) -> list[Place]:
    """Return level and index of the complete subtrees that a tree consists of, largest first."""
    places = []
    start = 0
    for level in reversed(range(leaf_count.bit_length())):
        if leaf_count >> level & 1:
            places.append((level, start >> level))
            start += 1 << level
    return places


def compact_tree(session: Session, leaf_count: int) -> CompactTree:
    """Return the tree of the first leaves, ready for appending.

    Raises:
        LookupError: Nodes are missing.
    """
    places = complete_subtrees(leaf_count)
    found = read_nodes(session, places)
    return CompactTree(leaf_count, [found[item] for item in places])


@lru_cache(maxsize=128)
def _query_nodes(count: int) -> Select[Any]:
    """Build the query for a number of nodes; cached, because building it takes ten times as long as running it."""
    # A row value IN (...) would be shorter, but SQLite scans the whole table for it.
    wanted = or_(
        *(
            and_(
                NODES.c.level == bindparam(f"level{number}"),
                NODES.c.node_index == bindparam(f"index{number}"),
            )
            for number in range(count)
        )
    )
    return select(NODES.c.level, NODES.c.node_index, NODES.c.hash).where(wanted)


def read_nodes(session: Session, wanted_places: Iterable[Place]) -> dict[Place, bytes]:
    """Return the hashes of nodes, in one query.

    Raises:
        LookupError: One is missing.
    """
    wanted = set(wanted_places)
    if not wanted:
        return {}
    places: dict[str, int] = {}
    for number, (level, index) in enumerate(sorted(wanted)):
        places |= {f"level{number}": level, f"index{number}": index}
    rows = session.connection().execute(_query_nodes(len(wanted)), places)
    found = {(row.level, row.node_index): bytes(row.hash) for row in rows}
    missing = wanted - found.keys()
    if missing:
        raise LookupError(f"audit tree lacks node {min(missing)}")
    return found


def prove(
    session: Session, build: Callable[[Callable[[int, int], bytes]], list[bytes]]
) -> list[bytes]:
    """Build a proof from stored nodes with a single query.

    Args:
        session: Open session.
        build: Builds the proof from a function that returns nodes; called twice, first to collect the nodes needed.

    Raises:
        LookupError: A node is missing.
    """
    wanted: list[Place] = []

    def note(level: int, index: int) -> bytes:
        wanted.append((level, index))
        return _ZERO

    build(note)
    found = read_nodes(session, wanted)
    return build(lambda level, index: found[level, index])


def find_entry(
    session: Session, *, audit_id: int | None = None, leaf_index: int | None = None
) -> AuditLog | None:
    """Return an entry by its id or by its leaf index."""
    query, number = (_BY_ID, audit_id) if leaf_index is None else (_BY_PLACE, leaf_index)
    return _ENTRIES.one(session, query, {"number": number})


def latest_head(session: Session) -> AuditHead | None:
    """Return the signed head of the largest tree."""
    return _HEADS.one(session, _HEADS.select.order_by(HEADS.c.size.desc()).limit(1))


def get_head(session: Session, leaf_count: int) -> AuditHead | None:
    """Return the signed head of a tree size; None if there is none, or it was deleted."""
    return _HEADS.one(session, _HEADS.select.where(HEADS.c.size == leaf_count))


def insert_head(session: Session, values: dict[str, Any]) -> None:
    """Insert a signed head; the primary key rejects a second one of a size."""
    session.execute(insert(HEADS).values(**values))


def drop_heads(session: Session, since: datetime, leaf_count: int) -> None:
    """Delete the heads of smaller trees that were signed since a time."""
    session.execute(delete(HEADS).where(HEADS.c.created_at >= since, HEADS.c.size < leaf_count))


def heads_after(session: Session, leaf_count: int, limit: int) -> Sequence[AuditHead]:
    """Return signed heads of trees larger than a size, by size."""
    query = _HEADS.select.where(HEADS.c.size > leaf_count).order_by(HEADS.c.size)
    return _HEADS.all(session, query.limit(limit))


def entries_after(session: Session, leaf_index: int, limit: int) -> Sequence[AuditLog]:
    """Return entries that have a leaf index, in its order, after one."""
    query = _ENTRIES.select.where(AUDIT.c.leaf_index > leaf_index).order_by(AUDIT.c.leaf_index)
    return _ENTRIES.all(session, query.limit(limit))


def nodes_in(
    session: Session, ranges: Sequence[tuple[int, int, int]], limit: int | None = None
) -> dict[Place, bytes]:
    """Return the nodes of ranges; a range is a level, its first index, and the index after its last."""
    if not ranges:
        return {}
    wanted = or_(
        *(
            and_(NODES.c.level == level, NODES.c.node_index >= first, NODES.c.node_index < end)
            for level, first, end in ranges
        )
    )
    query = select(NODES.c.level, NODES.c.node_index, NODES.c.hash).where(wanted).limit(limit)
    return {(row[0], row[1]): bytes(row[2]) for row in session.execute(query)}
