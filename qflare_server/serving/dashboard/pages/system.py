"""System page: replicas, database, backlog and storage."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from qflare_server.serving.dashboard.alerts import find_alerts, worst
from qflare_server.serving.dashboard.formatting import Moment, moment
from qflare_server.serving.dashboard.page_context import PageContext


@dataclass(frozen=True)
class ReplicaRow:
    """A coordinator process."""

    replica_id: str
    address: str
    version: str
    started: Moment | None
    seen: Moment | None


def build(visit: PageContext) -> Mapping[str, Any]:
    """Build the page."""
    report = visit.recent.report()
    found = find_alerts(report, draining=visit.draining)
    return {
        "report": report,
        "alerts": found,
        "level": worst(found),
        "keyset_expiry": moment(
            None if report.keyset is None else report.keyset.expires_at, visit.at
        ),
        "oldest_closed": moment(report.queues.oldest_closed_at, visit.at),
        "replicas": [
            ReplicaRow(
                row.id,
                row.address,
                row.version,
                moment(row.started_at, visit.at),
                moment(row.seen_at, visit.at),
            )
            for row in report.replicas
        ],
    }
