"""OpenTelemetry spans of an update: received, stored, folded, published.

The span of an update belongs to the trace of its device if the call carries a `traceparent` (W3C Trace Context). A
round folds many updates, so its spans form a separate trace with links to the updates that this process has received
recently; other updates are only counted.
"""

import threading
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any, Final

from opentelemetry import trace
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor, SpanExporter
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

import qflare
from qflare_server.context import Telemetry
from qflare_server.serving.rpc.call import current_call

REMEMBERED: Final = 10_000
MAX_LINKS: Final = 128  # the SDK's own limit
PREFIX: Final = "qflare."
PROPAGATOR: Final = TraceContextTextMapPropagator()


def otlp_exporter(endpoint: str) -> SpanExporter:
    """Return the OTLP/HTTP span exporter.

    Raises:
        ImportError: The exporter is not installed.
    """
    from opentelemetry.exporter.otlp.proto.http.trace_exporter import (  # noqa: PLC0415
        OTLPSpanExporter,
    )

    return OTLPSpanExporter(endpoint=endpoint)


class Tracing(Telemetry):
    """Creates spans and exports them in batches from a background thread.

    Args:
        exporter: Span exporter.
    """

    def __init__(self, exporter: SpanExporter) -> None:
        resource = Resource.create(
            {"service.name": "qflare-server", "service.version": qflare.__version__}
        )
        self._provider = TracerProvider(resource=resource, shutdown_on_exit=False)
        self._provider.add_span_processor(BatchSpanProcessor(exporter))
        self._tracer = self._provider.get_tracer("qflare_server", qflare.__version__)
        self._lock = threading.Lock()
        self._updates: OrderedDict[str, trace.SpanContext] = OrderedDict()

    @property
    def records_spans(self) -> bool:
        """Spans are recorded."""
        return True

    def close(self) -> None:
        """Export the remaining spans."""
        self._provider.shutdown()

    def span(
        self, name: str, *, links: Sequence[str] = (), **attributes: Any
    ) -> AbstractContextManager[None]:
        """Return a context manager for a span; a span with an `update_id` continues the device's trace."""
        return self._span(name, links, attributes)

    @contextmanager
    def _span(self, name: str, links: Sequence[str], attributes: dict[str, Any]) -> Iterator[None]:
        named = {PREFIX + key: value for key, value in attributes.items()}
        if links:
            named[PREFIX + "update_count"] = len(links)
        update_id = attributes.get("update_id")
        with self._tracer.start_as_current_span(
            name,
            context=None if update_id is None else _remote_context(),
            attributes=named,
            links=self._links(links),
        ) as span:
            if update_id is not None:
                self._remember(str(update_id), span.get_span_context())
            yield

    def _remember(self, update_id: str, context: trace.SpanContext) -> None:
        with self._lock:
            self._updates[update_id] = context
            if len(self._updates) > REMEMBERED:
                self._updates.popitem(last=False)

    def _links(self, update_ids: Sequence[str]) -> list[trace.Link]:
        with self._lock:
            found = [self._updates[item] for item in update_ids if item in self._updates]
        return [trace.Link(context) for context in found[:MAX_LINKS]]


def _remote_context() -> Any:
    """Return the trace context of the current call; empty if it has none."""
    try:
        traceparent = current_call().traceparent
    except LookupError:
        traceparent = ""
    return PROPAGATOR.extract({"traceparent": traceparent} if traceparent else {})
