"""Database metrics, collected at every scrape: backlog, states, budgets, connection pool.

A scrape costs a few small queries. If the database does not respond, `qflare_database_up` is 0 and the other database
metrics are omitted.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Final

from prometheus_client.core import GaugeMetricFamily
from prometheus_client.registry import Collector

from qflare_server.context import Context
from qflare_server.errors import QflareError
from qflare_server.storage.paging import PageRequest
from qflare_server.storage.records import TrainingSession
from qflare_server.storage.repository import devices, training_sessions, views
from qflare_server.storage.tables import TrainingSessionState
from qflare_server.training.objective import objective_of
from qflare_server.use_cases.status import DatabaseHealth, Overview
from qflare_server.use_cases.training_sessions.explanation import Explanations, Notice

MAX_SESSIONS: Final = 100
SESSION_LABELS: Final = ("name",)
"""Labels are session names only. Metrics need no credential, and session ids must not be exposed there."""


class DatabaseCollector(Collector):
    """Reads the database at every scrape."""

    def __init__(self, context: Context) -> None:
        self._context = context
        self._overview = Overview(context)
        self._explanations = Explanations(context)

    def describe(self) -> list[GaugeMetricFamily]:
        """Return nothing, because the metrics are known only at a scrape."""
        return []

    def collect(self) -> Iterator[GaugeMetricFamily]:
        """Yield the current metrics."""
        yield from self._keyset()
        try:
            found = [*self._health(), *self._queues(), *self._sessions()]
        except QflareError:
            yield _gauge("qflare_database_up", "Whether the database answers", 0)
            return
        yield _gauge("qflare_database_up", "Whether the database answers", 1)
        yield from found

    def _keyset(self) -> Iterator[GaugeMetricFamily]:
        keyset = self._overview.keyset_status()
        if keyset is not None:
            expires_at = keyset.expires_at.timestamp()
            yield _gauge(
                "qflare_keyset_expiry_timestamp_seconds",
                "When devices stop trusting the keyset, in seconds since 1970",
                expires_at,
            )

    def _health(self) -> Iterator[GaugeMetricFamily]:
        health: DatabaseHealth = self._overview.database_health()
        yield _gauge("qflare_database_latency_seconds", "One round trip", health.latency_s)
        yield _gauge("qflare_database_pool_size", "Connections of the pool", health.pool_size)
        yield _gauge("qflare_database_pool_in_use", "Connections in use", health.pool_in_use_count)

    def _queues(self) -> Iterator[GaugeMetricFamily]:
        now = self._context.clock()
        with self._context.database.read() as session:
            waiting = views.queues(session)
            size_bytes = views.database_bytes(session)
            by_device = devices.count_by_state(session)
            by_session = training_sessions.count_sessions(session)
        age_s = 0.0
        if waiting.oldest_closed_at is not None:
            age_s = max(0.0, (now - waiting.oldest_closed_at).total_seconds())
        store_bytes = sum(store.size_bytes() for store in self._context.stores)
        yield _gauge("qflare_rounds_open", "Rounds that take updates", waiting.open_round_count)
        yield _gauge("qflare_rounds_closed", "Rounds without version", waiting.closed_round_count)
        yield _gauge("qflare_oldest_closed_round_seconds", "Longest wait for a version", age_s)
        yield _gauge(
            "qflare_updates_pending", "Updates in no version", waiting.pending_update_count
        )
        yield _gauge("qflare_uploads_unfinished", "Open uploads", waiting.unfinished_upload_count)
        yield _gauge(
            "qflare_audit_unsequenced", "Entries in no tree", waiting.unsequenced_audit_count
        )
        yield _gauge("qflare_database_bytes", "Size of the database", size_bytes)
        yield _gauge("qflare_payload_store_bytes", "Size of the payload store", store_bytes)
        yield _by_state("qflare_devices", "Devices by state", by_device)
        yield _by_state("qflare_training_sessions", "Training sessions by state", by_session)

    def _sessions(self) -> Iterator[GaugeMetricFamily]:
        with self._context.database.read() as session:
            request = PageRequest(MAX_SESSIONS)
            running = TrainingSessionState.RUNNING.value
            found = _newest(training_sessions.list_sessions(session, request, running).rows)
        yield _session_gauge(
            "qflare_training_session_round",
            "Current round",
            found,
            lambda item: item.current_round,
        )
        yield _session_gauge(
            "qflare_training_session_version",
            "Latest version",
            found,
            lambda item: item.current_version,
        )
        yield _best(found)
        yield _waits(self._explanations.list_running(MAX_SESSIONS))
        yield _session_gauge(
            "qflare_privacy_epsilon_spent",
            "Epsilon spent",
            found,
            lambda item: item.epsilon_spent,
        )
        yield _session_gauge(
            "qflare_privacy_epsilon_budget",
            "Epsilon that may be spent",
            found,
            lambda item: item.config.privacy.epsilon_budget or None,
        )


def _newest(rows: Iterable[TrainingSession]) -> list[TrainingSession]:
    """Return the first row of each name: rows are newest first, and a scrape has one value per name."""
    by_name: dict[str, TrainingSession] = {}
    for row in rows:
        by_name.setdefault(row.name, row)
    return list(by_name.values())


def _waits(running: Iterable[tuple[TrainingSession, Sequence[Notice]]]) -> GaugeMetricFamily:
    """Return the devices that each running training session waits for, by reason; 1 where it is none in particular."""
    counts: dict[tuple[str, str], int] = {}
    for row, notices in running:
        for item in notices:
            key = row.name, item.code
            counts[key] = max(counts.get(key, 0), len(item.device_ids), 1)
    family = GaugeMetricFamily(
        "qflare_training_session_waits",
        "Devices that a training session waits for, by reason",
        labels=(*SESSION_LABELS, "reason"),
    )
    for labels, count in sorted(counts.items()):
        family.add_metric(labels, count)
    return family


def _best(found: Sequence[TrainingSession]) -> GaugeMetricFamily:
    """Return the best value of the objective's metric, labeled with the data that it was measured on."""
    family = GaugeMetricFamily(
        "qflare_training_session_best",
        "Metric of the best version",
        labels=(*SESSION_LABELS, "metric", "data"),
    )
    for row in found:
        objective = objective_of(row.config)
        if row.best_value is not None:
            data = "held_out" if objective.is_held_out else "training"
            family.add_metric((row.name, objective.metric, data), row.best_value)
    return family


def _gauge(name: str, text: str, value: float) -> GaugeMetricFamily:
    return GaugeMetricFamily(name, text, value=value)


def _by_state(name: str, text: str, counts: Mapping[str, int]) -> GaugeMetricFamily:
    family = GaugeMetricFamily(name, text, labels=("state",))
    for state, value in sorted(counts.items()):
        family.add_metric((state,), value)
    return family


def _session_gauge(
    name: str,
    text: str,
    found: Sequence[TrainingSession],
    value_of: Callable[[TrainingSession], float | None],
) -> GaugeMetricFamily:
    family = GaugeMetricFamily(name, text, labels=SESSION_LABELS)
    for training_session in found:
        value = value_of(training_session)
        if value is not None:
            family.add_metric((training_session.name,), value)
    return family
