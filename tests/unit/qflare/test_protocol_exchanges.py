"""The recorded vectors of enrollment, login, tokens and sealing: by the product, and by the page alone."""

import json
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from qflare.crypto.sealed_payloads import PayloadKey, PayloadOpener
from qflare.crypto.sealing import KemPublicKey, open_sealed
from qflare.crypto.signing import PublicKey
from qflare.crypto.symmetric import UnsealError
from qflare.protocol.enrollment import DeviceEnrollment
from qflare.protocol.handshake import HandshakeError
from qflare.protocol.possession import Refresh, check_call
from qflare.v1 import security_pb2 as pb
from tests.independent import exchange, verifier
from tests.independent.verifier import RefusedError
from tests.vectors.protocol import documents, exchanges, generate

FOLDER = Path(generate.__file__).parent


def load(name: str) -> dict[str, Any]:
    """Return a file of vectors."""
    vectors: dict[str, Any] = json.loads((FOLDER / f"{name}.json").read_text(encoding="utf-8"))
    return vectors


ENROLLMENT, LOGIN, SEALING = load("enrollment"), load("login"), load("sealing")


def data(vector: dict[str, Any], name: str) -> bytes:
    """Return bytes that a vector holds in hex."""
    return bytes.fromhex(vector[name])


def test_the_coordinator_takes_the_enrollment() -> None:
    server = exchanges.enrollment_server()
    sealed = pb.SealedEnrollment.FromString(data(ENROLLMENT, "sealed_enrollment"))
    application = server.open_request(sealed)
    assert application.enrollment_token == ENROLLMENT["enrollment_token"]
    confirmation = pb.EnrollmentConfirmation.FromString(data(ENROLLMENT, "confirmation"))
    finished = server.finish(confirmation, datetime.fromisoformat(ENROLLMENT["finished_at"]))
    assert finished == application


def test_the_device_takes_the_receipt() -> None:
    key = generate.kem_key("device 1")
    device = DeviceEnrollment(
        realm=ENROLLMENT["realm"],
        enrollment_token=ENROLLMENT["enrollment_token"],
        signing_key=documents.device_key(1),
        kem_key=key.public,
        decapsulate=key.decapsulate,
        server_key=generate.kem_key("session").public,
    )
    registrar = PublicKey.from_proto(pb.PublicKey.FromString(data(ENROLLMENT, "registrar_key")))
    receipt = device.accept(pb.SignedEnvelope.FromString(data(ENROLLMENT, "receipt")), [registrar])
    assert receipt.device_id == documents.device_id(1)


def test_the_enrollment_by_the_page() -> None:
    server = exchange.KemKey(data(ENROLLMENT, "server_kem_seed"))
    sealed = pb.SealedEnrollment.FromString(data(ENROLLMENT, "sealed_enrollment"))
    assert sealed.server_kem_key_id == verifier.key_id(25_722, server.public)
    info = verifier.tagged_hash(
        "qflare/v1/enroll", sealed.realm.encode(), sealed.server_kem_key_id.encode()
    )
    opened = pb.SignedEnvelope.FromString(server.open(sealed.sealed_request, info))
    request = pb.EnrollmentRequest.FromString(opened.payload)
    key = request.signature_key
    payload = verifier.open_envelope(opened, "qflare/v1/enroll", {key.key_id: key})

    device = exchange.KemKey(data(ENROLLMENT, "device_kem_seed"))
    challenge = pb.EnrollmentChallenge.FromString(data(ENROLLMENT, "challenge"))
    secret = device.decapsulate(challenge.encapsulation)
    transcript = verifier.tagged_hash(
        "qflare/v1/enroll transcript",
        exchange.sha256(payload),
        challenge.nonce,
        challenge.encapsulation,
    )
    confirm_key = exchange.expand(secret, b"qflare/v1/enroll confirm")
    confirmation = pb.EnrollmentConfirmation.FromString(data(ENROLLMENT, "confirmation"))
    assert secret == data(ENROLLMENT, "shared_secret")
    assert confirmation.confirmation == exchange.mac(confirm_key, transcript)


def test_the_coordinator_takes_the_login() -> None:
    proof = pb.SessionProof.FromString(data(LOGIN, "proof"))
    at = datetime.fromisoformat(LOGIN["finished_at"])
    keys = exchanges.login_server().open_proof(proof, at).verify(documents.device_key(1).public)
    assert (keys.grant_key, keys.binding_key) == (
        data(LOGIN, "grant_key"),
        data(LOGIN, "binding_key"),
    )


def test_the_device_takes_the_login() -> None:
    device = exchanges.device_login(data(LOGIN, "hello"))
    keys, _proof = device.prove(pb.SessionChallenge.FromString(data(LOGIN, "challenge")))
    grant = keys.open_grant(pb.SealedTokenGrant.FromString(data(LOGIN, "sealed_grant")))
    assert grant.SerializeToString() == data(LOGIN, "grant")


def test_a_late_login_is_refused() -> None:
    proof = pb.SessionProof.FromString(data(LOGIN, "proof"))
    late = datetime.fromisoformat(LOGIN["finished_at"]) + timedelta(seconds=30)
    with pytest.raises(HandshakeError):
        exchanges.login_server().open_proof(proof, late)


def test_the_login_by_the_page() -> None:
    hello = pb.SessionHello.FromString(data(LOGIN, "hello"))
    challenge = pb.SessionChallenge.FromString(data(LOGIN, "challenge"))
    first = exchange.KemKey(data(LOGIN, "server_kem_seed"))
    second = exchange.KemKey(data(LOGIN, "ephemeral_kem_seed"))
    assert second.public == hello.ephemeral_key
    transcript, prk = exchange.login_secrets(
        hello,
        challenge,
        first.decapsulate(hello.encapsulation),
        second.decapsulate(challenge.encapsulation),
    )
    expand, mac = exchange.expand, exchange.mac
    server_key = expand(prk, b"qflare/v1/session confirm coordinator")
    assert challenge.confirmation == mac(server_key, transcript)

    proof = pb.SessionProof.FromString(data(LOGIN, "proof"))
    device = documents.device_key(1).public.to_proto()
    verifier.check_signature(device, "qflare/v1/session-device", transcript, proof.signature)
    signature_digest = exchange.sha256(proof.signature.signature)
    device_key = expand(prk, b"qflare/v1/session confirm device")
    assert proof.confirmation == mac(device_key, transcript + signature_digest)

    grant_key = expand(prk, b"qflare/v1/session grant")
    sealed = pb.SealedTokenGrant.FromString(data(LOGIN, "sealed_grant")).sealed_grant
    associated = b"qflare/v1/grant" + challenge.session_id.encode()
    grant = exchange.decrypt(grant_key, sealed, associated)
    assert grant == data(LOGIN, "grant")
    assert expand(prk, b"qflare/v1/session binding") == data(LOGIN, "binding_key")


def test_the_refresh_by_the_page() -> None:
    binding_key = data(LOGIN, "binding_key")
    request = pb.SessionRefresh.FromString(data(LOGIN, "refresh"))
    digest = verifier.tagged_hash(
        "qflare/v1/refresh",
        request.session_id.encode(),
        exchange.sha256(request.refresh_token.encode()),
        request.nonce,
    )
    assert request.proof == exchange.mac(binding_key, digest)
    key = exchange.expand(binding_key, b"qflare/v1/refresh grant" + digest)
    sealed = pb.SealedTokenGrant.FromString(data(LOGIN, "refresh_sealed_grant")).sealed_grant
    associated = b"qflare/v1/grant" + request.session_id.encode()
    assert exchange.decrypt(key, sealed, associated) == data(LOGIN, "refresh_grant")


def test_refresh() -> None:
    request = pb.SessionRefresh.FromString(data(LOGIN, "refresh"))
    refresh = Refresh.check(data(LOGIN, "binding_key"), request)
    grant = refresh.open_grant(pb.SealedTokenGrant.FromString(data(LOGIN, "refresh_sealed_grant")))
    assert grant.SerializeToString() == data(LOGIN, "refresh_grant")


def test_proof_of_possession() -> None:
    call, key = LOGIN["call"], data(LOGIN, "binding_key")
    proof, message = data(call, "qf-pop-bin"), data(call, "first_message")
    got = check_call(key, call["access_token"], call["method"], message, proof)
    sequence = call["sequence_number"].to_bytes(8, "big")
    digest = verifier.tagged_hash(
        "qflare/v1/pop",
        call["method"].encode(),
        sequence,
        exchange.sha256(call["access_token"].encode()),
        exchange.sha256(message),
    )
    assert got == call["sequence_number"]
    assert proof == sequence + exchange.mac(key, digest)


def test_x_wing_and_hpke() -> None:
    key = exchange.KemKey(data(SEALING, "recipient_kem_seed"))
    ours = generate.kem_key("device 1")
    assert key.public == data(SEALING, "recipient_public_key") == ours.public.data
    assert KemPublicKey(key.public).key_id == SEALING["recipient_key_id"]
    encapsulation, sealed = SEALING["encapsulation"], SEALING["seal"]
    ciphertext, secret = data(encapsulation, "ciphertext"), data(encapsulation, "secret")
    assert key.decapsulate(ciphertext) == ours.decapsulate(ciphertext) == secret
    arguments = data(sealed, "sealed"), data(sealed, "info")
    plaintext = data(sealed, "plaintext")
    assert key.open(*arguments) == open_sealed(ours.decapsulate, *arguments) == plaintext


def _segments(vector: dict[str, Any]) -> list[bytes]:
    """Seal the vector's payload again, by the page."""
    payload, header = generate.pattern(vector["size_bytes"]), data(vector, "header")
    piece = verifier.CHUNK_BYTES - 16
    pieces = [payload[start : start + piece] for start in range(0, len(payload), piece)] or [b""]
    cipher = AESGCM(data(vector, "key"))
    return [
        cipher.encrypt(
            index.to_bytes(11, "big") + bytes([index == len(pieces) - 1]),
            part,
            b"" if index else exchange.sha256(header),
        )
        for index, part in enumerate(pieces)
    ]


@pytest.mark.parametrize("vector", SEALING["payloads"])
def test_sealed_payload(vector: dict[str, Any]) -> None:
    segments = _segments(vector)
    assert [segment[-16:].hex() for segment in segments] == vector["segment_tags"]
    assert [len(segment) for segment in segments] == vector["segment_lengths"]
    wrapped = pb.WrappedKey.FromString(data(vector, "wrapped_key"))
    own = generate.kem_key("device 1")
    key = PayloadKey.unwrap(
        data(vector, "header"), wrapped, exchanges.seal_context(), own.decapsulate
    )
    opener = PayloadOpener(key, vector["size_bytes"])
    opened = exchange.open_segments(data(vector, "key"), data(vector, "header"), segments)
    payload = generate.pattern(vector["size_bytes"])
    assert b"".join(opener.open(segments)) == b"".join(opened) == payload


@pytest.mark.parametrize("vector", SEALING["payloads"])
def test_the_key_of_a_sealed_payload_by_the_page(vector: dict[str, Any]) -> None:
    wrapped = pb.WrappedKey.FromString(data(vector, "wrapped_key"))
    header = data(vector, "header")
    info = verifier.tagged_hash("qflare/v1/seal", header, wrapped.recipient_key_id.encode())
    recipient = exchange.KemKey(data(SEALING, "recipient_kem_seed"))
    assert recipient.open(wrapped.sealed_key, info) == data(vector, "key")
    context = verifier.tagged_hash(
        "qflare/v1/seal context",
        vector["realm"].encode(),
        vector["direction"].encode(),
        vector["training_session_id"].encode(),
        vector["number"].to_bytes(8, "big", signed=True),
        vector["update_id"].encode(),
        vector["device_id"].encode(),
    )
    assert header[:10] == b"QFS1" + (1).to_bytes(2, "big") + (1 << 20).to_bytes(4, "big")
    assert header[42:] == context


def test_swapped_segments_are_refused_by_both() -> None:
    vector = SEALING["payloads"][-1]
    wrapped = pb.WrappedKey.FromString(data(vector, "wrapped_key"))
    key = PayloadKey.unwrap(
        data(vector, "header"),
        wrapped,
        exchanges.seal_context(),
        generate.kem_key("device 1").decapsulate,
    )
    swapped = _segments(vector)[::-1]
    with pytest.raises(UnsealError):
        list(PayloadOpener(key, vector["size_bytes"]).open(swapped))
    with pytest.raises(RefusedError):
        list(exchange.open_segments(data(vector, "key"), data(vector, "header"), swapped))
