"""OpenTelemetry spans of a device, for programs that use OpenTelemetry (extra `otel`).

Spans go to the tracer provider of the program, and every call propagates the trace to the coordinator (W3C Trace
Context). Without OpenTelemetry, or without a provider, this module does nothing.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

trace: Any
propagator: Any
try:
    from opentelemetry import trace
    from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

    propagator = TraceContextTextMapPropagator()
except ImportError:
    trace = propagator = None


@contextmanager
def span(name: str, **attributes: str | int) -> Iterator[None]:
    """Record a block of work as a span of the current trace.

    Args:
        name: Name of the span.
        attributes: Span attributes, which are prefixed with `qflare.`.
    """
    if trace is None:
        yield
        return
    named = {f"qflare.{key}": value for key, value in attributes.items()}
    with trace.get_tracer("qflare_client").start_as_current_span(name, attributes=named):
        yield


def trace_metadata() -> tuple[tuple[str, str], ...]:
    """Return the metadata that propagates the trace to the coordinator; empty without a trace."""
    if propagator is None:
        return ()
    carrier: dict[str, str] = {}
    propagator.inject(carrier)
    return tuple(carrier.items())
