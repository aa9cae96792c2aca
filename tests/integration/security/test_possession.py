"""A coordinator behind a proxy that ends TLS: every call of a device proves that it holds its session's key."""

import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
from google.protobuf.duration_pb2 import Duration

from qflare.v1 import admin_service_pb2 as admin_pb2
from qflare.v1 import coordinator_service_pb2 as messages
from qflare.v1 import training_pb2
from qflare_client import AuthenticationError, Client, TaskKind, enroll
from qflare_client.rpc.transport import Metadata

Deploy = Callable[..., Any]
ONE_DEVICE = training_pb2.RoundPolicy(quorum=1, deadline=Duration(seconds=60))
GET_TASK = "/qflare.v1.CoordinatorService/GetTask"


@pytest.fixture
def deployment(deploy: Deploy) -> Any:
    return deploy(require_pop=True)


@pytest.fixture
def client(deployment: Any, tmp_path: Path) -> Iterator[Client]:
    enroll(deployment.bundle(), home=tmp_path / "proving")
    opened = Client(home=tmp_path / "proving", proof_of_possession=True)
    yield opened
    opened.close()


def credentials(client: Client, request: messages.GetTaskRequest) -> Metadata:
    """Return what the client would send with a call: what a proxy sees."""
    return client._login.metadata(GET_TASK, request)


def refused(call: Callable[[], Any]) -> bool:
    with pytest.raises(grpc.RpcError) as caught:
        call()
    return bool(caught.value.code() is grpc.StatusCode.UNAUTHENTICATED)


def test_a_device_that_proves_takes_part(deployment: Any, client: Client) -> None:
    session_id = deployment.session(
        rounds=ONE_DEVICE,
        total_rounds=1,
        evaluation=training_pb2.EvaluationPolicy(every_rounds=1),
    )
    task = client.get_task(session_id)
    assert task.kind is TaskKind.TRAIN
    base = client.download_base(task)
    trained = {name: array + np.float32(1) for name, array in base.arrays.items()}
    receipt = client.submit(task, base, trained, 10, {"loss": 1.0, "accuracy": 0.5})
    assert receipt.round_number == 1
    while (task := client.get_task(session_id)).kind is not TaskKind.EVALUATE:
        threading.Event().wait(task.poll_delay_s)
    client.report_evaluation(task, 20, {"accuracy": 0.75, "loss": 0.5})
    assert client.rotate_keys() == 1


def test_a_device_that_does_not_prove_is_refused(deployment: Any) -> None:
    with pytest.raises(AuthenticationError):
        deployment.device("silent").heartbeat()


def test_a_call_that_was_overheard_cannot_be_repeated(deployment: Any, client: Client) -> None:
    request = messages.GetTaskRequest()
    metadata = credentials(client, request)
    deployment.devices_stub.GetTask(request, metadata=metadata)
    assert refused(lambda: deployment.devices_stub.GetTask(request, metadata=metadata))


def test_a_call_cannot_be_changed_on_its_way(deployment: Any, client: Client) -> None:
    metadata = credentials(client, messages.GetTaskRequest())
    changed = messages.GetTaskRequest(training_session_id="another")
    assert refused(lambda: deployment.devices_stub.GetTask(changed, metadata=metadata))


def test_a_proof_is_not_for_another_method(deployment: Any, client: Client) -> None:
    metadata = credentials(client, messages.GetTaskRequest())
    request = messages.HeartbeatRequest()
    assert refused(lambda: deployment.devices_stub.Heartbeat(request, metadata=metadata))


def test_a_stream_without_messages_proves_nothing(deployment: Any, client: Client) -> None:
    metadata = credentials(client, messages.GetTaskRequest())
    assert refused(lambda: deployment.devices_stub.SubmitUpdate(iter(()), metadata=metadata))


def test_administrators_prove_nothing(deployment: Any) -> None:
    listed = deployment.admin.ListDevices(
        admin_pb2.ListDevicesRequest(), metadata=deployment.metadata
    )
    assert list(listed.devices) == []
