"""Monitoring of a helper: Prometheus metrics over HTTP or HTTPS, and the health service of gRPC.

Labels come from this program only, never from a caller. The HTTP server has few connections and ends each
after some seconds; the health service has `Check` alone, because `Watch` would hold a thread for each caller.
"""

import logging
import socket
import ssl
import threading
from contextlib import closing
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Final

import grpc
from google.protobuf.message import DecodeError
from grpc_health.v1 import health_pb2
from prometheus_client import (
    CONTENT_TYPE_LATEST,
    PLATFORM_COLLECTOR,
    PROCESS_COLLECTOR,
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    generate_latest,
)

from qflare_helper.errors import HelperError, StoreError
from qflare_helper.ledger import Ledger

CONNECTION_S: Final = 5.0
"""Longest duration of one connection for metrics, in seconds."""

MAX_CONNECTIONS: Final = 16
"""Most connections for metrics at once."""

BUCKETS: Final = (0.01, 0.05, 0.1, 0.5, 1, 5, 10, 30, 60, 300, 600)
SERVICE: Final = "qflare.v1.HelperService"

logger = logging.getLogger(__name__)


class HelperMetrics:
    """Metrics of a helper.

    Args:
        ledger: Its ledger.
    """

    def __init__(self, ledger: Ledger) -> None:
        self.registry = CollectorRegistry()
        for collector in (PROCESS_COLLECTOR, PLATFORM_COLLECTOR):
            self.registry.register(collector)
        self._requests = Counter(
            "qflare_helper_served",
            "Requests by outcome: answered, checked, updates_refused, or the reason of a refusal",
            labelnames=("outcome",),
            registry=self.registry,
        )
        self._duration = Histogram(
            "qflare_helper_serving_seconds",
            "Time from a verified request to the end of its answer",
            buckets=BUCKETS,
            registry=self.registry,
        )
        self.in_progress = Gauge(
            "qflare_helper_in_progress", "Verified requests in progress", registry=self.registry
        )
        counter = Gauge(
            "qflare_helper_counter",
            "Answers in the ledger; -1 if unreadable",
            registry=self.registry,
        )
        counter.set_function(lambda: _counter(ledger))

    def ended(self, outcome: str, duration_s: float | None = None) -> None:
        """Count a request; the duration of one that was verified."""
        self._requests.labels(outcome.lower()).inc()
        if duration_s is not None:
            self._duration.observe(duration_s)


def _counter(ledger: Ledger) -> int:
    try:
        return ledger.counter()
    except HelperError:
        return -1


class MetricsServer:
    """Serves `/metrics` over HTTP or HTTPS.

    Args:
        metrics: The metrics.
        address: Host and port; port 0 takes a free one.
        tls: Certificate and key; None serves without TLS.

    Raises:
        StoreError: The address cannot be bound.
    """

    def __init__(
        self, metrics: HelperMetrics, address: tuple[str, int], tls: ssl.SSLContext | None = None
    ) -> None:
        class Handler(_Handler):
            registry = metrics.registry

        try:
            self._server = _Server(address, Handler, tls)
        except OSError as error:
            raise StoreError(f"cannot serve metrics on {address[0]}:{address[1]}") from error
        self.port = int(self._server.server_address[1])
        self._thread = threading.Thread(target=self._server.serve_forever, name="metrics")

    def start(self) -> None:
        """Serve."""
        self._thread.start()

    def stop(self) -> None:
        """End."""
        if self._thread.is_alive():
            self._server.shutdown()
            self._thread.join()
        self._server.server_close()


class _Server(ThreadingHTTPServer):
    """Answers a few connections at once, and closes those beyond."""

    request_queue_size = 16

    def __init__(
        self,
        address: tuple[str, int],
        handler: type[BaseHTTPRequestHandler],
        tls: ssl.SSLContext | None,
    ) -> None:
        self._places = threading.BoundedSemaphore(MAX_CONNECTIONS)
        self._tls = tls
        super().__init__(address, handler)

    def process_request(self, request: Any, client_address: Any) -> None:
        if self._places.acquire(blocking=False):
            super().process_request(request, client_address)
        else:
            self.shutdown_request(request)

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        try:
            super().process_request_thread(request, client_address)
        finally:
            self._places.release()

    def finish_request(self, request: Any, client_address: Any) -> None:
        """Answer in the thread of the connection, which ends when its time is over, the handshake included."""
        if self._tls is not None:
            request = self._tls.wrap_socket(
                request, server_side=True, do_handshake_on_connect=False
            )
        timer = threading.Timer(CONNECTION_S, _end, [request])
        timer.daemon = True
        timer.start()
        with closing(request):
            try:
                if self._tls is not None:
                    request.settimeout(CONNECTION_S)
                    request.do_handshake()
                super().finish_request(request, client_address)
            finally:
                timer.cancel()

    def handle_error(self, request: Any, client_address: Any) -> None:
        del request, client_address
        logger.debug("connection for metrics failed")


class _Handler(BaseHTTPRequestHandler):
    registry: CollectorRegistry
    timeout = CONNECTION_S
    server_version, sys_version = "qflare-helper", ""

    def do_GET(self) -> None:
        """Send the metrics."""
        if self.path.partition("?")[0] != "/metrics":
            self.send_error(404)
            return
        body = generate_latest(self.registry)
        self.send_response(200)
        self.send_header("Content-Type", CONTENT_TYPE_LATEST)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002 - the library's name
        """Log nothing: a stranger's path does not belong into the log."""


def _end(connection: socket.socket) -> None:
    try:
        # That of SSLSocket would take the TLS state from the thread that uses it.
        socket.socket.shutdown(connection, socket.SHUT_RDWR)
    except OSError:
        logger.debug("connection for metrics had ended")


def health_handler(ledger: Ledger) -> grpc.GenericRpcHandler:
    """Return the handler of the health service: serving while the ledger can be read."""

    def check(
        request: health_pb2.HealthCheckRequest, context: grpc.ServicerContext
    ) -> health_pb2.HealthCheckResponse:
        if request.service not in {"", SERVICE}:
            context.abort(grpc.StatusCode.NOT_FOUND, "unknown service")
        states = health_pb2.HealthCheckResponse
        status = states.NOT_SERVING if _counter(ledger) < 0 else states.SERVING
        return health_pb2.HealthCheckResponse(status=status)

    return grpc.method_handlers_generic_handler(
        "grpc.health.v1.Health",
        {
            "Check": grpc.unary_unary_rpc_method_handler(
                check,
                request_deserializer=_health_request,
                response_serializer=health_pb2.HealthCheckResponse.SerializeToString,
            )
        },
    )


def _health_request(data: bytes) -> health_pb2.HealthCheckRequest:
    try:
        return health_pb2.HealthCheckRequest.FromString(data)
    except DecodeError:
        return health_pb2.HealthCheckRequest(service="?")
