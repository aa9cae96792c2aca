"""Overview page: health, running training sessions, alerts."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from qflare_server.serving.dashboard.alerts import find_alerts, find_audit_alerts, find_waits, worst
from qflare_server.serving.dashboard.charts import COMPACT, LOW, Chart
from qflare_server.serving.dashboard.page_context import PageContext
from qflare_server.serving.dashboard.pages.curves import Latest, headline, metric_chart
from qflare_server.serving.dashboard.pages.devices import Slice, slices
from qflare_server.serving.dashboard.pages.training import (
    CurrentRound,
    SessionRow,
    current,
    session_row,
)
from qflare_server.storage.paging import PageRequest
from qflare_server.storage.tables import DeviceState, RiskLevel, TrainingSessionState
from qflare_server.training.objective import objective_of
from qflare_server.use_cases.status import Report

SHOWN: Final = 6
CURVE_VERSIONS: Final = 60


@dataclass(frozen=True)
class Card:
    """A running training session."""

    row: SessionRow
    current: CurrentRound | None
    headline: Sequence[Latest]
    chart: Chart | None


def build(visit: PageContext) -> Mapping[str, Any]:
    """Build the first page."""
    report, risks = visit.recent.report(), audit_counts(visit)
    recent = visit.use_cases.training.list(PageRequest(SHOWN)).rows
    found = [
        *find_alerts(report, draining=visit.draining),
        *find_waits(visit.recent.running()),
        *find_audit_alerts(risks or {}),
    ]
    return {
        "alerts": found,
        "level": worst(found),
        "problem_count": sum(item.level != "note" for item in found),
        "cards": _cards(visit),
        "running_count": report.session_counts.get(TrainingSessionState.RUNNING.value, 0),
        "recent": [session_row(row, visit) for row in recent],
        "report": report,
        "devices": device_slices(report),
        "device_count": sum(report.device_counts.values()),
        "risks": None if risks is None else risk_slices(risks),
    }


def audit_counts(visit: PageContext) -> Mapping[str, int] | None:
    """Return the last day's audit events by risk; None for visitors who may not read the audit log."""
    if not visit.may("ListAuditEntries"):
        return None
    return visit.recent.audit_counts()


def device_slices(report: Report) -> Sequence[Slice]:
    """Return device counts by state."""
    return slices(report.device_counts, [item.value for item in DeviceState])


def risk_slices(counts: Mapping[str, int]) -> Sequence[Slice]:
    """Return audit event counts by risk, worst first."""
    return slices(counts, [item.value for item in reversed(RiskLevel)])


def _cards(visit: PageContext) -> list[Card]:
    rows = visit.use_cases.training.list(
        PageRequest(SHOWN), TrainingSessionState.RUNNING.value
    ).rows
    cards = []
    for number, row in enumerate(rows):
        progress = visit.use_cases.training.progress(row.id)
        metrics = visit.use_cases.promotion.recent_metrics(row.id, CURVE_VERSIONS)
        cards.append(
            Card(
                session_row(progress.session, visit),
                current(progress, visit),
                headline(progress.session, metrics),
                metric_chart(
                    f"card-{number}",
                    objective_of(progress.session.config).metric,
                    metrics,
                    progress.session.config,
                    {"low": LOW, "small": COMPACT},
                ),
            )
        )
    return cards
