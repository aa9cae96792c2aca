"""What devices send, made ready before the clock runs: signed updates, requests, models of a wanted size."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property

import grpc
import numpy as np

from qflare.evidence.statements import sign_update
from qflare.ids import new_update_id
from qflare.tensors import CHUNK_BYTES, DType, Manifest, PayloadHasher, TensorSpec
from qflare.v1 import coordinator_service_pb2 as pb
from qflare.v1 import security_pb2
from qflare.v1.coordinator_service_pb2_grpc import CoordinatorServiceStub
from tests.bench.coordinator import Coordinator
from tests.bench.load import COORDINATOR, Call
from tests.bench.population import BenchDevice

SUBMIT = f"{COORDINATOR}SubmitUpdate"
SEED = 20261122


@dataclass(frozen=True)
class Model:
    """A model of float32 in one tensor, with random content."""

    size_bytes: int

    @cached_property
    def manifest(self) -> Manifest:
        """Its layout."""
        return Manifest((TensorSpec("weights", DType.FLOAT32, (self.size_bytes // 4,)),))

    @cached_property
    def payload(self) -> bytes:
        """Its bytes."""
        generator = np.random.default_rng(SEED)
        return generator.standard_normal(self.size_bytes // 4, dtype=np.float32).tobytes()

    @cached_property
    def chunks(self) -> Sequence[bytes]:
        """Its bytes as they travel."""
        return [
            self.payload[start : start + CHUNK_BYTES]
            for start in range(0, self.size_bytes, CHUNK_BYTES)
        ]

    @cached_property
    def hashed(self) -> PayloadHasher:
        """Its digests."""
        hasher = PayloadHasher()
        for chunk in self.chunks:
            hasher.add(chunk)
        return hasher

    @cached_property
    def chunk_messages(self) -> Sequence[bytes]:
        """Its chunks as serialized messages of an upload."""
        return [
            pb.SubmitUpdateRequest(chunk=pb.Chunk(index=index, data=chunk)).SerializeToString()
            for index, chunk in enumerate(self.chunks)
        ]


def ask_task(coordinator: Coordinator, device: BenchDevice, session_id: str) -> pb.GetTaskResponse:
    """Return the task of a device, which is the same for all devices but for their names."""
    with grpc.insecure_channel(coordinator.address) as channel:
        metadata = (("authorization", f"Bearer {device.token}"),)
        request = pb.GetTaskRequest(training_session_id=session_id)
        return CoordinatorServiceStub(channel).GetTask(request, metadata=metadata)


def statement_of(
    realm: str, task: pb.GetTaskResponse, device: BenchDevice, model: Model
) -> security_pb2.UpdateStatement:
    """Return what a device vouches for with an update."""
    task_statement = security_pb2.TaskStatement.FromString(task.task.payload)
    digest = model.hashed.root()
    return security_pb2.UpdateStatement(
        realm=realm,
        training_session_id=task.training_session_id,
        round_number=task.round_number,
        task_nonce=task_statement.task_nonce,
        update_id=new_update_id(),
        device_id=device.device_id,
        key_id=device.key.public.key_id,
        base_version=task.base_version,
        base_digest=task.base_digest,
        layout_digest=model.manifest.layout_digest,
        size_bytes=model.size_bytes,
        payload_digest=digest,
        wire_digest=digest,
        kind=task.transfer.update_kind,
        encoding=task.transfer.update_encoding,
        example_count=100,
        metrics={"loss": 0.25, "accuracy": 0.9},
    )


def signed(
    statement: security_pb2.UpdateStatement, device: BenchDevice
) -> security_pb2.SignedEnvelope:
    """Sign an update."""
    return sign_update(device.key, statement)


def unsigned(statement: security_pb2.UpdateStatement) -> security_pb2.SignedEnvelope:
    """Send an update without a signature, as only a measuring coordinator takes it."""
    return security_pb2.SignedEnvelope(payload=statement.SerializeToString(deterministic=True))


def submission(envelope: security_pb2.SignedEnvelope, device: BenchDevice, model: Model) -> Call:
    """Return the upload of an update; one of a single chunk fits in one message."""
    header = pb.UpdateHeader(statement=envelope, chunk_digests=b"".join(model.hashed.leaf_hashes))
    if len(model.chunks) == 1:
        chunk = pb.Chunk(index=0, data=model.chunks[0])
        only = pb.SubmitUpdateRequest(header=header, chunk=chunk).SerializeToString()
        return Call(SUBMIT, (only,), device.token)
    first = pb.SubmitUpdateRequest(header=header).SerializeToString()
    return Call(SUBMIT, (first, *model.chunk_messages), device.token)


def submissions(
    coordinator: Coordinator,
    session_id: str,
    devices: Sequence[BenchDevice],
    model: Model,
    *,
    with_signatures: bool = True,
) -> list[Call]:
    """Return one signed update for each device, for the open round of a training session."""
    task = ask_task(coordinator, devices[0], session_id)
    realm = coordinator.config.realm
    calls = []
    for device in devices:
        statement = statement_of(realm, task, device, model)
        envelope = signed(statement, device) if with_signatures else unsigned(statement)
        calls.append(submission(envelope, device, model))
    return calls


def polls(devices: Iterable[BenchDevice], session_id: str) -> list[Call]:
    """Return a poll of each device."""
    message = pb.GetTaskRequest(training_session_id=session_id).SerializeToString()
    return [Call(f"{COORDINATOR}GetTask", (message,), device.token) for device in devices]


def download(device: BenchDevice, session_id: str) -> Call:
    """Return the download of the latest version."""
    request = pb.GetGlobalModelRequest(training_session_id=session_id).SerializeToString()
    return Call(f"{COORDINATOR}GetGlobalModel", (request,), device.token)
