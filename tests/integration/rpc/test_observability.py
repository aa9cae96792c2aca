"""Metrics and traces of a real coordinator at work."""

import threading
import urllib.request
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from typing import Any

import grpc
import numpy as np
import pytest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.sdk.trace import TracerProvider
from prometheus_client.parser import text_string_to_metric_families

from qflare.tensors import Array
from qflare.v1 import coordinator_service_pb2 as pb
from qflare_client import TrainingTask, run

Deploy = Callable[..., Any]
Samples = dict[tuple[str, frozenset[tuple[str, str]]], float]


def add_one(
    arrays: dict[str, Array], _config: TrainingTask
) -> tuple[dict[str, Array], int, dict[str, float]]:
    return {name: array + np.float32(1) for name, array in arrays.items()}, 10, {"accuracy": 0.5}


def scrape(deployment: Any) -> Samples:
    port = deployment.coordinator.observability.metrics_port
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=10) as answer:
        text = answer.read().decode()
    return {
        (sample.name, frozenset(sample.labels.items())): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


def value(samples: Samples, name: str, /, **labels: str) -> float:
    return samples.get((name, frozenset(labels.items())), 0.0)


@pytest.fixture
def trained(deploy: Deploy) -> Any:
    """Return a coordinator with metrics on which one device has trained for two rounds."""
    deployment = deploy(metrics_listen="127.0.0.1:0")
    session_id = deployment.session(rounds={"quorum": 1}, total_rounds=2)
    run(deployment.device("a"), add_one, training_session_id=session_id)
    return deployment


def test_calls_are_counted_under_the_well_known_names(trained: Any) -> None:
    samples = scrape(trained)
    labels = {
        "grpc_type": "client_stream",
        "grpc_service": "qflare.v1.CoordinatorService",
        "grpc_method": "SubmitUpdate",
    }
    assert value(samples, "grpc_server_started_total", **labels) == 2
    assert value(samples, "grpc_server_handled_total", grpc_code="OK", **labels) == 2
    assert value(samples, "grpc_server_msg_received_total", **labels) >= 2
    assert value(samples, "grpc_server_msg_sent_total", **labels) == 2
    assert value(samples, "grpc_server_handling_seconds_count", **labels) == 2


def test_every_call_that_begins_to_be_answered_ends(trained: Any) -> None:
    with pytest.raises(grpc.RpcError):
        trained.devices_stub.GetTask(pb.GetTaskRequest())
    with pytest.raises(grpc.RpcError):
        trained.channel.unary_unary("/qflare.v1.CoordinatorService/Unknown")(b"")

    assert value(scrape(trained), "qflare_calls_in_flight") == 0


def test_updates_are_counted_by_outcome(trained: Any) -> None:
    samples = scrape(trained)
    assert value(samples, "qflare_updates_total", outcome="accepted") == 2
    assert value(samples, "qflare_updates_total", outcome="aggregated") == 2
    assert value(samples, "qflare_versions_total") == 2
    assert value(samples, "qflare_payload_bytes_total", direction="received") == 32
    assert value(samples, "qflare_payload_bytes_total", direction="sent") == 32
    assert value(samples, "qflare_folded_updates_total") == 2
    assert value(samples, "qflare_round_collecting_seconds_count") == 2
    assert value(samples, "qflare_round_publishing_seconds_count") == 2


def test_the_database_is_measured(trained: Any) -> None:
    samples = scrape(trained)
    assert value(samples, "qflare_database_up") == 1
    assert value(samples, "qflare_database_pool_size") == 8
    assert value(samples, "qflare_database_query_seconds_count") > 0
    assert value(samples, "qflare_devices", state="active") == 1
    assert value(samples, "qflare_training_sessions", state="completed") == 1


def test_running_training_sessions_show_their_privacy_budget(deploy: Deploy) -> None:
    deployment = deploy(metrics_listen="127.0.0.1:0")
    session_id = deployment.session(
        rounds={"quorum": 1},
        privacy={"noise_multiplier": 1.0, "clip_norm": 1.0, "epsilon_budget": 8.0, "delta": 1e-5},
    )
    samples = scrape(deployment)
    assert value(samples, "qflare_privacy_epsilon_budget", name="test") == 8.0
    assert session_id not in str(samples)  # whoever scrapes needs no credential


def test_training_sessions_of_one_name_have_one_sample(deploy: Deploy) -> None:
    deployment = deploy(metrics_listen="127.0.0.1:0")
    for _ in range(2):
        deployment.session(rounds={"quorum": 1})
    assert value(scrape(deployment), "qflare_training_session_round", name="test") == 1


def test_names_that_callers_make_up_make_no_labels(trained: Any) -> None:
    for name in ("One", "Two"):
        call = trained.channel.unary_unary(f"/made.up.Service/{name}")
        with pytest.raises(grpc.RpcError):
            call(b"")
    samples = scrape(trained)
    labels = {"grpc_type": "unary", "grpc_service": "", "grpc_method": "unknown"}
    assert value(samples, "grpc_server_started_total", **labels) == 2
    assert not [key for key in samples if "made.up" in str(key)]


def test_without_a_setting_there_is_no_server(deploy: Deploy) -> None:
    assert deploy().coordinator.observability.metrics_port == 0


class _Collector(BaseHTTPRequestHandler):
    """Takes spans in as an OpenTelemetry collector does."""

    spans: list[Any]

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["content-length"]))
        request = ExportTraceServiceRequest.FromString(body)
        for resource in request.resource_spans:
            for scope in resource.scope_spans:
                self.spans.extend(scope.spans)
        self.send_response(200)
        self.end_headers()

    def log_message(self, *_: object) -> None:
        return


@pytest.fixture
def collector() -> Iterator[Any]:
    """Yield an address that takes spans, and the spans."""

    class Handler(_Collector):
        spans: list[Any] = []  # noqa: RUF012

    server = HTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}/v1/traces", Handler.spans
    server.shutdown()
    server.server_close()
    thread.join()


def test_an_update_is_traced_to_its_version(deploy: Deploy, collector: Any) -> None:
    endpoint, spans = collector
    deployment = deploy(traces_endpoint=endpoint)
    session_id = deployment.session(rounds={"quorum": 1}, total_rounds=1)
    run(deployment.device("a"), add_one, training_session_id=session_id)

    deployment.coordinator.stop()  # ends the span of the version, which a device may see before

    named = {span.name: span for span in spans}
    update = named["qflare.update"]
    assert named["qflare.update.receive"].parent_span_id == update.span_id
    assert named["qflare.update.store"].parent_span_id == update.span_id
    for name in ("qflare.round.fold", "qflare.version.publish"):
        assert [link.span_id for link in named[name].links] == [update.span_id]


def test_the_trace_of_a_device_goes_on_in_the_coordinator(deploy: Deploy, collector: Any) -> None:
    endpoint, spans = collector
    deployment = deploy(traces_endpoint=endpoint)
    session_id = deployment.session(rounds={"quorum": 1}, total_rounds=1)
    device = deployment.device("a")

    with TracerProvider().get_tracer("test").start_as_current_span("training") as training:
        run(device, add_one, training_session_id=session_id)
    deployment.coordinator.stop()

    (update,) = [span for span in spans if span.name == "qflare.update"]
    assert update.trace_id == training.get_span_context().trace_id.to_bytes(16, "big")
