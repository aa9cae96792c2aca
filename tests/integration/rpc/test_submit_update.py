"""Every way in which an update can be wrong: its typed error, nothing written, the coordinator alive."""

import threading
from collections.abc import Callable, Iterator

import grpc
import numpy as np
import pytest

from qflare.tensors import Manifest
from qflare.v1 import admin_service_pb2 as admin_pb2
from qflare.v1 import coordinator_service_pb2 as pb
from qflare.v1 import security_pb2, tensor_pb2
from qflare.v1.training_pb2 import TrainingConfig
from qflare_server.storage.repository.audit import SYSTEM
from qflare_server.storage.tables import AuditLog, ModelUpdate, Payload, Upload
from tests.integration.conftest import Deployment
from tests.support.raw_device import Draft, RawDevice, info_of, reason_of
from tests.support.use_cases import with_quorum

Code = grpc.StatusCode
WEIGHTS = {"w": np.arange(4, dtype=np.float32)}


@pytest.fixture
def deployment(deploy: Callable[..., Deployment]) -> Deployment:
    return deploy(stall_timeout_s=1.0)


@pytest.fixture
def session_id(deployment: Deployment) -> str:
    return deployment.session(WEIGHTS, rounds={"quorum": 2, "target": 2})


@pytest.fixture
def device(deployment: Deployment) -> RawDevice:
    return RawDevice(deployment.device("raw"), deployment.devices_stub)


@pytest.fixture
def draft(device: RawDevice, session_id: str) -> Draft:
    return device.draft(device.task(session_id), {"w": np.ones(4, np.float32)})


def row_count(deployment: Deployment) -> int:
    """Return how many rows an update could have written."""
    with deployment.coordinator.parts.database.read() as session:
        updates = session.query(ModelUpdate).count()
        accepted = session.query(AuditLog).filter_by(event_type="update.accepted").count()
        return updates + accepted + session.query(Upload).count() + session.query(Payload).count()


def refused(
    deployment: Deployment, call: Callable[[], object], code: grpc.StatusCode, reason: str
) -> grpc.RpcError:
    """Make a call that has to fail in this way and write nothing."""
    before = row_count(deployment)
    with pytest.raises(grpc.RpcError) as caught:
        call()
    assert (caught.value.code(), reason_of(caught.value)) == (code, reason)
    assert row_count(deployment) == before
    return caught.value


def test_accepts_an_update_and_answers_a_repeat_with_the_first_receipt(
    device: RawDevice, draft: Draft
) -> None:
    first = device.submit(draft)
    again = device.submit(draft)

    assert first.acceptance_sequence == 1
    assert again == first


def test_repeat_after_the_round_has_closed_gets_the_first_receipt(
    deployment: Deployment, device: RawDevice, draft: Draft, session_id: str
) -> None:
    first = device.submit(draft)
    other = RawDevice(deployment.device("other"), deployment.devices_stub)
    other.submit(other.draft(other.task(session_id), {"w": np.ones(4, np.float32)}))

    assert device.submit(draft) == first


@pytest.mark.parametrize(
    ("field", "value", "code", "reason"),
    [
        ("realm", "elsewhere", Code.INVALID_ARGUMENT, "INVALID_REQUEST"),
        (
            "training_session_id",
            "11111111-2222-4333-8444-555555555555",
            Code.NOT_FOUND,
            "TRAINING_SESSION_NOT_FOUND",
        ),
        ("round_number", 0, Code.INVALID_ARGUMENT, "INVALID_REQUEST"),
        ("round_number", 7, Code.FAILED_PRECONDITION, "ROUND_NOT_OPEN"),
        ("task_nonce", "00" * 32, Code.INVALID_ARGUMENT, "INVALID_REQUEST"),
        ("update_id", "first", Code.INVALID_ARGUMENT, "INVALID_REQUEST"),
        ("device_id", "somebody", Code.INVALID_ARGUMENT, "INVALID_REQUEST"),
        ("key_id", "00" * 32, Code.INVALID_ARGUMENT, "INVALID_SIGNATURE"),
        ("base_version", 3, Code.FAILED_PRECONDITION, "STALE_BASE_VERSION"),
        ("base_version", -1, Code.INVALID_ARGUMENT, "INVALID_REQUEST"),
        ("base_digest", "00" * 32, Code.INVALID_ARGUMENT, "INVALID_REQUEST"),
        ("layout_digest", "00" * 32, Code.INVALID_ARGUMENT, "INVALID_MANIFEST"),
        ("size_bytes", 12, Code.INVALID_ARGUMENT, "INVALID_MANIFEST"),
        ("payload_digest", "00" * 32, Code.INVALID_ARGUMENT, "DIGEST_MISMATCH"),
        ("example_count", 0, Code.INVALID_ARGUMENT, "INVALID_REQUEST"),
        ("example_count", -4, Code.INVALID_ARGUMENT, "INVALID_REQUEST"),
        ("encoding", 2, Code.INVALID_ARGUMENT, "INVALID_REQUEST"),
    ],
)
def test_refuses_a_statement_with_a_wrong_field(
    deployment: Deployment,
    device: RawDevice,
    draft: Draft,
    field: str,
    value: object,
    code: grpc.StatusCode,
    reason: str,
) -> None:
    setattr(draft.statement, field, value)

    refused(deployment, lambda: device.submit(draft), code, reason)


def test_names_the_current_version_of_a_stale_base(
    deployment: Deployment, device: RawDevice, draft: Draft
) -> None:
    draft.statement.base_version = 3

    error = refused(
        deployment, lambda: device.submit(draft), Code.FAILED_PRECONDITION, "STALE_BASE_VERSION"
    )

    assert info_of(error).metadata["current_version"] == "0"


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_refuses_metrics_that_are_not_finite(
    deployment: Deployment, device: RawDevice, draft: Draft, value: float
) -> None:
    draft.statement.metrics["loss"] = value

    refused(deployment, lambda: device.submit(draft), Code.INVALID_ARGUMENT, "INVALID_REQUEST")


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_refuses_elements_that_are_not_finite(
    deployment: Deployment, device: RawDevice, session_id: str, value: float
) -> None:
    arrays = {"w": np.array([1, 2, value, 4], np.float32)}
    draft = device.draft(device.task(session_id), arrays)

    refused(deployment, lambda: device.submit(draft), Code.INVALID_ARGUMENT, "INVALID_UPDATE")


@pytest.mark.parametrize("payload", [b"", b"\0" * 12, b"\0" * 20])
def test_refuses_too_few_or_too_many_bytes(
    deployment: Deployment, device: RawDevice, draft: Draft, payload: bytes
) -> None:
    draft.payload = payload

    refused(deployment, lambda: device.submit(draft), Code.INVALID_ARGUMENT, "INVALID_UPDATE")


def test_refuses_chunks_after_the_last_one(
    deployment: Deployment, device: RawDevice, draft: Draft
) -> None:
    messages = list(device.messages(draft))
    extra = pb.SubmitUpdateRequest()
    extra.chunk.index = len(messages)
    extra.chunk.data = b"more"

    def send() -> object:
        return device.stub.SubmitUpdate(iter([*messages, extra]), metadata=device.metadata)

    refused(deployment, send, Code.INVALID_ARGUMENT, "INVALID_UPDATE")


def test_refuses_bytes_of_another_digest(
    deployment: Deployment, device: RawDevice, draft: Draft
) -> None:
    draft.payload = bytes(16)

    refused(deployment, lambda: device.submit(draft), Code.INVALID_ARGUMENT, "DIGEST_MISMATCH")


def test_refuses_chunk_digests_of_another_payload(
    deployment: Deployment, device: RawDevice, draft: Draft
) -> None:
    draft.chunk_digests = bytes(32)

    refused(deployment, lambda: device.submit(draft), Code.INVALID_ARGUMENT, "DIGEST_MISMATCH")


def _flip(header: pb.UpdateHeader) -> None:
    signature = bytearray(header.statement.signatures[0].signature)
    signature[100] ^= 1
    header.statement.signatures[0].signature = bytes(signature)


def _truncate(header: pb.UpdateHeader) -> None:
    header.statement.signatures[0].signature = header.statement.signatures[0].signature[:-1]


def _strip(header: pb.UpdateHeader) -> None:
    del header.statement.signatures[:]


def _downgrade(header: pb.UpdateHeader) -> None:
    header.statement.signatures[0].algorithm = security_pb2.SIGNATURE_ALGORITHM_ML_DSA_44


@pytest.mark.parametrize("spoil", [_flip, _truncate, _strip, _downgrade])
def test_refuses_a_spoiled_signature(
    deployment: Deployment,
    device: RawDevice,
    draft: Draft,
    spoil: Callable[[pb.UpdateHeader], None],
) -> None:
    draft.spoil_header = spoil

    refused(deployment, lambda: device.submit(draft), Code.INVALID_ARGUMENT, "INVALID_SIGNATURE")


@pytest.mark.parametrize(
    "spec",
    [
        tensor_pb2.TensorSpec.FromString(b"\x0a\x01w\x10\x63\x1a\x01\x04\x20\x10"),
        tensor_pb2.TensorSpec(name="w", dtype=tensor_pb2.DTYPE_FLOAT32, shape=[-4], size_bytes=16),
        tensor_pb2.TensorSpec(
            name="w", dtype=tensor_pb2.DTYPE_FLOAT32, shape=[2**62, 2**62], size_bytes=16
        ),
        tensor_pb2.TensorSpec(name="", dtype=tensor_pb2.DTYPE_FLOAT32, shape=[4], size_bytes=16),
        tensor_pb2.TensorSpec(name="w", dtype=tensor_pb2.DTYPE_FLOAT32, shape=[5], size_bytes=16),
    ],
)
def test_refuses_a_manifest_that_is_none(
    deployment: Deployment, spec: tensor_pb2.TensorSpec
) -> None:
    created = deployment.admin.CreateTrainingSession(
        admin_pb2.CreateTrainingSessionRequest(name="test", config=with_quorum(TrainingConfig())),
        metadata=deployment.metadata,
    )
    manifest = Manifest.from_arrays(WEIGHTS).to_proto()
    manifest.tensors[0].CopyFrom(spec)
    header = admin_pb2.InitialModelHeader(
        training_session_id=created.training_session.training_session_id, manifest=manifest
    )

    refused(
        deployment,
        lambda: deployment.admin.UploadInitialModel(
            iter([admin_pb2.UploadInitialModelRequest(header=header)]),
            metadata=deployment.metadata,
        ),
        Code.INVALID_ARGUMENT,
        "INVALID_MANIFEST",
    )


def test_refuses_a_stream_without_a_header(deployment: Deployment, device: RawDevice) -> None:
    def call() -> object:
        message = pb.SubmitUpdateRequest(chunk=pb.Chunk(index=0, data=b"x"))
        return device.stub.SubmitUpdate(iter([message]), metadata=device.metadata)

    refused(deployment, call, Code.INVALID_ARGUMENT, "INVALID_REQUEST")


def test_refuses_an_empty_stream(deployment: Deployment, device: RawDevice) -> None:
    def call() -> object:
        return device.stub.SubmitUpdate(iter([]), metadata=device.metadata)

    refused(deployment, call, Code.INVALID_ARGUMENT, "INVALID_REQUEST")


def test_refuses_a_second_header(deployment: Deployment, device: RawDevice, draft: Draft) -> None:
    def call() -> object:
        header = pb.SubmitUpdateRequest(header=device.header(draft))
        return device.stub.SubmitUpdate(iter([header, header]), metadata=device.metadata)

    refused(deployment, call, Code.INVALID_ARGUMENT, "INVALID_REQUEST")


def test_refuses_bytes_that_are_no_statement(
    deployment: Deployment, device: RawDevice, draft: Draft
) -> None:
    def spoil(header: pb.UpdateHeader) -> None:
        header.statement.payload = b"\xff" * 50

    draft.spoil_header = spoil

    refused(deployment, lambda: device.submit(draft), Code.INVALID_ARGUMENT, "INVALID_REQUEST")


def test_refuses_a_message_over_the_limit(device: RawDevice, draft: Draft) -> None:
    def messages() -> Iterator[pb.SubmitUpdateRequest]:
        yield pb.SubmitUpdateRequest(header=device.header(draft))
        yield pb.SubmitUpdateRequest(chunk=pb.Chunk(index=0, data=bytes(5 * 2**20)))

    with pytest.raises(grpc.RpcError) as caught:
        device.stub.SubmitUpdate(messages(), metadata=device.metadata)

    assert caught.value.code() is Code.RESOURCE_EXHAUSTED


def test_refuses_a_different_update_for_the_same_round(
    deployment: Deployment, device: RawDevice, draft: Draft, session_id: str
) -> None:
    task = device.task(session_id)
    device.submit(draft)
    other = device.draft(task, {"w": np.zeros(4, np.float32)})

    refused(deployment, lambda: device.submit(other), Code.ALREADY_EXISTS, "DUPLICATE_UPDATE")


def test_refuses_an_update_for_a_closed_round(
    deployment: Deployment, device: RawDevice, draft: Draft, session_id: str
) -> None:
    for name in ("first", "second"):
        other = RawDevice(deployment.device(name), deployment.devices_stub)
        other.submit(other.draft(other.task(session_id), {"w": np.ones(4, np.float32)}))

    with pytest.raises(grpc.RpcError) as caught:
        device.submit(draft)

    assert caught.value.code() is Code.FAILED_PRECONDITION
    assert reason_of(caught.value) in {"ROUND_NOT_OPEN", "STALE_BASE_VERSION"}


def test_refuses_a_call_without_a_credential(
    deployment: Deployment, device: RawDevice, draft: Draft
) -> None:
    def call() -> object:
        return device.stub.SubmitUpdate(device.messages(draft))

    refused(deployment, call, Code.UNAUTHENTICATED, "UNAUTHENTICATED")


@pytest.mark.parametrize(
    ("word", "reason"), [("suspend", "DEVICE_SUSPENDED"), ("revoke", "DEVICE_REVOKED")]
)
def test_refuses_the_very_next_call_of_a_device_that_may_not_call(
    deployment: Deployment, device: RawDevice, draft: Draft, word: str, reason: str
) -> None:
    devices = deployment.coordinator.use_cases.devices
    metadata = device.metadata
    getattr(devices, word)(SYSTEM, device.identity.device_id, "test")

    def call() -> object:
        return device.stub.SubmitUpdate(device.messages(draft), metadata=metadata)

    refused(deployment, call, Code.PERMISSION_DENIED, reason)


@pytest.mark.parametrize("before", ["nothing", "header", "all but the end"])
def test_ends_a_stream_that_stalls(
    deployment: Deployment, device: RawDevice, draft: Draft, before: str
) -> None:
    done = threading.Event()
    sent = {
        "nothing": [],
        "header": [pb.SubmitUpdateRequest(header=device.header(draft))],
        "all but the end": list(device.messages(draft)),
    }

    def messages() -> Iterator[pb.SubmitUpdateRequest]:
        yield from sent[before]
        done.wait(20)

    def call() -> object:
        return device.stub.SubmitUpdate(messages(), metadata=device.metadata, timeout=20)

    try:
        refused(deployment, call, Code.DEADLINE_EXCEEDED, "STALLED")
    finally:
        done.set()


def test_a_device_that_disconnects_leaves_nothing(
    deployment: Deployment, device: RawDevice, draft: Draft
) -> None:
    before = row_count(deployment)

    def messages() -> Iterator[pb.SubmitUpdateRequest]:
        yield pb.SubmitUpdateRequest(header=device.header(draft))
        call.cancel()

    call = device.stub.SubmitUpdate.future(messages(), metadata=device.metadata)
    with pytest.raises(grpc.FutureCancelledError):
        call.result(10)

    assert row_count(deployment) == before
    assert device.submit(draft).acceptance_sequence == 1


def test_a_device_that_floods_is_told_when_to_come_back(
    deploy: Callable[..., Deployment],
) -> None:
    deployment = deploy(max_streams_per_device=1)
    session_id = deployment.session(WEIGHTS)
    device = RawDevice(deployment.device("raw"), deployment.devices_stub)
    draft = device.draft(device.task(session_id), {"w": np.ones(4, np.float32)})
    started, done = threading.Event(), threading.Event()

    def slow() -> Iterator[pb.SubmitUpdateRequest]:
        yield pb.SubmitUpdateRequest(header=device.header(draft))
        started.set()
        done.wait(20)

    first = device.stub.SubmitUpdate.future(slow(), metadata=device.metadata)
    started.wait(10)
    try:
        caught = None
        for _ in range(50):
            try:
                device.stub.SubmitUpdate(iter([]), metadata=device.metadata)
            except grpc.RpcError as error:
                caught = error
                if error.code() is Code.RESOURCE_EXHAUSTED:
                    break
        assert caught is not None
        assert (caught.code(), reason_of(caught)) == (Code.RESOURCE_EXHAUSTED, "TOO_MANY_REQUESTS")
    finally:
        first.cancel()
        done.set()
