"""A device's part of a trace."""

import pytest
from opentelemetry.sdk.trace import TracerProvider

from qflare_client.rpc import tracing


def test_without_a_trace_nothing_is_sent() -> None:
    assert tracing.trace_metadata() == ()


def test_the_trace_under_way_is_sent() -> None:
    with TracerProvider().get_tracer("test").start_as_current_span("training") as span:
        (entry,) = tracing.trace_metadata()
    assert entry[0] == "traceparent"
    assert format(span.get_span_context().trace_id, "032x") in entry[1]


def test_without_the_library_work_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tracing, "trace", None)
    monkeypatch.setattr(tracing, "propagator", None)
    with tracing.span("qflare.device.train", round_number=1):
        assert tracing.trace_metadata() == ()
