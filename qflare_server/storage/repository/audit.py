"""Statements on the audit log."""

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from functools import partial
from typing import Any

from sqlalchemy import func, select
from sqlalchemy.orm import Session

from qflare.evidence.audit_entries import SALT_BYTES
from qflare_server.storage import tables
from qflare_server.storage.paging import Order, Page, PageRequest, earlier, read_page
from qflare_server.storage.prepared import PreparedInsert
from qflare_server.storage.records import AuditLog, Rows
from qflare_server.storage.repository.device_names import NAME_BYTES, names_of
from qflare_server.storage.tables import RiskLevel

AUDIT = tables.AuditLog.__table__
_ROWS = Rows(AuditLog, AUDIT)


@dataclass(frozen=True)
class Claim:
    """A call's claim on a request id.

    Attributes:
        method: Name of the method.
        request_id: Chosen by the caller, 1 to 100 characters.
        digest: SHA-256 of the request, 64 hex digits.
        encode: Returns the response to keep, given the result; None for a response with secrets, which is not kept.
    """

    method: str
    request_id: str
    digest: str
    encode: Callable[[Any], bytes] | None = None


@dataclass(frozen=True)
class Caller:
    """Actor of an audit entry.

    `name` is `device:ID`, `admin:NAME`, `system` or `anonymous`. `claim` is that of a call with a request id.
    """

    name: str = "system"
    peer_address: str = ""
    authentication_method: str = "none"
    claim: Claim | None = None


SYSTEM = Caller()


@dataclass(frozen=True)
class AuditFilter:
    """Filter of a list of audit entries; empty fields do not filter."""

    start: datetime | None = None
    end: datetime | None = None
    actor: str = ""
    subject: str = ""
    event_type: str = ""
    risk_level: str = ""


@dataclass(frozen=True)
class Event:
    """An event to record; details hold digests and numbers, never secrets or personal data."""

    event_type: str
    subject: str
    risk_level: RiskLevel = RiskLevel.LOW
    details: dict[str, Any] = field(default_factory=dict)


_INSERT = PreparedInsert(
    AUDIT,
    (
        "event_type",
        "actor",
        "subject",
        "peer_address",
        "authentication_method",
        "risk_level",
        "details",
        "salt",
        "created_at",
    ),
)


def record(session: Session, caller: Caller, event: Event, at: datetime) -> None:
    """Write an entry, in the transaction of the change that it records."""
    record_all(session, [(caller, event)], at)


def record_all(session: Session, events: Sequence[tuple[Caller, Event]], at: datetime) -> None:
    """Write entries in order, in the transaction of the changes that they record."""
    salts = os.urandom(SALT_BYTES * len(events))
    names = names_of(session, (item for _, event in events if (item := device_of(event.subject))))
    rows = [
        {
            "event_type": event.event_type,
            "actor": caller.name,
            "subject": event.subject,
            "peer_address": caller.peer_address,
            "authentication_method": caller.authentication_method,
            "risk_level": event.risk_level.value,
            "details": _with_name(event, names),
            "salt": salts[number * SALT_BYTES : (number + 1) * SALT_BYTES],
            "created_at": at,
        }
        for number, (caller, event) in enumerate(events)
    ]
    _INSERT.run(session, rows)


def device_of(party: str) -> str:
    """Return the device id of an actor or a subject `device:ID`; empty if it is no device."""
    kind, _, device_id = party.partition(":")
    return device_id if kind == "device" else ""


def _with_name(event: Event, names: Mapping[str, str]) -> dict[str, Any]:
    """Return the details of an event, with the name that its device has now."""
    name = names.get(device_of(event.subject))
    return event.details if name is None else {"device_name": name, **event.details}


def count_by_risk(session: Session, since: datetime) -> dict[str, int]:
    """Return the number of entries of each risk level since a time.

    Ids follow time closely, so each level is counted in the index on level and id, from the first entry since then.
    """
    earliest = (
        select(AUDIT.c.id)
        .where(AUDIT.c.created_at >= since)
        .order_by(AUDIT.c.created_at, AUDIT.c.id)
        .limit(1)
    )
    first = session.execute(earliest).scalar_one_or_none()
    if first is None:
        return {}
    counts = {}
    for level in RiskLevel:
        query = select(func.count()).where(AUDIT.c.risk_level == level.value, AUDIT.c.id >= first)
        counts[level.value] = session.execute(query).scalar_one()
    return counts


def list_entries(session: Session, request: PageRequest, wanted: AuditFilter) -> Page[AuditLog]:
    """Return entries, newest first.

    Each index begins with a filter's column and continues with time and id, so that a page costs the same under any
    filter.
    """
    query = _ROWS.select.order_by(AUDIT.c.created_at.desc(), AUDIT.c.id.desc())
    for column in ("actor", "subject", "event_type", "risk_level"):
        value = getattr(wanted, column)
        if value:
            query = query.where(AUDIT.c[column] == value)
    if wanted.start is not None:
        query = query.where(AUDIT.c.created_at >= wanted.start)
    if wanted.end is not None:
        query = query.where(AUDIT.c.created_at < wanted.end)
    order = Order[AuditLog](
        (datetime, int),
        lambda row: (row.created_at.isoformat(), row.id),
        lambda key: earlier(AUDIT.c.created_at, AUDIT.c.id, key),
        extra_bytes=2 * NAME_BYTES,
    )
    return read_page(partial(_ROWS.all, session), query, request, order, "audit", wanted)
