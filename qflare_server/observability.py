"""Metrics and traces of one process, put together from its settings; both are extras.

Without `metrics_listen` and `traces_endpoint` neither library is imported and `telemetry` does nothing.
"""

import os
from typing import TYPE_CHECKING

from qflare_server.config import ConfigError, ServerConfig
from qflare_server.context import Context, Telemetry
from qflare_server.telemetry import Several

if TYPE_CHECKING:
    from qflare_server.metrics import Metrics
    from qflare_server.tracing import Tracing

WORKER_VARIABLE = "QFLARE_WORKER"


class Observability:
    """What of one process can be watched from outside.

    Args:
        config: `metrics_listen` and `traces_endpoint`.
        further: Hears of everything as well.

    Raises:
        ConfigError: A setting needs an extra that is not installed.
    """

    def __init__(self, config: ServerConfig, further: Telemetry | None = None) -> None:
        self._config = config
        self._metrics = _metrics() if config.metrics_listen else None
        self._tracing = _tracing(config.traces_endpoint) if config.traces_endpoint else None
        parts = [part for part in (self._metrics, self._tracing, further) if part is not None]
        self.telemetry = parts[0] if len(parts) == 1 else Several(parts) if parts else Telemetry()

    @property
    def metrics_port(self) -> int:
        """Port of the metrics server, 0 without one."""
        return 0 if self._metrics is None else self._metrics.port

    def start(self, context: Context) -> None:
        """Serve metrics, those of the database among them.

        Raises:
            ConfigError: The address cannot be bound.
        """
        if self._metrics is None:
            return
        host, _, port = self._config.metrics_listen.rpartition(":")
        worker = int(os.environ.get(WORKER_VARIABLE, "0"))
        number = int(port) + worker if int(port) else 0
        try:
            self._metrics.serve(host.strip("[]"), number, context)
        except OSError as error:
            listen = self._config.metrics_listen
            raise ConfigError(f"QFLARE_METRICS_LISTEN: cannot bind {listen}: {error}") from error

    def close(self) -> None:
        """End the metrics server and send the spans that are left."""
        if self._metrics is not None:
            self._metrics.close()
        if self._tracing is not None:
            self._tracing.close()


def _metrics() -> "Metrics":
    try:
        from qflare_server.metrics import Metrics  # noqa: PLC0415  # an extra
    except ImportError as error:
        raise ConfigError("QFLARE_METRICS_LISTEN: pip install 'qflare[metrics]'") from error
    return Metrics()


def _tracing(endpoint: str) -> "Tracing":
    try:
        from qflare_server.tracing import Tracing, otlp_exporter  # noqa: PLC0415  # an extra

        return Tracing(otlp_exporter(endpoint))
    except ImportError as error:
        raise ConfigError("QFLARE_TRACES_ENDPOINT: pip install 'qflare[otel]'") from error
