"""Statements on leases and replicas."""

from collections.abc import Sequence
from datetime import datetime
from typing import Final

from sqlalchemy import delete, insert, or_, select, text, update
from sqlalchemy.orm import Session

from qflare_server.storage import tables
from qflare_server.storage.records import Replica, Rows

LEASES = tables.Lease.__table__
REPLICAS = tables.Replica.__table__
MAX_ADDRESS: Final = 255
MAX_REPLICAS: Final = 1000
_REPLICAS = Rows(Replica, REPLICAS)


def acquire(session: Session, name: str, holder: str, now: datetime, until: datetime) -> bool:
    """Take or renew a lease; False while another coordinator holds it.

    A lease only saves duplicate work; correctness must not depend on it. One that ends more than two lives from now
    was written before the clock was set back, and has expired.
    """
    is_free = or_(
        LEASES.c.holder == holder,
        LEASES.c.expires_at <= now,
        LEASES.c.expires_at > until + (until - now),
    )
    taken = session.execute(
        update(LEASES).where(LEASES.c.name == name, is_free).values(holder=holder, expires_at=until)
    )
    if taken.rowcount:  # type: ignore[attr-defined]  # a CursorResult has it
        return True
    if session.execute(select(LEASES.c.name).where(LEASES.c.name == name)).first() is not None:
        return False
    session.execute(insert(LEASES).values(name=name, holder=holder, expires_at=until))
    return True


def release(session: Session, holder: str) -> None:
    """Release every lease of a holder."""
    session.execute(delete(LEASES).where(LEASES.c.holder == holder))


def announce(
    session: Session,
    replica_id: str,
    address: str,
    version: str,
    payload_store: str,
    started: datetime,
    now: datetime,
) -> None:
    """Record that a replica is serving, and where it stores new payloads."""
    values = {
        "address": address[:MAX_ADDRESS],
        "version": version,
        "payload_store": payload_store,
        "started_at": started,
        "seen_at": now,
    }
    changed = session.execute(update(REPLICAS).where(REPLICAS.c.id == replica_id).values(**values))
    if not changed.rowcount:  # type: ignore[attr-defined]  # a DML result has it
        session.execute(insert(REPLICAS).values(id=replica_id, **values))


def with_other_stores(
    session: Session, replica_id: str, payload_store: str, seen_since: datetime
) -> Sequence[Replica]:
    """Return other replicas seen since a time that store new payloads elsewhere; replicas start one after the other."""
    if session.get_bind().dialect.name == "postgresql":
        session.execute(text("LOCK TABLE replicas IN SHARE ROW EXCLUSIVE MODE"))
    query = _REPLICAS.select.where(
        REPLICAS.c.id != replica_id,
        REPLICAS.c.seen_at >= seen_since,
        REPLICAS.c.payload_store != payload_store,
    )
    return _REPLICAS.all(session, query.order_by(REPLICAS.c.id).limit(MAX_REPLICAS))


def retire(session: Session, replica_id: str) -> None:
    """Delete the record of a replica that has stopped."""
    session.execute(delete(REPLICAS).where(REPLICAS.c.id == replica_id))


def list_replicas(session: Session, seen_since: datetime) -> Sequence[Replica]:
    """Return the replicas seen since a time, at most `MAX_REPLICAS`."""
    query = _REPLICAS.select.where(REPLICAS.c.seen_at >= seen_since)
    return _REPLICAS.all(session, query.order_by(REPLICAS.c.id).limit(MAX_REPLICAS))
