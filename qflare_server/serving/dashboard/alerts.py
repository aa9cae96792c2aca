"""Alerts of the dashboard: rules over a status report."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

from qflare_server.serving.dashboard import formatting
from qflare_server.storage.records import TrainingSession
from qflare_server.storage.tables import DeviceState, RiskLevel
from qflare_server.use_cases.status import Report
from qflare_server.use_cases.training_sessions.explanation import Notice

LEVELS: Final = ("bad", "warn", "note")
SLOW_DATABASE_S: Final = 0.25
WAITING_S: Final = 60.0
LITTLE_ROOM_BYTES: Final = 2 * 2**30
UNSEQUENCED: Final = 10_000
LAST_DAYS_S: Final = 7 * 86_400


@dataclass(frozen=True)
class Alert:
    """An alert: `level` is `bad`, `warn` or `note`, `link` is the page with details."""

    level: str
    text: str
    link: str


def find_alerts(report: Report, *, draining: bool) -> list[Alert]:
    """Return the current alerts, worst first."""
    found = [*_serving(report, draining=draining), *_work(report), *_fleet(report)]
    return sorted(found, key=lambda item: LEVELS.index(item.level))


def find_waits(
    running: Iterable[tuple[TrainingSession, Sequence[Notice]]],
) -> list[Alert]:
    """Return what running training sessions wait for."""
    return [
        Alert("warn", f"{row.name}: {item.text}", f"/sessions/{row.id}")
        for row, notices in running
        for item in notices
    ]


def worst(found: Sequence[Alert]) -> str:
    """Return the worst level, `good` if there are no alerts."""
    levels = {item.level for item in found}
    return next((level for level in LEVELS if level in levels and level != "note"), "good")


def find_audit_alerts(counts: Mapping[str, int]) -> list[Alert]:
    """Return the alerts from the audit log of the last day."""
    return [
        Alert(
            level,
            f"{counts[risk]:,} audit events of {risk} risk in the last 24 hours",
            f"/audit?risk={risk}",
        )
        for risk, level in ((RiskLevel.CRITICAL.value, "bad"), (RiskLevel.HIGH.value, "note"))
        if counts.get(risk)
    ]


def _serving(report: Report, *, draining: bool) -> Iterator[Alert]:
    yield from _keyset(report)
    database = report.database
    if draining:
        yield Alert("bad", "This coordinator is shutting down and takes no new work", "/system")
    if database.latency_s > SLOW_DATABASE_S:
        took = formatting.duration(database.latency_s)
        yield Alert("warn", f"The database takes {took} to answer", "/system")
    if database.pool_in_use_count >= database.pool_size:
        yield Alert("warn", "Every database connection of this process is in use", "/system")
    if report.free_bytes is not None and report.free_bytes < LITTLE_ROOM_BYTES:
        left = formatting.size(report.free_bytes)
        yield Alert("bad", f"Only {left} are left on the disk of the database", "/system")


def _keyset(report: Report) -> Iterator[Alert]:
    keyset = report.keyset
    if keyset is None or not keyset.expires_soon(report.at):
        return
    left_s = (keyset.expires_at - report.at).total_seconds()
    if left_s <= 0:
        text = "The keyset has expired: no device trusts this coordinator. Run qflare-server keys rotate"
        yield Alert("bad", text, "/system")
        return
    text = f"The keyset expires in {formatting.span(left_s)}: run qflare-server keys rotate"
    yield Alert("bad" if left_s < LAST_DAYS_S else "warn", text, "/system")


def _work(report: Report) -> Iterator[Alert]:
    waiting = report.queues
    if waiting.oldest_closed_at is not None:
        waited_s = (report.at - waiting.oldest_closed_at).total_seconds()
        if waited_s > WAITING_S:
            text = f"A closed round has waited {formatting.span(waited_s)} for its aggregation"
            yield Alert("bad", text, "/sessions?state=running")
    if waiting.unsequenced_audit_count > UNSEQUENCED:
        text = f"{waiting.unsequenced_audit_count:,} audit events wait for their place in the log"
        yield Alert("warn", text, "/system")


def _fleet(report: Report) -> Iterator[Alert]:
    count = report.device_counts.get(DeviceState.QUARANTINED.value, 0)
    if count:
        text = f"{count:,} {'device is' if count == 1 else 'devices are'} in quarantine"
        yield Alert("warn", text, "/devices?state=quarantined")
