"""Every field of every method is checked at the boundary: what breaks its constraint is named, whatever the method."""

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import grpc
import numpy as np
import pytest
from google.protobuf.descriptor import Descriptor, FieldDescriptor, MethodDescriptor
from google.protobuf.message_factory import GetMessageClass
from google.rpc import error_details_pb2

from qflare.protocol.constraints import constraint_of
from qflare.tensors import Manifest
from qflare.v1 import admin_service_pb2 as admin_pb2
from qflare.v1 import coordinator_service_pb2 as pb
from qflare.v1 import training_pb2
from qflare_server.serving.rpc.log_sampling import LINES
from tests.integration.conftest import Deployment
from tests.support.hostile_requests import TIMES, is_map, methods
from tests.support.raw_device import RawDevice, details_of, info_of, reason_of
from tests.support.use_cases import with_quorum

Code = grpc.StatusCode
METHODS = list(methods())
WEIGHTS = {"w": np.zeros(4, np.float32)}


@pytest.fixture
def database_url(sqlite_url: str) -> str:
    """Return an SQLite database: next to nothing is written here."""
    return sqlite_url


@pytest.fixture
def deployment(deploy: Callable[..., Deployment]) -> Deployment:
    return deploy()


@pytest.fixture
def device(deployment: Deployment) -> RawDevice:
    return RawDevice(deployment.device("raw"), deployment.devices_stub)


class Caller:
    """Calls any method with bytes, as whoever may call it."""

    def __init__(self, deployment: Deployment, device: RawDevice) -> None:
        self._channel = deployment.channel
        self._metadata = {
            "AdminService": deployment.metadata,
            "CoordinatorService": device.metadata,
        }

    def call(self, path: str, method: MethodDescriptor, data: bytes) -> Sequence[bytes]:
        """Make a call with one message and return the answers."""
        kinds = (method.client_streaming, method.server_streaming)
        make: Any = {
            (False, False): self._channel.unary_unary,
            (True, False): self._channel.stream_unary,
            (False, True): self._channel.unary_stream,
            (True, True): self._channel.stream_stream,
        }[kinds]
        metadata = self._metadata.get(method.containing_service.name, ())
        request = iter([data]) if method.client_streaming else data
        answer = make(path)(request, metadata=metadata, timeout=20)
        return list(answer) if method.server_streaming else [answer]

    def refusal(self, path: str, method: MethodDescriptor, data: bytes) -> Any:
        """Make a call that has to be refused for its form."""
        with pytest.raises(grpc.RpcError) as caught:
            self.call(path, method, data)
        assert caught.value.code() is Code.INVALID_ARGUMENT, (path, caught.value)
        assert reason_of(caught.value) == "INVALID_REQUEST"
        return caught.value


@pytest.fixture
def caller(deployment: Deployment, device: RawDevice) -> Caller:
    return Caller(deployment, device)


def violations_of(error: Any) -> dict[str, str]:
    (bad,) = details_of(error, error_details_pb2.BadRequest)
    return {item.field: item.description for item in bad.field_violations}


# Every field of every method

Spoil = Callable[[Any], None]


def wrong_fields(kind: Descriptor) -> Iterator[tuple[str, Spoil]]:
    """Yield for every field of a message, however deep, its path and what puts a wrong value there."""
    for field in kind.fields:
        if constraint_of(field).checked_by_method:
            continue
        inner = field.message_type
        if is_map(field):
            yield f"{field.name}['\\x00']", wrong_key(field)
        elif inner is None:
            yield from wrong_scalar(field)
        elif inner.full_name in TIMES:
            yield field.name, wrong_time(field)
        else:
            yield from wrong_within(field, inner)


def wrong_key(field: FieldDescriptor) -> Spoil:
    def spoil(message: Any) -> None:
        entries = getattr(message, field.name)
        entry = field.message_type
        assert entry is not None
        is_text = entry.fields_by_name["value"].type == FieldDescriptor.TYPE_STRING
        entries["\0"] = "" if is_text else 0.0

    return spoil


def wrong_time(field: FieldDescriptor) -> Spoil:
    def spoil(message: Any) -> None:
        getattr(message, field.name).seconds = 2**62

    return spoil


def wrong_scalar(field: FieldDescriptor) -> Iterator[tuple[str, Spoil]]:
    wrong: Any = None
    if field.enum_type is not None:
        wrong = 77
    elif field.type == FieldDescriptor.TYPE_STRING:
        wrong = "a\0b"
    elif field.type == FieldDescriptor.TYPE_BYTES:
        wrong = bytes((constraint_of(field).max_length or 65_536) + 1)
    elif field.type == FieldDescriptor.TYPE_DOUBLE:
        wrong = math.nan
    elif field.type != FieldDescriptor.TYPE_BOOL:
        wrong = -1
    if wrong is None:
        return
    if field.is_repeated:
        yield f"{field.name}[0]", lambda message: getattr(message, field.name).append(wrong)
    else:
        yield field.name, lambda message: setattr(message, field.name, wrong)


def wrong_within(field: FieldDescriptor, inner: Descriptor) -> Iterator[tuple[str, Spoil]]:
    path = f"{field.name}[0]." if field.is_repeated else f"{field.name}."
    for rest, spoil in wrong_fields(inner):

        def deeper(message: Any, spoil: Spoil = spoil) -> None:
            found = getattr(message, field.name)
            spoil(found.add() if field.is_repeated else found)

        yield path + rest, deeper


def test_every_field_of_every_request_is_checked(caller: Caller) -> None:
    count = 0
    for path, method in METHODS:
        kind = GetMessageClass(method.input_type)
        for field, spoil in wrong_fields(method.input_type):
            request = kind()
            spoil(request)

            error = caller.refusal(path, method, request.SerializeToString())

            assert field in violations_of(error), path
            count += 1
    assert count > 150


def test_bytes_that_are_no_message_are_an_invalid_argument(
    caller: Caller, caplog: pytest.LogCaptureFixture
) -> None:
    for path, method in METHODS:
        caller.refusal(path, method, b"\xff\xff\xff")

    assert "Traceback" not in caplog.text


def test_fields_of_a_signed_statement_are_checked(
    deployment: Deployment, device: RawDevice
) -> None:
    session_id = deployment.session(WEIGHTS)
    draft = device.draft(device.task(session_id), {"w": np.ones(4, np.float32)})
    draft.statement.metrics["a\0b"] = math.inf
    draft.statement.base_encoding = 77  # type: ignore[assignment]  # what another program may send
    draft.statement.create_time.nanos = -1

    with pytest.raises(grpc.RpcError) as caught:
        device.submit(draft)

    assert caught.value.code() is Code.INVALID_ARGUMENT
    assert list(violations_of(caught.value)) == [
        "header.statement.payload.metrics['a\\x00b']",
        "header.statement.payload.create_time",
        "header.statement.payload.base_encoding",
    ]


def test_bytes_in_the_middle_of_a_stream_that_are_no_message_end_it(
    deployment: Deployment,
) -> None:
    created = deployment.admin.CreateTrainingSession(
        admin_pb2.CreateTrainingSessionRequest(
            name="test", config=with_quorum(training_pb2.TrainingConfig())
        ),
        metadata=deployment.metadata,
    )
    header = admin_pb2.InitialModelHeader(
        training_session_id=created.training_session.training_session_id,
        manifest=Manifest.from_arrays(WEIGHTS).to_proto(),
    )
    first = admin_pb2.UploadInitialModelRequest(header=header).SerializeToString()
    upload: Any = deployment.channel.stream_unary("/qflare.v1.AdminService/UploadInitialModel")

    with pytest.raises(grpc.RpcError) as caught:
        upload(iter([first, b"\xff"]), metadata=deployment.metadata, timeout=20)

    assert caught.value.code() is Code.INVALID_ARGUMENT
    assert reason_of(caught.value) == "INVALID_REQUEST"


# What a caller sees of it


def test_all_wrong_fields_of_a_request_are_named_at_once(deployment: Deployment) -> None:
    config = training_pb2.TrainingConfig(total_rounds=-1)
    config.transfer.update_encoding = 9  # type: ignore[assignment]  # what another program may send
    config.selection.capabilities.add(value=math.nan)
    request = admin_pb2.CreateTrainingSessionRequest(name="two\nlines", config=config)

    with pytest.raises(grpc.RpcError) as caught:
        deployment.admin.CreateTrainingSession(request, metadata=deployment.metadata)

    assert list(violations_of(caught.value)) == [
        "name",
        "config.total_rounds",
        "config.selection.capabilities[0].capability",
        "config.selection.capabilities[0].value",
        "config.transfer.update_encoding",
    ]
    assert info_of(caught.value).metadata["field"] == "name"
    assert "(and 4 more)" in str(caught.value)


@pytest.mark.parametrize("text", ["x" * 20_000, "\N{SNOWMAN}" * 20_000])
def test_a_long_field_does_not_hide_why_it_is_refused(deployment: Deployment, text: str) -> None:
    labels = {f"{text}{number}": text for number in range(8)}
    request = admin_pb2.CreateTrainingSessionRequest(name=text, architecture=labels)

    with pytest.raises(grpc.RpcError) as caught:
        deployment.admin.CreateTrainingSession(request, metadata=deployment.metadata)

    assert caught.value.code() is Code.INVALID_ARGUMENT
    assert violations_of(caught.value)["name"] == "got 20000 characters, want at most 200"


def test_a_caller_without_a_right_learns_nothing_of_its_fields(deployment: Deployment) -> None:
    with pytest.raises(grpc.RpcError) as caught:
        deployment.admin.GetDevice(admin_pb2.GetDeviceRequest())

    assert caught.value.code() is Code.UNAUTHENTICATED


def test_many_filters_are_refused_before_they_cost_anything(deployment: Deployment) -> None:
    request = admin_pb2.ListDevicesRequest()
    for _ in range(1000):
        request.capabilities.add(capability="ram_mib", value=1)

    with pytest.raises(grpc.RpcError) as caught:
        deployment.admin.ListDevices(request, metadata=deployment.metadata, timeout=2)

    assert caught.value.code() is Code.INVALID_ARGUMENT
    assert violations_of(caught.value) == {"capabilities": "got 1000 elements, want at most 64"}


def test_repeated_refusals_do_not_fill_the_log(
    caller: Caller, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    path, method = next((path, method) for path, method in METHODS if method.name == "GetKeyset")

    for _ in range(5 * LINES):
        caller.refusal(path, method, b"\xff")

    assert caplog.text.count("GetKeyset") == LINES


# Metadata that comes twice


def test_two_credentials_are_refused(deployment: Deployment, device: RawDevice) -> None:
    (credential,) = deployment.metadata
    for metadata in ((credential, credential), (credential, ("authorization", "Bearer x"))):
        with pytest.raises(grpc.RpcError) as caught:
            deployment.admin.ListDevices(admin_pb2.ListDevicesRequest(), metadata=metadata)
        assert caught.value.code() is Code.UNAUTHENTICATED

    with pytest.raises(grpc.RpcError) as caught:
        deployment.devices_stub.GetTask(pb.GetTaskRequest(), metadata=device.metadata * 2)
    assert caught.value.code() is Code.UNAUTHENTICATED
