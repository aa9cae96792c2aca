"""Prometheus metrics of one process.

Call metrics have the usual names of gRPC servers (grpc_server_started_total and so on), so existing dashboards work.
Labels come only from the protos and this program, never from a caller. Database metrics are read at each scrape; every
replica reports the same values, so dashboards take the maximum.
"""

import time
from typing import Any, Final

from prometheus_client import (
    GC_COLLECTOR,
    PLATFORM_COLLECTOR,
    PROCESS_COLLECTOR,
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    generate_latest,
)
from sqlalchemy import Engine, event

from qflare_server.config import ServerConfig
from qflare_server.context import Context, Telemetry
from qflare_server.serving.http.hosts import KnownHosts, certificate_names
from qflare_server.serving.http.server import HttpServer
from qflare_server.serving.observability.database_metrics import DatabaseCollector
from qflare_server.serving.observability.exposition import MetricsSite

CALL_LABELS: Final = ("grpc_type", "grpc_service", "grpc_method")
CALL_BUCKETS: Final = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 60)
QUERY_BUCKETS: Final = (0.0001, 0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.05, 0.25, 1, 5)
ROUND_BUCKETS: Final = (0.1, 0.5, 1, 5, 10, 30, 60, 300, 600, 1800, 3600, 14400, 86400)
PUBLISH_BUCKETS: Final = (0.01, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 300)
SUBMIT: Final = "/qflare.v1.CoordinatorService/SubmitUpdate"


class Metrics(Telemetry):
    """Collects metrics and serves them over HTTP."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        for collector in (PROCESS_COLLECTOR, PLATFORM_COLLECTOR, GC_COLLECTOR):
            self.registry.register(collector)
        self._define_calls()
        self._define_work()
        self._server: HttpServer | None = None

    def _define_calls(self) -> None:
        make = {"labelnames": CALL_LABELS, "registry": self.registry}
        self._started = Counter("grpc_server_started", "Calls that came in", **make)  # type: ignore[arg-type]
        self._received = Counter("grpc_server_msg_received", "Messages received", **make)  # type: ignore[arg-type]
        self._sent = Counter("grpc_server_msg_sent", "Messages sent", **make)  # type: ignore[arg-type]
        self._in_flight = Gauge(
            "qflare_calls_in_flight",
            "Calls that are being answered; those that wait for a thread are not counted",
            registry=self.registry,
        )
        self._handling = Histogram(
            "grpc_server_handling_seconds",
            "Time from a call to its answer",
            labelnames=CALL_LABELS,
            buckets=CALL_BUCKETS,
            registry=self.registry,
        )
        self._handled = Counter(
            "grpc_server_handled",
            "Calls that were answered, by status code",
            labelnames=(*CALL_LABELS, "grpc_code"),
            registry=self.registry,
        )

    def _define_work(self) -> None:
        registry = self.registry
        self._updates = Counter(
            "qflare_updates",
            "Updates by outcome: accepted, aggregated, rejected, or the reason of a refusal",
            labelnames=("outcome",),
            registry=registry,
        )
        self._payload = Counter(
            "qflare_payload_bytes",
            "Payload bytes of accepted updates and of versions that were sent",
            labelnames=("direction",),
            registry=registry,
        )
        self._folded = Counter("qflare_folded_updates", "Updates folded", registry=registry)
        self._folded_bytes = Counter("qflare_folded_bytes", "Bytes folded", registry=registry)
        self._fold_time = Counter("qflare_fold_seconds", "Time spent folding", registry=registry)
        self._versions = Counter("qflare_versions", "Versions made by rounds", registry=registry)
        self._collecting = Histogram(
            "qflare_round_collecting_seconds",
            "Time from the opening of a round to its closing",
            buckets=ROUND_BUCKETS,
            registry=registry,
        )
        self._publishing = Histogram(
            "qflare_round_publishing_seconds",
            "Time from the closing of a round to its version",
            buckets=PUBLISH_BUCKETS,
            registry=registry,
        )
        self._slices = Counter(
            "qflare_fold_slices",
            "Slices folded for another coordinator by outcome: recorded, refused, failed",
            labelnames=("outcome",),
            registry=registry,
        )
        self._slice_time = Counter(
            "qflare_fold_slice_seconds",
            "Time spent on slices for other coordinators",
            registry=registry,
        )
        self._helper_requests = Counter(
            "qflare_helper_requests",
            "Requests to helpers for secure aggregation by outcome: answered, refused, updates_refused, unavailable",
            labelnames=("outcome",),
            registry=registry,
        )
        self._helper_answer = Histogram(
            "qflare_helper_answer_seconds",
            "Time from a request to a helper to its verified answer",
            buckets=PUBLISH_BUCKETS,
            registry=registry,
        )
        self._webhooks = Counter(
            "qflare_webhook_attempts",
            "Attempts to deliver a webhook by outcome: delivered, failed, dropped",
            labelnames=("outcome",),
            registry=registry,
        )
        self._query = Histogram(
            "qflare_database_query_seconds",
            "Time of one statement",
            buckets=QUERY_BUCKETS,
            registry=registry,
        )

    @property
    def port(self) -> int:
        """Port of the HTTP server; 0 before it serves."""
        return 0 if self._server is None else self._server.port

    def serve(self, config: ServerConfig, address: tuple[str, int], context: Context) -> None:
        """Start the HTTP server and the database metrics.

        Args:
            config: `metrics_hosts` and the TLS files.
            address: Host and port; port 0 takes a free one.
            context: Has the database.

        Raises:
            ConfigError: The address cannot be bound, or the TLS files cannot be read.
        """
        names = [address[0], *config.metrics_hosts.split(",")]
        if config.metrics_has_tls:
            names += certificate_names(config.tls_certificate_file)
        site = MetricsSite(lambda: generate_latest(self.registry))
        self._server = HttpServer(
            config,
            KnownHosts(site, names, "QFLARE_METRICS_HOSTS"),
            setting="QFLARE_METRICS_LISTEN",
            address=address,
            has_tls=config.metrics_has_tls,
        )
        self.registry.register(DatabaseCollector(context))
        self._measure_queries(context.database.engine)
        self._server.start()

    def close(self) -> None:
        """Stop the HTTP server."""
        if self._server is not None:
            self._server.stop()

    def _measure_queries(self, engine: Engine) -> None:
        def before(_connection: Any, _cursor: Any, *rest: Any) -> None:
            context = rest[2]
            if context is not None:
                context.qflare_started = time.perf_counter()

        def after(_connection: Any, _cursor: Any, *rest: Any) -> None:
            started = getattr(rest[2], "qflare_started", None)
            if started is not None:
                self._query.observe(time.perf_counter() - started)

        event.listen(engine, "before_cursor_execute", before)
        event.listen(engine, "after_cursor_execute", after)

    def call_started(self, method: str, kind: str) -> None:
        """Count a call."""
        self._started.labels(*_labels(method, kind)).inc()
        self._in_flight.inc()

    def message_received(self, method: str, kind: str) -> None:
        """Count a message."""
        self._received.labels(*_labels(method, kind)).inc()

    def message_sent(self, method: str, kind: str) -> None:
        """Count a message."""
        self._sent.labels(*_labels(method, kind)).inc()

    def call_handled(
        self, method: str, kind: str, code: str, duration_s: float, reason: str
    ) -> None:
        """Count a response, and the outcome of a submitted update."""
        self._in_flight.dec()
        labels = _labels(method, kind)
        self._handled.labels(*labels, _camel(code)).inc()
        self._handling.labels(*labels).observe(duration_s)
        if method == SUBMIT:
            self.update_relayed(reason)

    def update_relayed(self, reason: str) -> None:
        """Count the outcome of an update."""
        self._updates.labels(reason.lower() or "accepted").inc()

    def bytes_received(self, count: int) -> None:
        """Count payload bytes."""
        self._payload.labels("received").inc(count)

    def bytes_sent(self, count: int) -> None:
        """Count payload bytes."""
        self._payload.labels("sent").inc(count)

    def updates_folded(self, count: int, size_bytes: int, duration_s: float) -> None:
        """Count folded updates, their bytes and the folding time."""
        self._folded.inc(count)
        self._folded_bytes.inc(size_bytes)
        self._fold_time.inc(duration_s)

    def round_published(
        self, aggregated_count: int, rejected_count: int, collected_s: float, published_s: float
    ) -> None:
        """Count a version, the outcomes of its round's updates, and its durations."""
        self._versions.inc()
        self._updates.labels("aggregated").inc(aggregated_count)
        self._updates.labels("rejected").inc(rejected_count)
        self._collecting.observe(collected_s)
        self._publishing.observe(published_s)

    def slice_folded(self, outcome: str, duration_s: float) -> None:
        """Count a slice and the time that it took."""
        self._slices.labels(outcome).inc()
        self._slice_time.inc(duration_s)

    def helper_asked(self, outcome: str, duration_s: float) -> None:
        """Count a request to a helper, and the time of an answer."""
        self._helper_requests.labels(outcome).inc()
        if outcome == "answered":
            self._helper_answer.observe(duration_s)

    def webhook_attempted(self, outcome: str) -> None:
        """Count an attempt."""
        self._webhooks.labels(outcome).inc()


def _labels(method: str, kind: str) -> tuple[str, str, str]:
    service, _, name = method.strip("/").rpartition("/")
    return kind, service, name


def _camel(code: str) -> str:
    """Return a status code in the spelling of the usual gRPC metrics: NotFound for NOT_FOUND, OK for OK."""
    return code if code == "OK" else code.replace("_", " ").title().replace(" ", "")
