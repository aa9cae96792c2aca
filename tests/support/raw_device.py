"""A device that sends any stream of messages: statements, signatures and chunks can each be spoiled."""

import uuid
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Final, TypeVar

import numpy as np
from google.protobuf.message import Message
from google.rpc import error_details_pb2, status_pb2

from qflare.crypto import merkle
from qflare.crypto.envelope import sign_envelope
from qflare.crypto.signing import SigningContext
from qflare.tensors import CHUNK_BYTES, Manifest, chunks, payload_digest
from qflare.v1 import coordinator_service_pb2 as pb
from qflare.v1 import security_pb2
from qflare_client import Client

MessageT = TypeVar("MessageT", bound=Message)
TIMEOUT_S: Final = 30.0


@dataclass
class Draft:
    """An update before it is sent; tests spoil a field."""

    statement: security_pb2.UpdateStatement
    payload: bytes
    chunk_digests: bytes
    spoil_header: Callable[[pb.UpdateHeader], None] = field(default=lambda _header: None)


class RawDevice:
    """Speaks to the coordinator with the credential and the key of an enrolled client."""

    def __init__(self, client: Client, stub: Any) -> None:
        self.client = client
        self.stub = stub
        self.identity = client._login.identity

    @property
    def metadata(self) -> tuple[Any, ...]:
        """The access token, as the client would send it."""
        return tuple(self.client._login.metadata("/x", pb.GetTaskRequest()))

    def task(self, session_id: str = "") -> pb.GetTaskResponse:
        """Ask for a task."""
        request = pb.GetTaskRequest(training_session_id=session_id)
        answer: pb.GetTaskResponse = self.stub.GetTask(
            request, metadata=self.metadata, timeout=TIMEOUT_S
        )
        return answer

    def draft(self, task: pb.GetTaskResponse, arrays: Mapping[str, np.ndarray]) -> Draft:
        """Return an update for a task, right in every field."""
        manifest = Manifest.from_arrays(arrays)
        pieces = list(chunks(arrays, manifest))
        opened = security_pb2.TaskStatement.FromString(task.task.payload)
        statement = security_pb2.UpdateStatement(
            realm=self.identity.realm,
            training_session_id=task.training_session_id,
            round_number=task.round_number,
            task_nonce=opened.task_nonce,
            update_id=str(uuid.uuid4()),
            device_id=self.identity.device_id,
            key_id=self.identity.keys.signing.public.key_id,
            base_version=task.base_version,
            base_digest=task.base_digest,
            layout_digest=manifest.layout_digest,
            size_bytes=manifest.size_bytes,
            payload_digest=payload_digest(pieces),
            example_count=5,
            metrics={"loss": 0.5, "accuracy": 0.75},
        )
        digests = b"".join(merkle.leaf_hash(piece) for piece in pieces)
        return Draft(statement, b"".join(pieces), digests)

    def header(self, draft: Draft) -> pb.UpdateHeader:
        """Sign a draft's statement; what travels is the payload unless a test says otherwise."""
        draft.statement.wire_digest = draft.statement.wire_digest or draft.statement.payload_digest
        envelope = sign_envelope(self.identity.keys.signing, SigningContext.UPDATE, draft.statement)
        header = pb.UpdateHeader(statement=envelope, chunk_digests=draft.chunk_digests)
        draft.spoil_header(header)
        return header

    def messages(self, draft: Draft) -> Iterator[pb.SubmitUpdateRequest]:
        """Yield the stream of an update: the first chunk travels with the header."""
        first = pb.SubmitUpdateRequest(header=self.header(draft))
        for index in range(0, max(len(draft.payload), 1), CHUNK_BYTES):
            message = first if index == 0 else pb.SubmitUpdateRequest()
            message.chunk.index = index // CHUNK_BYTES
            message.chunk.data = draft.payload[index : index + CHUNK_BYTES]
            yield message

    def submit(self, draft: Draft) -> pb.SubmitUpdateResponse:
        """Send an update."""
        messages, metadata = self.messages(draft), self.metadata
        answer: pb.SubmitUpdateResponse = self.stub.SubmitUpdate(
            messages, metadata=metadata, timeout=TIMEOUT_S
        )
        return answer


def reason_of(error: Any) -> str:
    """Return the machine word of a refused call."""
    return str(info_of(error).reason)


def info_of(error: Any) -> error_details_pb2.ErrorInfo:
    """Return the ErrorInfo of a refused call."""
    (info,) = details_of(error, error_details_pb2.ErrorInfo)
    return info


def details_of(error: Any, kind: type[MessageT]) -> list[MessageT]:
    """Return the details of a refused call that are of one kind."""
    found: Any = dict(error.trailing_metadata())["grpc-status-details-bin"]
    status = status_pb2.Status.FromString(found)
    details = [kind() for _ in status.details]
    return [
        detail
        for detail, packed in zip(details, status.details, strict=True)
        if packed.Unpack(detail)
    ]
