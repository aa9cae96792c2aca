"""Queries for overviews: progress of training sessions, metrics, the audit log, the backlog, storage."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any, NamedTuple

from sqlalchemy import Select, and_, func, or_, select, text
from sqlalchemy.orm import Session

from qflare_server.storage import tables
from qflare_server.storage.paging import Order, Page, PageRequest, read_page
from qflare_server.storage.records import AuditLog, Round, Rows
from qflare_server.storage.repository.audit import AuditFilter
from qflare_server.storage.tables import EVIDENCE_REASON, LEFT_OUT_REASON, RoundState, UpdateState

MODELS = tables.GlobalModel.__table__
ROUNDS = tables.Round.__table__
SELECTED = tables.RoundDevice.__table__
UPDATES = tables.ModelUpdate.__table__
PAYLOADS = tables.Payload.__table__
UPLOADS = tables.Upload.__table__
AUDIT = tables.AuditLog.__table__
_ROUNDS = Rows(Round, ROUNDS)
_ENTRIES = Rows(AuditLog, AUDIT)


@dataclass(frozen=True)
class VersionFacts:
    """The columns of a version that evaluation and release change, and the round that made it."""

    round_number: int
    released: bool
    metrics: Mapping[str, float]


def versions_from(
    session: Session, training_session_id: str, first: int
) -> dict[int, VersionFacts]:
    """Return the changeable columns of the versions from `first` on."""
    query = select(
        MODELS.c.version, MODELS.c.round_number, MODELS.c.released, MODELS.c.metrics
    ).where(MODELS.c.training_session_id == training_session_id, MODELS.c.version >= first)
    return {row[0]: VersionFacts(row[1], row[2], row[3]) for row in session.execute(query)}


def rounds_from(
    session: Session, training_session_id: str, first: int, limit: int
) -> Sequence[Round]:
    """Return rounds from number `first` on, in ascending order."""
    query = (
        _ROUNDS.select.where(
            ROUNDS.c.training_session_id == training_session_id, ROUNDS.c.number >= first
        )
        .order_by(ROUNDS.c.number)
        .limit(limit)
    )
    return _ROUNDS.all(session, query)


class VersionMetrics(NamedTuple):
    """Metrics of a version, and the facts shown beside them."""

    version: int
    round_number: int
    created_at: datetime
    metrics: Mapping[str, float]
    group_metrics: Mapping[str, Mapping[str, float]]
    participant_count: int
    example_count: int
    epsilon: float | None
    released: bool


_METRICS = [MODELS.c[name] for name in VersionMetrics._fields]


def list_metrics(
    session: Session, training_session_id: str, request: PageRequest
) -> Page[VersionMetrics]:
    """Return the metrics of versions, oldest first."""
    query = (
        select(*_METRICS)
        .where(MODELS.c.training_session_id == training_session_id)
        .order_by(MODELS.c.version)
    )

    def read(limited: Select[Any]) -> list[VersionMetrics]:
        return [VersionMetrics(*row) for row in session.execute(limited)]

    order = Order[VersionMetrics](
        (int,), lambda row: [row.version], lambda key: MODELS.c.version > key[0], probe_rows=8
    )
    return read_page(read, query, request, order, "metrics", training_session_id)


def recent_metrics(
    session: Session, training_session_id: str, limit: int
) -> Sequence[VersionMetrics]:
    """Return the metrics of the latest versions, oldest first."""
    query = (
        select(*_METRICS)
        .where(MODELS.c.training_session_id == training_session_id)
        .order_by(MODELS.c.version.desc())
        .limit(limit)
    )
    return [VersionMetrics(*row) for row in session.execute(query)][::-1]


def latest_metrics(
    session: Session, training_session_id: str, limit: int
) -> list[Mapping[str, float]]:
    """Return the metrics of the latest versions made by rounds, oldest first."""
    query = (
        select(MODELS.c.metrics)
        .where(MODELS.c.training_session_id == training_session_id, MODELS.c.round_number > 0)
        .order_by(MODELS.c.version.desc())
        .limit(limit)
    )
    return list(reversed(session.scalars(query).all()))


def audit_after(
    session: Session, after_id: int, wanted: AuditFilter, limit: int
) -> Sequence[AuditLog]:
    """Return audit entries after an id, by id.

    Each batch continues where the previous one ended, whatever the filters: `concat("")` keeps SQLite from using an
    index on the filtered column, which would sort all matches again for each batch.
    """
    query = _ENTRIES.select.where(AUDIT.c.id > after_id).order_by(AUDIT.c.id).limit(limit)
    for column in ("actor", "subject", "event_type", "risk_level"):
        value = getattr(wanted, column)
        if value:
            query = query.where(AUDIT.c[column].concat("") == value)
    if wanted.start is not None:
        query = query.where(AUDIT.c.created_at >= wanted.start)
    if wanted.end is not None:
        query = query.where(AUDIT.c.created_at < wanted.end)
    return _ENTRIES.all(session, query)


@dataclass(frozen=True)
class Backlog:
    """Amount of pending work."""

    open_round_count: int
    closed_round_count: int
    pending_update_count: int
    unfinished_upload_count: int
    unsequenced_audit_count: int
    oldest_closed_at: datetime | None


def queues(session: Session) -> Backlog:
    """Return the backlog; the cost depends on the backlog, not on what is stored."""
    states = session.execute(
        select(
            ROUNDS.c.state,
            func.count(),
            func.min(ROUNDS.c.closed_at),
            func.sum(ROUNDS.c.accepted_count),
        )
        .where(ROUNDS.c.state.in_([RoundState.OPEN.value, RoundState.CLOSED.value]))
        .group_by(ROUNDS.c.state)
    )
    found = {row[0]: row for row in states}
    opened, closed = found.get(RoundState.OPEN.value), found.get(RoundState.CLOSED.value)
    return Backlog(
        open_round_count=0 if opened is None else opened[1],
        closed_round_count=0 if closed is None else closed[1],
        pending_update_count=sum(row[3] for row in found.values()),
        unfinished_upload_count=_count(session, select(func.count()).select_from(UPLOADS)),
        unsequenced_audit_count=_count(
            session, select(func.count()).where(AUDIT.c.leaf_index.is_(None))
        ),
        oldest_closed_at=None if closed is None else closed[2],
    )


@dataclass(frozen=True)
class StorageUsage:
    """Storage in use."""

    database_bytes: int
    payload_bytes: int
    payload_count: int
    pruned_count: int


def stored(session: Session) -> StorageUsage:
    """Return the storage in use; scans the rows of payloads."""
    rows = session.execute(
        select(
            PAYLOADS.c.location == "none",
            func.count(),
            func.coalesce(func.sum(PAYLOADS.c.size_bytes), 0),
        ).group_by(PAYLOADS.c.location == "none")
    )
    found = {bool(row[0]): row for row in rows}
    kept, pruned = found.get(False), found.get(True)
    return StorageUsage(
        database_bytes=database_bytes(session),
        payload_bytes=0 if kept is None else int(kept[2]),
        payload_count=0 if kept is None else kept[1],
        pruned_count=0 if pruned is None else pruned[1],
    )


def database_bytes(session: Session) -> int:
    """Return the size of the database in bytes."""
    if session.get_bind().dialect.name == "sqlite":
        pages = session.execute(text("PRAGMA page_count")).scalar_one()
        return int(pages * session.execute(text("PRAGMA page_size")).scalar_one())
    return int(session.execute(text("SELECT pg_database_size(current_database())")).scalar_one())


def count_rejections(
    session: Session, training_session_id: str, device_id: str, since: datetime
) -> int:
    """Return the number of a device's updates to a training session that screening rejected since a time.

    Not counted: updates of failed or canceled rounds, updates that the strategy gave no weight,
    and updates whose rows were modified after they were sent.
    """
    query = (
        select(func.count())
        .select_from(
            UPDATES.join(
                ROUNDS,
                (ROUNDS.c.training_session_id == UPDATES.c.training_session_id)
                & (ROUNDS.c.number == UPDATES.c.round_number),
            )
        )
        .where(
            UPDATES.c.device_id == device_id,
            UPDATES.c.accepted_at >= since,
            UPDATES.c.training_session_id == training_session_id,
            UPDATES.c.state == UpdateState.REJECTED.value,
            ~UPDATES.c.state_reason.startswith(EVIDENCE_REASON),
            ~UPDATES.c.state_reason.startswith(LEFT_OUT_REASON),
            or_(
                ROUNDS.c.state == RoundState.PUBLISHED.value,
                and_(
                    ROUNDS.c.state == RoundState.FAILED.value,
                    UPDATES.c.state_reason != ROUNDS.c.state_reason,
                ),
            ),
        )
    )
    return _count(session, query)


def last_event_at(session: Session, subject: str, event_type: str) -> datetime | None:
    """Return the time of the last event of a type about a subject; None if there is none."""
    query = (
        select(AUDIT.c.created_at)
        .where(AUDIT.c.subject == subject, AUDIT.c.event_type == event_type)
        .order_by(AUDIT.c.created_at.desc(), AUDIT.c.id.desc())
        .limit(1)
    )
    return session.execute(query).scalar_one_or_none()


def devices_of(session: Session, update_ids: Sequence[str]) -> list[str]:
    """Return the distinct devices of updates, by id."""
    query = select(UPDATES.c.device_id).where(UPDATES.c.id.in_(update_ids)).distinct()
    return sorted(session.scalars(query))


def list_absent(
    session: Session, training_session_id: str, round_number: int, limit: int
) -> Sequence[str]:
    """Return the devices that were selected for a round and sent no update, by id."""
    sent = select(UPDATES.c.device_id).where(
        UPDATES.c.training_session_id == training_session_id,
        UPDATES.c.round_number == round_number,
    )
    query = (
        select(SELECTED.c.device_id)
        .where(
            SELECTED.c.training_session_id == training_session_id,
            SELECTED.c.round_number == round_number,
            SELECTED.c.device_id.not_in(sent),
        )
        .order_by(SELECTED.c.device_id)
        .limit(limit)
    )
    return session.scalars(query).all()


def _count(session: Session, query: Any) -> int:
    return int(session.execute(query).scalar_one())
