"""Enrollment: both sides agree, and every message that was tampered with is refused."""

from datetime import UTC, datetime, timedelta

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qflare.crypto.envelope import sign_envelope
from qflare.crypto.sealing import KemKey, seal
from qflare.crypto.signing import Algorithm, SigningContext, SigningKey, tagged_hash
from qflare.crypto.symmetric import UnsealError
from qflare.protocol.enrollment import (
    MAX_SEALED_BYTES,
    MAX_TOKEN_CHARACTERS,
    DeviceEnrollment,
    EnrollmentServer,
)
from qflare.protocol.handshake import HandshakeError
from qflare.v1 import security_pb2

NOW = datetime(2026, 1, 1, tzinfo=UTC)
REALM = "realm"
TOKEN = "qfe1.id.secret"
STATE_KEY = bytes(range(32))
SERVER_KEY = KemKey.generate()
SIGNING_KEY = SigningKey.generate()
KEM_KEY = KemKey.generate()
REGISTRAR = SigningKey.generate()


def decapsulate(key_id: str, encapsulation: bytes) -> bytes:
    if key_id != SERVER_KEY.public.key_id:
        raise UnsealError("no such key")
    return SERVER_KEY.decapsulate(encapsulation)


def server(
    realm: str = REALM, state_key: bytes = STATE_KEY, algorithms: frozenset[Algorithm] | None = None
) -> EnrollmentServer:
    return EnrollmentServer(
        realm=realm,
        state_key=state_key,
        decapsulate=decapsulate,
        algorithms=algorithms or frozenset(Algorithm),
    )


def device(
    *,
    realm: str = REALM,
    token: str = TOKEN,
    signing_key: SigningKey = SIGNING_KEY,
    kem_key: KemKey = KEM_KEY,
    server_key: KemKey = SERVER_KEY,
    profile: bytes = b"profile",
) -> DeviceEnrollment:
    return DeviceEnrollment(
        realm=realm,
        enrollment_token=token,
        signing_key=signing_key,
        kem_key=kem_key.public,
        decapsulate=kem_key.decapsulate,
        server_key=server_key.public,
        device_profile=profile,
    )


def receipt(**changes: str) -> security_pb2.EnrollmentReceipt:
    message = security_pb2.EnrollmentReceipt(
        realm=REALM,
        device_id="device",
        signature_key_id=SIGNING_KEY.public.key_id,
        kem_key_id=KEM_KEY.public.key_id,
    )
    for name, value in changes.items():
        setattr(message, name, value)
    return message


def confirmed(
    now: datetime = NOW,
) -> tuple[EnrollmentServer, security_pb2.EnrollmentConfirmation]:
    coordinator, enrolling = server(), device()
    _application, challenge = coordinator.challenge(enrolling.request(), now)
    return coordinator, enrolling.confirm(challenge)


def test_an_enrollment_proves_both_keys() -> None:
    coordinator, enrolling = server(), device()

    applied, challenge = coordinator.challenge(enrolling.request(), NOW)
    finished = coordinator.finish(enrolling.confirm(challenge), NOW)

    assert finished == applied
    assert finished.enrollment_token == TOKEN
    assert finished.signature_key == SIGNING_KEY.public
    assert finished.kem_key == KEM_KEY.public
    assert finished.device_profile == b"profile"


def test_a_hybrid_key_enrols() -> None:
    key = SigningKey.generate(Algorithm.ML_DSA_65_ED25519)

    application = server().open_request(device(signing_key=key).request())

    assert application.signature_key == key.public


def test_the_receipt_is_accepted() -> None:
    envelope = sign_envelope(REGISTRAR, SigningContext.RECEIPT, receipt())

    assert device().accept(envelope, [REGISTRAR.public]).device_id == "device"


@pytest.mark.parametrize(
    "changes",
    [
        {"realm": "other"},
        {"signature_key_id": "00" * 32},
        {"kem_key_id": "00" * 32},
        {"device_id": ""},
    ],
)
def test_a_receipt_for_someone_else_is_refused(changes: dict[str, str]) -> None:
    envelope = sign_envelope(REGISTRAR, SigningContext.RECEIPT, receipt(**changes))

    with pytest.raises(HandshakeError):
        device().accept(envelope, [REGISTRAR.public])


def test_a_receipt_by_another_key_or_context_is_refused() -> None:
    by_other = sign_envelope(SIGNING_KEY, SigningContext.RECEIPT, receipt())
    as_other = sign_envelope(REGISTRAR, SigningContext.KEYSET, receipt())

    for envelope in (by_other, as_other, security_pb2.SignedEnvelope()):
        with pytest.raises(HandshakeError):
            device().accept(envelope, [REGISTRAR.public])


def test_the_token_is_not_on_the_wire() -> None:
    coordinator, enrolling = server(), device()
    sealed = enrolling.request()
    _application, challenge = coordinator.challenge(sealed, NOW)
    confirmation = enrolling.confirm(challenge)

    for message in (sealed, challenge, confirmation):
        assert TOKEN.encode() not in message.SerializeToString()


def test_the_application_shows_no_token() -> None:
    assert TOKEN not in repr(server().open_request(device().request()))


def test_a_request_for_another_realm_is_refused() -> None:
    sealed = device(realm="other").request()
    renamed = security_pb2.SealedEnrollment(
        realm=REALM,
        server_kem_key_id=sealed.server_kem_key_id,
        sealed_request=sealed.sealed_request,
    )

    for request in (sealed, renamed):
        with pytest.raises(HandshakeError):
            server().open_request(request)


def test_a_request_to_another_coordinator_is_refused() -> None:
    sealed = device(server_key=KemKey.generate()).request()

    with pytest.raises(HandshakeError):
        server().open_request(sealed)


def sealed_by_hand(envelope: security_pb2.SignedEnvelope) -> security_pb2.SealedEnrollment:
    key_id = SERVER_KEY.public.key_id
    info = tagged_hash("qflare/v1/enroll", REALM.encode(), key_id.encode())
    return security_pb2.SealedEnrollment(
        realm=REALM,
        server_kem_key_id=key_id,
        sealed_request=seal(SERVER_KEY.public, envelope.SerializeToString(), info),
    )


def request_message() -> security_pb2.EnrollmentRequest:
    return security_pb2.EnrollmentRequest(
        realm=REALM,
        enrollment_token=TOKEN,
        signature_key=SIGNING_KEY.public.to_proto(),
        kem_key=KEM_KEY.public.to_proto(),
        nonce=bytes(32),
        server_kem_key_id=SERVER_KEY.public.key_id,
    )


def test_a_request_made_by_hand_is_accepted() -> None:
    envelope = sign_envelope(SIGNING_KEY, SigningContext.ENROLLMENT, request_message())

    assert server().open_request(sealed_by_hand(envelope)).enrollment_token == TOKEN


def test_a_signature_key_that_the_device_does_not_hold_is_refused() -> None:
    envelope = sign_envelope(SigningKey.generate(), SigningContext.ENROLLMENT, request_message())

    with pytest.raises(HandshakeError):
        server().open_request(sealed_by_hand(envelope))


def test_a_signature_in_another_context_is_refused() -> None:
    envelope = sign_envelope(SIGNING_KEY, SigningContext.ROTATION, request_message())

    with pytest.raises(HandshakeError):
        server().open_request(sealed_by_hand(envelope))


@pytest.mark.parametrize(
    "changes",
    [
        {"realm": "other"},
        {"server_kem_key_id": "00" * 32},
        {"nonce": b"short"},
        {"enrollment_token": ""},
        {"enrollment_token": "x" * (MAX_TOKEN_CHARACTERS + 1)},
        {"signature_key": security_pb2.PublicKey(algorithm=9)},  # type: ignore[arg-type]
        {"kem_key": security_pb2.KemPublicKey(data=b"short")},
    ],
)
def test_a_signed_request_with_a_bad_field_is_refused(changes: dict[str, object]) -> None:
    message = request_message()
    for name, value in changes.items():
        message.ClearField(name)  # type: ignore[arg-type]
        message.MergeFrom(security_pb2.EnrollmentRequest(**{name: value}))  # type: ignore[arg-type]
    envelope = sign_envelope(SIGNING_KEY, SigningContext.ENROLLMENT, message)

    with pytest.raises(HandshakeError):
        server().open_request(sealed_by_hand(envelope))


def test_an_algorithm_below_the_policy_is_refused() -> None:
    weak = SigningKey.generate(Algorithm.ML_DSA_44)
    strict = server(algorithms=frozenset({Algorithm.ML_DSA_65_ED25519}))

    for key in (weak, SIGNING_KEY):
        with pytest.raises(HandshakeError):
            strict.open_request(device(signing_key=key).request())


def test_a_kem_key_that_the_device_does_not_hold_is_refused() -> None:
    coordinator = server()
    claimed = KemKey.generate()
    enrolling = DeviceEnrollment(
        realm=REALM,
        enrollment_token=TOKEN,
        signing_key=SIGNING_KEY,
        kem_key=claimed.public,
        decapsulate=KEM_KEY.decapsulate,
        server_key=SERVER_KEY.public,
    )
    _application, challenge = coordinator.challenge(enrolling.request(), NOW)

    with pytest.raises(HandshakeError):
        coordinator.finish(enrolling.confirm(challenge), NOW)


def test_a_confirmation_expires() -> None:
    coordinator, confirmation = confirmed()

    coordinator.finish(confirmation, NOW + timedelta(seconds=59))
    with pytest.raises(HandshakeError):
        coordinator.finish(confirmation, NOW + timedelta(seconds=60))


def test_a_confirmation_of_another_exchange_is_refused() -> None:
    coordinator, first = confirmed()
    _same, second = confirmed()
    first.confirmation = second.confirmation

    with pytest.raises(HandshakeError):
        coordinator.finish(first, NOW)


def test_a_challenge_with_another_nonce_leads_nowhere() -> None:
    coordinator, enrolling = server(), device()
    _application, challenge = coordinator.challenge(enrolling.request(), NOW)
    challenge.nonce = bytes(32)

    with pytest.raises(HandshakeError):
        coordinator.finish(enrolling.confirm(challenge), NOW)


def test_a_state_of_another_coordinator_is_refused() -> None:
    _coordinator, confirmation = confirmed()

    with pytest.raises(HandshakeError):
        server(state_key=bytes(32)).finish(confirmation, NOW)


def test_another_replica_finishes_an_enrollment() -> None:
    _coordinator, confirmation = confirmed()

    assert server().finish(confirmation, NOW).enrollment_token == TOKEN


def test_a_request_over_its_limit_is_refused_unread() -> None:
    sealed = device().request()
    sealed.sealed_request += bytes(MAX_SEALED_BYTES)

    with pytest.raises(HandshakeError, match="too long"):
        server().open_request(sealed)


def flip(data: bytes, bit: int) -> bytes:
    flipped = bytearray(data)
    flipped[bit // 8] ^= 1 << bit % 8
    return bytes(flipped)


SEALED = device().request()


@settings(max_examples=40, deadline=None)
@given(st.integers(0, len(SEALED.sealed_request) * 8 - 1))
def test_a_flipped_bit_of_the_request_is_refused(bit: int) -> None:
    sealed = security_pb2.SealedEnrollment()
    sealed.CopyFrom(SEALED)
    sealed.sealed_request = flip(SEALED.sealed_request, bit)

    with pytest.raises(HandshakeError):
        server().open_request(sealed)


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_a_flipped_bit_of_the_confirmation_is_refused(data: st.DataObject) -> None:
    coordinator, confirmation = confirmed()
    name = data.draw(st.sampled_from(["sealed_state", "confirmation"]))
    value = getattr(confirmation, name)
    setattr(confirmation, name, flip(value, data.draw(st.integers(0, len(value) * 8 - 1))))

    with pytest.raises(HandshakeError):
        coordinator.finish(confirmation, NOW)


@settings(max_examples=40, deadline=None)
@given(st.binary(max_size=2000), st.binary(max_size=64))
def test_invented_messages_are_refused(data: bytes, short: bytes) -> None:
    key_id = SERVER_KEY.public.key_id
    sealed = security_pb2.SealedEnrollment(
        realm=REALM, server_kem_key_id=key_id, sealed_request=data
    )
    envelope = security_pb2.SignedEnvelope(payload=data)
    challenge = security_pb2.EnrollmentChallenge(encapsulation=data, nonce=short)
    confirmation = security_pb2.EnrollmentConfirmation(sealed_state=data, confirmation=short)

    for attempt in (
        lambda: server().open_request(sealed),
        lambda: server().open_request(sealed_by_hand(envelope)),
        lambda: device().confirm(challenge),
        lambda: server().finish(confirmation, NOW),
    ):
        with pytest.raises(HandshakeError):
            attempt()
