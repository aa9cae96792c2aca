"""Statements inside signed envelopes are checked like fields of the request, before anything they name is looked up."""

from collections.abc import Callable, Iterator
from typing import Any, Final

import grpc
import numpy as np
import pytest
from google.protobuf.descriptor import FieldDescriptor
from google.rpc import error_details_pb2

from qflare.crypto.envelope import sign_envelope
from qflare.crypto.signing import SigningContext
from qflare.v1 import coordinator_service_pb2 as pb
from qflare.v1 import security_pb2
from tests.integration.conftest import Deployment
from tests.support.raw_device import RawDevice, details_of, info_of, reason_of

WEIGHTS: Final = {"w": np.ones(4, np.float32)}
STATEMENTS: Final[dict[str, tuple[type[Any], SigningContext, str]]] = {
    "SubmitUpdate": (security_pb2.UpdateStatement, SigningContext.UPDATE, "header.statement"),
    "ReportEvaluation": (
        security_pb2.EvaluationStatement,
        SigningContext.EVALUATION,
        "statement",
    ),
    "RotateKeys": (security_pb2.KeyRotation, SigningContext.ROTATION, "rotation"),
    "advertisement": (
        security_pb2.NeighborAdvertisement,
        SigningContext.NEIGHBOR_ADVERTISEMENT,
        "advertisement",
    ),
    "shares": (
        security_pb2.NeighborShares,
        SigningContext.NEIGHBOR_SHARES,
        "shares.statement",
    ),
    "confirmation": (
        security_pb2.NeighborConfirmation,
        SigningContext.NEIGHBOR_CONFIRMATION,
        "confirmation",
    ),
    "reveal": (security_pb2.NeighborReveal, SigningContext.NEIGHBOR_REVEAL, "reveal"),
}
"""By method, or by step of `SecureAggregationStep`: statement, context, and path of the envelope in the request."""
BOX: Final = security_pb2.NeighborBox(
    recipient_digest="a" * 64,
    sealed_shares=b"sealed",
    mask_share_digest="a" * 64,
    self_share_digest="a" * 64,
)
HOSTILE: Final = ("a\0b", "a\nb", "x" * 5000)


def texts() -> Iterator[tuple[str, str]]:
    """Yield each text field of each statement that a device signs, with its method."""
    for method, (kind, _, _) in STATEMENTS.items():
        for field in kind.DESCRIPTOR.fields:
            if field.type == FieldDescriptor.TYPE_STRING:
                yield method, field.name


@pytest.fixture
def deployment(deploy: Callable[..., Deployment]) -> Deployment:
    return deploy()


@pytest.fixture
def device(deployment: Deployment) -> RawDevice:
    deployment.session(WEIGHTS, rounds={"quorum": 2, "target": 2})
    return RawDevice(deployment.device("raw"), deployment.devices_stub)


def whole_statement(device: RawDevice, method: str) -> Any:
    """Return a statement of a method, with a plausible value in every text field."""
    draft = device.draft(device.task(), WEIGHTS).statement
    kind = STATEMENTS[method][0]
    statement = kind()
    for field in kind.DESCRIPTOR.fields:
        if field.message_type is None and field.name in draft.DESCRIPTOR.fields_by_name:
            setattr(statement, field.name, getattr(draft, field.name))
    return statement


def call(device: RawDevice, method: str, envelope: security_pb2.SignedEnvelope) -> object:
    """Call a method with an envelope."""
    answers: dict[str, Callable[[], object]] = {
        "SubmitUpdate": lambda: device.stub.SubmitUpdate(
            iter([pb.SubmitUpdateRequest(header=pb.UpdateHeader(statement=envelope))]),
            metadata=device.metadata,
            timeout=30,
        ),
        "ReportEvaluation": lambda: device.stub.ReportEvaluation(
            pb.ReportEvaluationRequest(statement=envelope), metadata=device.metadata, timeout=30
        ),
        "RotateKeys": lambda: device.stub.RotateKeys(
            pb.RotateKeysRequest(rotation=envelope), metadata=device.metadata, timeout=30
        ),
    }
    if method in answers:
        return answers[method]()
    request = pb.SecureAggregationStepRequest()
    if method == "shares":
        request.shares.CopyFrom(pb.SharedSecrets(statement=envelope, boxes=[BOX]))
    else:
        getattr(request, method).CopyFrom(envelope)
    return device.stub.SecureAggregationStep(request, metadata=device.metadata, timeout=30)


def signed(device: RawDevice, method: str, statement: Any) -> security_pb2.SignedEnvelope:
    """Return a statement in an envelope that the device has signed."""
    return sign_envelope(device.identity.keys.signing, STATEMENTS[method][1], statement)


def test_no_text_of_a_signed_statement_reaches_a_lookup_unchecked(device: RawDevice) -> None:
    for method, name in texts():
        for value in HOSTILE:
            statement = whole_statement(device, method)
            setattr(statement, name, value)
            with pytest.raises(grpc.RpcError) as caught:
                call(device, method, signed(device, method, statement))
            where = f"{method} {name} {value[:3]!r}"
            assert reason_of(caught.value) == "INVALID_REQUEST", where
            violations = [
                violation.field
                for details in details_of(caught.value, error_details_pb2.BadRequest)
                for violation in details.field_violations
            ]
            assert f"{STATEMENTS[method][2]}.payload.{name}" in violations, where


@pytest.mark.parametrize("method", STATEMENTS)
@pytest.mark.parametrize("payload", [b"\xff", b"x" * 70_000], ids=["malformed", "too long"])
def test_a_payload_that_is_no_statement_names_the_payload(
    device: RawDevice, method: str, payload: bytes
) -> None:
    envelope = signed(device, method, whole_statement(device, method))
    envelope.payload = payload
    with pytest.raises(grpc.RpcError) as caught:
        call(device, method, envelope)
    assert reason_of(caught.value) == "INVALID_REQUEST"
    assert info_of(caught.value).metadata["field"] == f"{STATEMENTS[method][2]}.payload"
