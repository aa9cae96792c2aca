"""A device's part of a trace, where the program around the SDK uses OpenTelemetry (extra `otel`).

Spans go to whatever tracer provider that program has set up, and every call carries the trace on to the coordinator
(W3C Trace Context). Without OpenTelemetry, or without a provider, all of this does nothing.
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
    """Make a block of work a span of the trace under way.

    Args:
        name: What the work is.
        attributes: Facts about it, prefixed `qflare.` in the span.
    """
    if trace is None:
        yield
        return
    named = {f"qflare.{key}": value for key, value in attributes.items()}
    with trace.get_tracer("qflare_client").start_as_current_span(name, attributes=named):
        yield


def trace_metadata() -> tuple[tuple[str, str], ...]:
    """Return the metadata by which the coordinator goes on with the trace; none without one."""
    if propagator is None:
        return ()
    carrier: dict[str, str] = {}
    propagator.inject(carrier)
    return tuple(carrier.items())
