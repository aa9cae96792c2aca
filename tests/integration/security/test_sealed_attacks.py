"""Every way in which a sealed update can be wrong: its typed error, nothing written, the coordinator alive."""

from collections.abc import Callable
from typing import Any

import grpc
import numpy as np
import pytest

from qflare.crypto.sealed_payloads import HEADER_BYTES, SEGMENT_BYTES, WRAPPED_KEY_BYTES, Direction
from qflare.crypto.sealing import KemKey, KemPublicKey
from qflare.v1 import coordinator_service_pb2 as pb
from qflare.v1 import security_pb2
from qflare_server.storage.tables import AuditLog, ModelUpdate, Payload
from tests.integration.conftest import Deployment
from tests.support.raw_device import Draft, RawDevice, reason_of
from tests.support.sealing import LARGE, SMALL, Segments, marked, name_header, rotate, seal, start

Code = grpc.StatusCode
INVALID = Code.INVALID_ARGUMENT


@pytest.fixture
def deployment(deploy: Callable[..., Deployment]) -> Deployment:
    return deploy()


@pytest.fixture
def session_id(deployment: Deployment) -> str:
    return start(deployment, LARGE)


@pytest.fixture
def device(deployment: Deployment) -> RawDevice:
    return RawDevice(deployment.device("raw"), deployment.devices_stub)


@pytest.fixture
def draft(device: RawDevice, session_id: str) -> Draft:
    return device.draft(device.task(session_id), marked(LARGE))


@pytest.fixture
def server_key(device: RawDevice) -> KemPublicKey:
    return device.client._trust.session_key()


def written(deployment: Deployment) -> tuple[int, int, int]:
    """Return how many rows an update could have written."""
    with deployment.coordinator.parts.database.read() as session:
        accepted = session.query(AuditLog).filter_by(event_type="update.accepted").count()
        return session.query(ModelUpdate).count(), session.query(Payload).count(), accepted


def refused(
    deployment: Deployment,
    device: RawDevice,
    draft: Draft,
    reason: str,
    code: grpc.StatusCode = INVALID,
) -> None:
    """Send an update that has to be refused in this way; nothing of it may be written or gone on with."""
    before = written(deployment)
    with pytest.raises(grpc.RpcError) as caught:
        device.submit(draft)
    assert (caught.value.code(), reason_of(caught.value)) == (code, reason)
    assert written(deployment) == before
    request = pb.GetUploadRequest(update_id=draft.statement.update_id)
    assert device.stub.GetUpload(request, metadata=device.metadata) == pb.GetUploadResponse()


def flip(data: bytes, place: int) -> bytes:
    """Return bytes with one bit changed."""
    changed = bytearray(data)
    changed[place] ^= 1
    return bytes(changed)


def test_a_sealed_update_is_accepted(
    device: RawDevice, draft: Draft, server_key: KemPublicKey
) -> None:
    seal(draft, server_key)

    first = device.submit(draft)

    assert first.acceptance_sequence == 1
    assert device.submit(draft) == first


# Segments.


def swapped(segments: Segments) -> Segments:
    return [segments[1], segments[0], segments[2]]


def duplicated(segments: Segments) -> Segments:
    return [segments[0], segments[0], segments[2]]


def flipped(segments: Segments) -> Segments:
    return [segments[0], flip(segments[1], 1000), segments[2]]


def flipped_in_its_tag(segments: Segments) -> Segments:
    return [*segments[:2], flip(segments[2], -1)]


def zeroed(segments: Segments) -> Segments:
    return [bytes(SEGMENT_BYTES), *segments[1:]]


def dropped(segments: Segments) -> Segments:
    return segments[:2]


def dropped_from_the_middle(segments: Segments) -> Segments:
    return [segments[0], segments[2]]


def truncated(segments: Segments) -> Segments:
    return [*segments[:2], segments[2][:-1]]


def lengthened(segments: Segments) -> Segments:
    return [*segments[:2], segments[2] + b"\0"]


def one_too_many(segments: Segments) -> Segments:
    return [*segments[:2], segments[2] + bytes(SEGMENT_BYTES - len(segments[2])), segments[2]]


OF_RIGHT_LENGTH = [swapped, duplicated, flipped, flipped_in_its_tag, zeroed]
OF_WRONG_COUNT = [dropped, dropped_from_the_middle, one_too_many]
OF_WRONG_LENGTH = [truncated, lengthened, dropped_from_the_middle]


@pytest.mark.parametrize("spoil", OF_RIGHT_LENGTH)
def test_segments_that_were_changed_on_the_way_are_refused(
    deployment: Deployment,
    device: RawDevice,
    draft: Draft,
    server_key: KemPublicKey,
    spoil: Callable[[Segments], Segments],
) -> None:
    seal(draft, server_key)
    data = draft.payload
    segments = [data[i : i + SEGMENT_BYTES] for i in range(0, len(data), SEGMENT_BYTES)]
    draft.payload = b"".join(spoil(segments))

    refused(deployment, device, draft, "DIGEST_MISMATCH")


@pytest.mark.parametrize("spoil", OF_WRONG_LENGTH)
def test_segments_that_were_lost_on_the_way_are_refused(
    deployment: Deployment,
    device: RawDevice,
    draft: Draft,
    server_key: KemPublicKey,
    spoil: Callable[[Segments], Segments],
) -> None:
    seal(draft, server_key)
    data = draft.payload
    segments = [data[i : i + SEGMENT_BYTES] for i in range(0, len(data), SEGMENT_BYTES)]
    draft.payload = b"".join(spoil(segments))

    refused(deployment, device, draft, "INVALID_UPDATE")


def test_segments_that_are_missing_at_the_end_may_still_come(
    deployment: Deployment, device: RawDevice, draft: Draft, server_key: KemPublicKey
) -> None:
    seal(draft, server_key)
    whole, before = draft.payload, written(deployment)
    draft.payload = whole[: 2 * SEGMENT_BYTES]

    with pytest.raises(grpc.RpcError) as caught:
        device.submit(draft)

    assert reason_of(caught.value) == "INVALID_UPDATE"
    assert written(deployment) == before
    draft.payload = whole
    assert device.submit(draft).acceptance_sequence == 1


@pytest.mark.parametrize("spoil", OF_RIGHT_LENGTH)
def test_segments_that_a_device_has_signed_in_a_wrong_order_do_not_open(
    deployment: Deployment,
    device: RawDevice,
    draft: Draft,
    server_key: KemPublicKey,
    spoil: Callable[[Segments], Segments],
) -> None:
    seal(draft, server_key, spoil=spoil)

    refused(deployment, device, draft, "INVALID_SEAL")


@pytest.mark.parametrize("spoil", OF_WRONG_COUNT)
def test_another_number_of_signed_segments_is_refused(
    deployment: Deployment,
    device: RawDevice,
    draft: Draft,
    server_key: KemPublicKey,
    spoil: Callable[[Segments], Segments],
) -> None:
    seal(draft, server_key, spoil=spoil)

    refused(deployment, device, draft, "DIGEST_MISMATCH")


@pytest.mark.parametrize("spoil", [truncated, lengthened])
def test_signed_segments_of_another_length_are_refused(
    deployment: Deployment,
    device: RawDevice,
    draft: Draft,
    server_key: KemPublicKey,
    spoil: Callable[[Segments], Segments],
) -> None:
    seal(draft, server_key, spoil=spoil)

    refused(deployment, device, draft, "INVALID_UPDATE")


def test_the_digest_has_to_be_that_of_what_is_sealed(
    deployment: Deployment, device: RawDevice, draft: Draft, server_key: KemPublicKey
) -> None:
    draft.statement.payload_digest = "00" * 32
    seal(draft, server_key)

    refused(deployment, device, draft, "DIGEST_MISMATCH")


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_elements_that_are_sealed_have_to_be_finite(
    deployment: Deployment,
    device: RawDevice,
    session_id: str,
    server_key: KemPublicKey,
    value: float,
) -> None:
    arrays = marked(LARGE)
    arrays["w"][LARGE // 2] = value
    draft = device.draft(device.task(session_id), arrays)
    seal(draft, server_key)

    refused(deployment, device, draft, "INVALID_UPDATE")


# The header.


def _no_key(message: security_pb2.SealedPayloadHeader) -> None:
    del message.wrapped_keys[:]


def _two_keys(message: security_pb2.SealedPayloadHeader) -> None:
    message.wrapped_keys.append(message.wrapped_keys[0])


def _many_keys(message: security_pb2.SealedPayloadHeader) -> None:
    message.wrapped_keys.extend([message.wrapped_keys[0]] * 1000)


def _short_key(message: security_pb2.SealedPayloadHeader) -> None:
    message.wrapped_keys[0].sealed_key = bytes(WRAPPED_KEY_BYTES - 1)


def _long_key(message: security_pb2.SealedPayloadHeader) -> None:
    message.wrapped_keys[0].sealed_key += b"\0"


def _no_header(message: security_pb2.SealedPayloadHeader) -> None:
    message.header = b""


def _short_header(message: security_pb2.SealedPayloadHeader) -> None:
    message.header = message.header[:-1]


def _long_header(message: security_pb2.SealedPayloadHeader) -> None:
    message.header += bytes(2**20)


def _other_format(message: security_pb2.SealedPayloadHeader) -> None:
    message.header = b"QFS2" + message.header[4:]


def _other_suite(message: security_pb2.SealedPayloadHeader) -> None:
    message.header = flip(message.header, 5)


def _other_segment_size(message: security_pb2.SealedPayloadHeader) -> None:
    message.header = flip(message.header, 9)


def _other_commitment(message: security_pb2.SealedPayloadHeader) -> None:
    message.header = flip(message.header, 10)


def _other_context(message: security_pb2.SealedPayloadHeader) -> None:
    message.header = flip(message.header, HEADER_BYTES - 1)


def _changed_key(message: security_pb2.SealedPayloadHeader) -> None:
    wrapped = message.wrapped_keys[0]
    wrapped.sealed_key = flip(wrapped.sealed_key, -1)


def _changed_encapsulation(message: security_pb2.SealedPayloadHeader) -> None:
    wrapped = message.wrapped_keys[0]
    wrapped.sealed_key = flip(wrapped.sealed_key, 0)


@pytest.mark.parametrize(
    "spoil",
    [
        _no_key,
        _two_keys,
        _many_keys,
        _short_key,
        _long_key,
        _no_header,
        _short_header,
        _long_header,
        _other_format,
        _other_suite,
        _other_segment_size,
        _other_commitment,
        _other_context,
        _changed_key,
        _changed_encapsulation,
    ],
)
def test_a_header_is_refused_that_a_device_has_signed_wrong(
    deployment: Deployment,
    device: RawDevice,
    draft: Draft,
    server_key: KemPublicKey,
    spoil: Callable[[security_pb2.SealedPayloadHeader], None],
) -> None:
    message = seal(draft, server_key)
    spoil(message)
    name_header(draft, message)

    # what is beyond any header's bounds is refused by the constraints of the protos, before it is looked into
    beyond = spoil in {_many_keys, _long_header}
    refused(deployment, device, draft, "INVALID_REQUEST" if beyond else "INVALID_SEAL")


def test_a_header_is_refused_that_was_exchanged_on_the_way(
    deployment: Deployment, device: RawDevice, draft: Draft, server_key: KemPublicKey
) -> None:
    message = seal(draft, server_key)
    _other_commitment(message)

    refused(deployment, device, draft, "INVALID_SEAL")


@pytest.mark.parametrize(
    "context",
    [
        {"realm": "elsewhere"},
        {"direction": Direction.MODEL},
        {"direction": Direction.STATE},
        {"training_session_id": "another"},
        {"number": 2},
        {"update_id": "another"},
        {"device_id": "another"},
    ],
)
def test_what_was_sealed_for_something_else_is_refused(
    deployment: Deployment,
    device: RawDevice,
    draft: Draft,
    server_key: KemPublicKey,
    context: dict[str, Any],
) -> None:
    seal(draft, server_key, **context)

    refused(deployment, device, draft, "INVALID_SEAL")


# Keys.


def test_a_key_that_is_wrapped_for_somebody_else_is_refused(
    deployment: Deployment, device: RawDevice, draft: Draft
) -> None:
    seal(draft, KemKey.generate().public)

    refused(deployment, device, draft, "SEAL_KEY_NOT_ACCEPTED", Code.FAILED_PRECONDITION)


def test_a_key_that_is_wrapped_for_somebody_else_in_our_name_is_refused(
    deployment: Deployment, device: RawDevice, draft: Draft, server_key: KemPublicKey
) -> None:
    message = seal(draft, KemKey.generate().public)
    message.wrapped_keys[0].recipient_key_id = server_key.key_id

    refused(deployment, device, draft, "INVALID_SEAL")


def test_what_is_sealed_to_the_key_before_is_accepted(
    deployment: Deployment, device: RawDevice, draft: Draft, server_key: KemPublicKey
) -> None:
    seal(draft, server_key)
    rotate(deployment, 1)

    assert device.submit(draft).acceptance_sequence == 1


def test_what_is_sealed_to_a_retired_key_is_refused(
    deployment: Deployment, device: RawDevice, draft: Draft, server_key: KemPublicKey
) -> None:
    seal(draft, server_key)
    rotate(deployment, 2)

    refused(deployment, device, draft, "SEAL_KEY_NOT_ACCEPTED", Code.FAILED_PRECONDITION)


@pytest.mark.parametrize("element_count", [SMALL, LARGE])
def test_what_was_accepted_gets_its_receipt_whatever_has_become_of_the_key(
    deployment: Deployment, device: RawDevice, server_key: KemPublicKey, element_count: int
) -> None:
    session_id = start(deployment, element_count)
    draft = device.draft(device.task(session_id), marked(element_count))
    seal(draft, server_key)
    first = device.submit(draft)
    rotate(deployment, 2)

    assert device.submit(draft) == first


# The setting of the training session.


def test_an_update_that_is_not_sealed_is_refused_where_all_are(
    deployment: Deployment, device: RawDevice, draft: Draft
) -> None:
    refused(deployment, device, draft, "SEALING_MISMATCH")


def test_a_sealed_update_is_refused_where_none_is(
    deployment: Deployment, device: RawDevice, server_key: KemPublicKey
) -> None:
    session_id = start(deployment, transfer={"sealed": False})
    draft = device.draft(device.task(session_id), marked(SMALL))
    seal(draft, server_key)

    refused(deployment, device, draft, "SEALING_MISMATCH")


def test_a_sealed_statement_without_its_header_is_refused(
    deployment: Deployment, device: RawDevice, draft: Draft, server_key: KemPublicKey
) -> None:
    seal(draft, server_key)
    draft.spoil_header = lambda _header: None

    refused(deployment, device, draft, "SEALING_MISMATCH")


def test_a_seal_around_an_open_statement_is_refused(
    deployment: Deployment, device: RawDevice
) -> None:
    session_id = start(deployment, transfer={"sealed": False})
    draft = device.draft(device.task(session_id), marked(SMALL))
    draft.spoil_header = lambda header: header.sealed.SetInParent()

    refused(deployment, device, draft, "SEALING_MISMATCH")


def test_an_administrator_gets_no_sealed_version_as_a_device(
    deployment: Deployment, session_id: str
) -> None:
    request = pb.GetGlobalModelRequest(training_session_id=session_id)

    with pytest.raises(grpc.RpcError) as caught:
        list(deployment.devices_stub.GetGlobalModel(request, metadata=deployment.metadata))

    assert (caught.value.code(), reason_of(caught.value)) == (
        Code.FAILED_PRECONDITION,
        "NO_KEM_KEY",
    )
