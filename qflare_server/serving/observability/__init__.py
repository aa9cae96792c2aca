"""Metrics and traces of one process; both are optional extras.

Without `metrics_listen` and `traces_endpoint` neither library is imported and `telemetry` does nothing.
"""

import os
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import TYPE_CHECKING, Any

from qflare_server.config import WORKER_VARIABLE, ConfigError, ServerConfig
from qflare_server.context import Context, Telemetry

if TYPE_CHECKING:
    from qflare_server.serving.observability.metrics import Metrics
    from qflare_server.serving.observability.tracing import Tracing


class Observability:
    """Metrics and traces of one process.

    Args:
        config: `metrics_listen` and `traces_endpoint`.
        further: Another sink, which receives every event too.

    Raises:
        ConfigError: A setting requires an extra that is not installed.
    """

    def __init__(self, config: ServerConfig, further: Telemetry | None = None) -> None:
        self._config = config
        self._metrics = _metrics() if config.metrics_listen else None
        self._tracing = _tracing(config.traces_endpoint) if config.traces_endpoint else None
        parts = [part for part in (self._metrics, self._tracing, further) if part is not None]
        self.telemetry = (
            parts[0] if len(parts) == 1 else CompositeTelemetry(parts) if parts else Telemetry()
        )

    @property
    def metrics_port(self) -> int:
        """Port of the metrics server; 0 if there is none."""
        return 0 if self._metrics is None else self._metrics.port

    def start(self, context: Context) -> None:
        """Serve metrics, including those of the database.

        Raises:
            ConfigError: The address cannot be bound, or the TLS files cannot be read.
        """
        if self._metrics is None:
            return
        host, port = self._config.metrics_address
        worker = int(os.environ.get(WORKER_VARIABLE, "0"))
        self._metrics.serve(self._config, (host, port + worker if port else 0), context)

    def close(self) -> None:
        """Stop the metrics server and export the remaining spans."""
        if self._metrics is not None:
            self._metrics.close()
        if self._tracing is not None:
            self._tracing.close()


def _metrics() -> "Metrics":
    try:
        from qflare_server.serving.observability.metrics import Metrics  # noqa: PLC0415  # an extra
    except ImportError as error:
        raise ConfigError(
            "QFLARE_METRICS_LISTEN: pip install 'qflare[metrics]'",
            remedy="pip install 'qflare[metrics]'",
        ) from error
    return Metrics()


def _tracing(endpoint: str) -> "Tracing":
    try:
        from qflare_server.serving.observability.tracing import Tracing, otlp_exporter  # noqa: PLC0415  # an extra

        return Tracing(otlp_exporter(endpoint))
    except ImportError as error:
        raise ConfigError(
            "QFLARE_TRACES_ENDPOINT: pip install 'qflare[otel]'",
            remedy="pip install 'qflare[otel]'",
        ) from error


class CompositeTelemetry(Telemetry):
    """Forwards every event to several sinks."""

    def __init__(self, hearers: Sequence[Telemetry]) -> None:
        self._hearers = tuple(hearers)

    @property
    def records_spans(self) -> bool:
        """Whether any sink records spans."""
        return any(hearer.records_spans for hearer in self._hearers)

    def call_started(self, method: str, kind: str) -> None:
        """Forward the event."""
        for hearer in self._hearers:
            hearer.call_started(method, kind)

    def message_received(self, method: str, kind: str) -> None:
        """Forward the event."""
        for hearer in self._hearers:
            hearer.message_received(method, kind)

    def message_sent(self, method: str, kind: str) -> None:
        """Forward the event."""
        for hearer in self._hearers:
            hearer.message_sent(method, kind)

    def call_handled(
        self, method: str, kind: str, code: str, duration_s: float, reason: str
    ) -> None:
        """Forward the event."""
        for hearer in self._hearers:
            hearer.call_handled(method, kind, code, duration_s, reason)

    def update_relayed(self, reason: str) -> None:
        """Forward the event."""
        for hearer in self._hearers:
            hearer.update_relayed(reason)

    def bytes_received(self, count: int) -> None:
        """Forward the event."""
        for hearer in self._hearers:
            hearer.bytes_received(count)

    def bytes_sent(self, count: int) -> None:
        """Forward the event."""
        for hearer in self._hearers:
            hearer.bytes_sent(count)

    def updates_folded(self, count: int, size_bytes: int, duration_s: float) -> None:
        """Forward the event."""
        for hearer in self._hearers:
            hearer.updates_folded(count, size_bytes, duration_s)

    def round_published(
        self, aggregated_count: int, rejected_count: int, collected_s: float, published_s: float
    ) -> None:
        """Forward the event."""
        for hearer in self._hearers:
            hearer.round_published(aggregated_count, rejected_count, collected_s, published_s)

    def slice_folded(self, outcome: str, duration_s: float) -> None:
        """Forward the event."""
        for hearer in self._hearers:
            hearer.slice_folded(outcome, duration_s)

    def helper_asked(self, outcome: str, duration_s: float) -> None:
        """Forward the event."""
        for hearer in self._hearers:
            hearer.helper_asked(outcome, duration_s)

    def webhook_attempted(self, outcome: str) -> None:
        """Forward the event."""
        for hearer in self._hearers:
            hearer.webhook_attempted(outcome)

    def span(
        self, name: str, *, links: Sequence[str] = (), **attributes: Any
    ) -> AbstractContextManager[None]:
        """Enter the block of every sink."""
        return self._spans(name, links, attributes)

    @contextmanager
    def _spans(self, name: str, links: Sequence[str], attributes: dict[str, Any]) -> Iterator[None]:
        with ExitStack() as stack:
            for hearer in self._hearers:
                stack.enter_context(hearer.span(name, links=links, **attributes))
            yield
