"""Audit page: events by risk, and the list of events."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Final

from qflare.references import party
from qflare_server.serving.dashboard.formatting import Moment, moment
from qflare_server.serving.dashboard.page_context import PageContext
from qflare_server.serving.dashboard.pages.overview import audit_counts, risk_slices
from qflare_server.storage.records import AuditLog
from qflare_server.storage.repository.audit import AuditFilter, device_of
from qflare_server.storage.tables import RiskLevel

ROWS: Final = 25
LONG: Final = 30


@dataclass(frozen=True)
class EventRow:
    """An audit event in the list."""

    number: int
    at: Moment | None
    risk: str
    event_type: str
    actor: str
    subject: str
    peer_address: str
    brief: str
    """Its details on one line, with long values truncated."""
    details: list[tuple[str, str]]


def build(visit: PageContext) -> Mapping[str, Any]:
    """Build the list of audit events, newest first."""
    wanted = AuditFilter(
        risk_level=visit.one_of("risk", RiskLevel),
        event_type=visit.text("event"),
        actor=visit.text("actor"),
        subject=visit.text("subject"),
    )
    page = visit.use_cases.audit.list(visit.rows(ROWS), wanted)
    parties = {device_of(party) for row in page.rows for party in (row.actor, row.subject)}
    names = visit.use_cases.devices.names_of(parties - {""})
    return {
        "rows": [_row(row, visit, names) for row in page.rows],
        "next_token": page.next_token,
        "first": not visit.text("page"),
        "wanted": wanted,
        "risks": risk_slices(audit_counts(visit) or {}),
    }


def _row(row: AuditLog, visit: PageContext, names: Mapping[str, str]) -> EventRow:
    details = list(_flat(row.details))
    return EventRow(
        number=row.id,
        at=moment(row.created_at, visit.at),
        risk=row.risk_level,
        event_type=row.event_type,
        actor=party(row.actor, names.get(device_of(row.actor), "")),
        subject=party(row.subject, names.get(device_of(row.subject), "")),
        peer_address=row.peer_address,
        brief=", ".join(f"{name} {_cut(value)}" for name, value in details if value),
        details=details,
    )


def _flat(details: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    """Yield each detail as text, sorted by name; the names of nested ones are joined by dots."""
    for name, value in sorted(details.items()):
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", str(value)


def _cut(value: str) -> str:
    return value if len(value) <= LONG else f"{value[:8]}…"
