"""Statements on leases and replicas."""

from collections.abc import Sequence
from datetime import datetime

from sqlalchemy import delete, insert, or_, select, update
from sqlalchemy.orm import Session

from qflare_server.storage.tables import Lease, Replica

LEASES = Lease.__table__
REPLICAS = Replica.__table__


def acquire(session: Session, name: str, holder: str, now: datetime, until: datetime) -> bool:
    """Take or renew a lease; False while another coordinator holds it.

    A lease only saves duplicate work; correctness must not depend on it.
    """
    taken = session.execute(
        update(LEASES)
        .where(LEASES.c.name == name, or_(LEASES.c.holder == holder, LEASES.c.expires_at <= now))
        .values(holder=holder, expires_at=until)
    )
    if taken.rowcount:  # type: ignore[attr-defined]  # a CursorResult has it
        return True
    if session.get(Lease, name) is not None:
        return False
    session.execute(insert(LEASES).values(name=name, holder=holder, expires_at=until))
    return True


def release(session: Session, holder: str) -> None:
    """Release every lease of a holder."""
    session.execute(delete(LEASES).where(LEASES.c.holder == holder))


def announce(
    session: Session, replica_id: str, address: str, version: str, started: datetime, now: datetime
) -> None:
    """Record that a replica is serving."""
    values = {"address": address, "version": version, "started_at": started, "seen_at": now}
    if session.get(Replica, replica_id) is None:
        session.execute(insert(REPLICAS).values(id=replica_id, **values))
    else:
        session.execute(update(REPLICAS).where(REPLICAS.c.id == replica_id).values(**values))


def retire(session: Session, replica_id: str) -> None:
    """Delete the record of a replica that has stopped."""
    session.execute(delete(REPLICAS).where(REPLICAS.c.id == replica_id))


def list_replicas(session: Session, seen_since: datetime) -> Sequence[Replica]:
    """Return the replicas seen since a time."""
    query = select(Replica).where(REPLICAS.c.seen_at >= seen_since).order_by(REPLICAS.c.id)
    return session.scalars(query).all()
